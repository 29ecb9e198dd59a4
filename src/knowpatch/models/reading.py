"""What a pass reads: its tokens, and where in it prompts end.

Axes: B rows, T columns of the pass, P columns that were read before, I width of a module's input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knowpatch.parts.wraps import Tokens


@dataclass(frozen=True, eq=False)
class Reading:
    """One pass of a model.

    Attributes:
        ids_BT: what it reads.
        begin: columns that were read before, P.
        cache: what the attention keeps of the texts; None without.
        lasts_B: column of each prompt's last token, P included; empty where no prompt ends.
        mask_BT: which columns are no padding; None for all.
    """

    ids_BT: Tensor
    begin: int
    cache: Any
    lasts_B: Tensor
    mask_BT: Tensor | None

    @classmethod
    def of(cls, ids_BT: Tensor, inputs: Mapping[str, Any], lasts: Tensor) -> Reading:
        """The pass with these keyword arguments; `lasts` may be of fewer rows, each for several."""
        cache = inputs.get("past_key_values")
        begin = 0 if cache is None else int(cache.get_seq_length())
        mask, mask_BT = inputs.get("attention_mask"), None
        if isinstance(mask, Tensor) and mask.ndim == 2:
            mask_BT = mask[:, begin : begin + ids_BT.shape[1]].bool()
        times = len(ids_BT) // len(lasts) if len(lasts) else 1
        lasts_B = lasts.to(ids_BT.device).repeat_interleave(times)
        return cls(ids_BT, begin, cache, lasts_B, mask_BT)

    @property
    def shape(self) -> torch.Size:
        """(B, T), which some models flatten inside."""
        return self.ids_BT.shape

    @property
    def holds_prompts(self) -> bool:
        """Whether every prompt lies whole in this pass."""
        inside = len(self.lasts_B) > 0 and int(self.lasts_B.max()) < self.shape[1]
        return inside and self.begin == 0

    def ends(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of these rows those whose prompt ends in this pass, and in which of its columns."""
        if not len(self.lasts_B):
            return rows[:0], rows[:0]
        columns = self.lasts_B[rows] - self.begin
        inside = (columns >= 0) & (columns < self.shape[1])
        return rows[inside], columns[inside]

    def tokens(self, inputs_BTI: Tensor) -> Tokens:
        """The pass as a wrap is shown it. Of beginnings, every token is a prompt's."""
        real_BT = torch.ones_like(self.ids_BT, dtype=torch.bool)
        if self.mask_BT is not None:
            real_BT = self.mask_BT.to(real_BT.device)
        columns_T = self.begin + torch.arange(self.shape[1], device=self.ids_BT.device)
        prompt_BT = real_BT
        if len(self.lasts_B):
            prompt_BT = real_BT & (columns_T <= self.lasts_B[:, None])
        first_BT = real_BT & (real_BT.long().cumsum(1) == 1) & (self.begin == 0)
        return Tokens(inputs_BTI, self.ids_BT, prompt_BT, first_BT)
