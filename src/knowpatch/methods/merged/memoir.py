"""MEMOIR: a matrix beside one map, of which every edit writes, and every question reads, a part.

Wang et al., "MEMOIR: Lifelong Model Editing with Minimal Overwrite and Informed Retention for LLMs"
(arXiv 2506.07899). An edit's mask is the share of columns where its prompt's mean input stands out
most from that of ordinary prompts (section 3.2); it is trained in those columns alone, on top of
what earlier live edits have written there (parts/kinds/residual.py says who reads it).

Other than published: a fixed permutation of the columns is left out, since it renames the columns
that an index set holds, and overlaps of sets do not know names; which columns are written then are
those that the prompt uses most, which with the permutation are some others. Adam, not SGD with
clipping; no decay of what other edits wrote; the first token does not count in the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from knowpatch.method import register
from knowpatch.models.passes import Act
from knowpatch.models.sites import muted
from knowpatch.models.view import ModelView
from knowpatch.parts.calibration import Asked, calibrate
from knowpatch.parts.descent import Example
from knowpatch.parts.kinds.residual import RESIDUAL, overlap, residual, stands_out, written
from knowpatch.parts.readings import background, mean_behind_first, read
from knowpatch.parts.sides import Side, SideConfig, SidePrepared
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

State = Mapping[str, Tensor]
"""What live edits have written beside each module, (I, D)."""


class MemoirConfig(SideConfig):
    """Options of MEMOIR."""

    share: float = Field(0.125, gt=0, le=1, description="share of the columns that an edit writes")


@register("memoir")
class Memoir(Side):
    """Trains some columns of a matrix beside one map."""

    name = "memoir"
    paper = "Wang et al. 2025, arXiv 2506.07899"
    summary = "a matrix beside one map; each edit has columns of it, which like prompts find again"
    choose = "many facts one after the other, where rewordings should follow and all else stay"
    Config = MemoirConfig
    depth: ClassVar[float] = 27 / 32

    def reading(self, count: int) -> dict[str, Any]:
        return {**super().reading(count), "share": self.config.share}

    def prepare(self, view: ModelView) -> SidePrepared:
        module, reading = self.role(view).module, self.reading(len(view.roles.blocks))
        chat = self.config.chat
        usual = background(view, module, mean_behind_first, reading, chat=chat)
        found, threshold = None, self.config.threshold
        if threshold is None:

            def keys(asked: Sequence[Asked]) -> Tensor:
                rows = [view.encode(one.prompt, chat=chat).ids for one in asked]
                return self._masks(read(view, module, rows, mean_behind_first), usual)

            found = calibrate(view.fingerprint, reading, "similarity", keys, overlap)
            threshold = found.threshold()
        return SidePrepared(self.contexts(view), usual, threshold, found)

    def edit(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        prepared: SidePrepared,
        state: State | None,
    ) -> Patch:
        module, usual = self.role(view).module, prepared.background_I
        groups = [self.examples(view, request, prepared.prefixes) for request in requests]
        with muted(RESIDUAL):
            inputs_NI = read(view, module, [group[0].prompt for group in groups], mean_behind_first)
            masks_NI = self._masks(inputs_NI, usual)
            rows_UD = self._trained(view, groups, masks_NI, (state or {}).get(module))
        wrap = residual(module, masks_NI, rows_UD, usual, prepared.threshold)
        return self.patch(view, requests, wraps=[wrap])

    def fold(self, prepared: SidePrepared, state: State | None, patch: Patch) -> State:
        found = dict(state or {})
        for wrap in patch.wraps:
            mine_ID = written([wrap])
            found[wrap.module] = found[wrap.module] + mine_ID if wrap.module in found else mine_ID
        return found

    def _masks(self, inputs_NI: Tensor, usual_I: Tensor) -> Tensor:
        size = max(1, round(self.config.share * inputs_NI.shape[1]))
        return stands_out(inputs_NI, usual_I, size)

    def _trained(
        self,
        view: ModelView,
        groups: Sequence[Sequence[Example]],
        masks_NI: Tensor,
        earlier_ID: Tensor | None,
    ) -> Tensor:
        """What is to be written in each column that one of the masks has, from low to high."""
        role = self.role(view)
        weight_DI = view.weight(role)
        device = weight_DI.device
        columns_U = masks_NI.any(0).nonzero()[:, 0].to(device)
        before_UD = weight_DI.new_zeros(len(columns_U), len(weight_DI))
        if earlier_ID is not None:
            before_UD = earlier_ID.to(device)[columns_U]
        leaf_UD = torch.zeros_like(before_UD)
        leaf_UD.requires_grad_()
        owners = [number for number, group in enumerate(groups) for _ in group]
        marks_RU = masks_NI.to(device)[owners][:, columns_U].float()

        def act(inputs_BTI: Tensor, outputs_BTD: Tensor, numbers: Sequence[int]) -> Tensor:
            kept_BTU = inputs_BTI[..., columns_U].float() * marks_RU[list(numbers)][:, None]
            return outputs_BTD + kept_BTU @ (before_UD + leaf_UD)

        examples = [example for group in groups for example in group]
        passes = self.passes(view, examples, [Act(role.module, act)])
        self.descend([leaf_UD], passes, weight_DI)
        return leaf_UD.detach().cpu()
