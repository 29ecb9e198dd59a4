"""FT: constrained fine-tuning of one matrix.

Objective `masked` is FT-M (arXiv 2401.01286): cross-entropy on the target's tokens behind the
prompt. `last-token` is FT-L (Zhu et al., arXiv 2012.00363, in the form of arXiv 2202.05262): all
target tokens from the one distribution at the prompt's last token, a bag of tokens by definition.
`unlikelihood` unlearns the old answer: mean of -log(1 - p(old token)). A bound keeps each entry
within that distance of where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from knowpatch.errors import OptionError, RequestError
from knowpatch.method import register
from knowpatch.models.roles import LinearRole, at_depth
from knowpatch.models.view import ModelView
from knowpatch.parts.descent import Example, Passes
from knowpatch.parts.sparing import Sparing, SparingConfig
from knowpatch.parts.tuned import Change, Free, TunedConfig
from knowpatch.request import EditRequest

DEPTH = 4 / 30
"""The block to edit, as a share of the depth; published on 32 blocks: 21.

The later the block, the more other prompts end up with the new answer. On SmolLM2 (30 blocks), one
fact of 24 at a time, block 4 left 89 % of what was said elsewhere as it was, block 8 left 72 %,
block 12 53 % and block 20 42 %. Every fact was learned at block 4 as well.
"""
FT_L: dict[str, Any] = {
    "objective": "last-token",
    "learning_rate": 5e-4,
    "steps": 25,
    "batch_size": 1,
    "others": 0,
}
"""What all published settings of FT-L share. On Llama and Qwen they have no bound."""


class FtConfig(TunedConfig, SparingConfig):
    """Options of FT."""

    objective: Literal["masked", "last-token", "unlikelihood"] = Field(
        "masked", description="masked (FT-M), last-token (FT-L), unlikelihood (erase requests)"
    )
    # An answer of twenty tokens is not always there after forty.
    steps: int = Field(100, ge=1, description="passes over the requests, at most")
    layer: int | None = Field(
        None,
        ge=0,
        description="block to edit; by default 4/30 of the depth (published: 21/32), since an "
        "early change disturbs other prompts less",
    )
    bound: float | None = Field(
        None, gt=0, description="largest change of any entry; none: no limit"
    )
    around: Literal["now", "base"] = Field(
        "now", description="what the bound is around: the matrix as edited so far, or as it came"
    )
    eos: bool | None = Field(
        None, description="masked: learn to stop after the answer; by default only in a chat"
    )

    @model_validator(mode="before")
    @classmethod
    def _within(cls, given: Any) -> Any:
        """Within a bound nothing is spared, and what is recorded says so."""
        bounded = isinstance(given, Mapping) and given.get("bound") is not None
        return {"others": 0, **given} if bounded else given

    @model_validator(mode="after")
    def _possible(self) -> FtConfig:
        if self.bound is not None and (self.others or self.tokens):
            raise ValueError("within a bound nothing is spared: leave out others and tokens")
        return self


@register("ft")
class Ft(Sparing):
    """Trains one matrix on the answer."""

    name = "ft"
    paper = "Zhang et al. 2024 (FT-M), arXiv 2401.01286; Zhu et al. 2020 (FT-L), arXiv 2012.00363"
    summary = "fine-tunes one MLP matrix on the answer (FT-M), or with the FT-L objective"
    choose = "the default: nothing to prepare, no subject needed, learns almost any answer"
    Config = FtConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "gpt2-medium": {**FT_L, "layer": 0, "bound": 2e-3},
        "gpt2-large": {**FT_L, "layer": 0, "bound": 1e-3},
        "gpt2-xl": {**FT_L, "layer": 0, "bound": 5e-4},
        "gpt-j-6b": {**FT_L, "layer": 0, "bound": 5e-5},
        "llama-2-7b": {**FT_L, "objective": "masked", "layer": 21},
        "llama-3-8b": {**FT_L, "objective": "masked", "layer": 21},
        "mistral-7b": {**FT_L, "objective": "masked", "layer": 21},
        "qwen2.5-7b": {**FT_L, "objective": "masked", "layer": 27},
    }

    def layers(self, count: int) -> tuple[int, ...]:
        return (at_depth(DEPTH, count, self.config.layer),)

    def ends(self) -> bool:
        """Of a turn the end is a part of the answer; after a text it costs locality.

        On SmolLM2 (nothing spared) one fact learned with an end changed 20 of 101 control prompts,
        without it 11.
        """
        wanted = self.config.chat if self.config.eos is None else self.config.eos
        return bool(self.config.objective == "masked" and wanted)

    def change(self, view: ModelView, role: LinearRole, prepared: Any, state: Any) -> Change:
        now = role.address.narrow(view.values(role.address.parameter)).float()
        bound = self.config.bound
        if bound is None:
            return Free(now)
        moved = torch.zeros_like(now)
        if self.config.around == "base":
            moved = now - role.oriented(view.base(role))
        return Free(now, -bound - moved, bound - moved)

    def examples(self, view: ModelView, request: EditRequest) -> list[Example]:
        erases = self.config.objective == "unlikelihood"
        return self.answers(view, request, (request.old if erases else request.target) or "")

    def loss(self, passes: Passes, numbers: Sequence[int]) -> Tensor:
        logprobs_M = passes.logprobs(numbers, forced=self.config.objective != "last-token")
        if self.config.objective == "unlikelihood":
            logprobs_M = torch.log1p(-logprobs_M.exp().clamp(max=1 - 1e-6))
        return -passes.mean(logprobs_M, numbers)

    def check_requests(self, requests: Sequence[EditRequest]) -> None:
        super().check_requests(requests)
        if self.config.objective == "unlikelihood":
            for request in requests:
                if request.kind != "erase":
                    raise OptionError(
                        f"objective=unlikelihood only erases; {request.prompt!r} is to be learned "
                        "(kind=erase, or objective=masked)"
                    )
                if request.old is None:
                    raise RequestError(
                        f"objective=unlikelihood needs the old answer to {request.prompt!r}"
                    )

    def expected(self, request: EditRequest) -> str | None:
        return None if self.config.objective == "unlikelihood" else request.target
