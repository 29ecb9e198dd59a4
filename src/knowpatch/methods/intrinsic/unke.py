"""UnKE: a block is trained to put out the state that a long answer follows from.

Deng et al., "Everything is Editable" (arXiv 2405.15349). Stage 1 finds what block l should have put
out at the last token of the question for all of the answer to follow (parts/windows.py, the answer
as one window); stage 2 trains the linear maps of block l to put it out, and to put out what they
did at every other token of question and answer and on other texts (parts/blocks.py).

One state carries the beginning of an answer, some fifty tokens at most: for more, windows are
needed. The published code averages the error over all tokens, so the edited ones count next to
nothing; here they count as much as all others (importance).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from knowpatch.method import Cost, EditMethod, Preparation, Shape, register
from knowpatch.models.load import fast_dtype
from knowpatch.models.passes import Ids
from knowpatch.models.roles import at_depth
from knowpatch.models.view import ModelView
from knowpatch.parts.blocks import (
    BlockConfig,
    Moved,
    preserved_item,
    preserved_rows,
    train_block,
)
from knowpatch.parts.onward import LongAnswer
from knowpatch.parts.text import ROW_TOKENS
from knowpatch.parts.values import ValueSettings
from knowpatch.parts.windows import window_values
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

DEPTH = 7 / 32
"""The published layer of 32-block models, as a share of the depth."""

PUBLISHED = {
    "layer": 7,
    "steps": 25,
    "learning_rate": 0.5,
    "clamp": 4.0,
    "weight_decay": 1e-3,
    "enough": 1e-9,  # all steps are made
    "block_steps": 50,
    "block_rate": 2e-4,
}


MODELS = ("llama-2-7b", "llama-3-8b", "qwen2.5-7b")


class UnkeConfig(BlockConfig):
    """Options of UnKE."""

    layer: int | None = Field(None, ge=0, description="block; by default 7/32 of the depth")
    precision: Literal["auto", "model"] = Field(
        "auto", description="of the value's passes: bfloat16 where that is fast, or the model's"
    )
    steps: int = Field(50, ge=2, description="steps of the value's optimisation, at most")
    learning_rate: float | None = Field(
        None, gt=0, description="of Adam on the value; by default from the value's size"
    )
    clamp: float = Field(4.0, gt=0, description="how far the value may move, in its own length")
    weight_decay: float = Field(1e-3, ge=0, description="on the value's change")
    enough: float = Field(0.01, gt=0, description="stop when the answer's mean NLL is below this")
    eos: bool | None = Field(
        None, description="learn to stop after the answer; by default only in a chat"
    )


@register("unke")
class Unke(EditMethod):
    """Trains one block on the state that an answer follows from."""

    name = "unke"
    family = "intrinsic"
    paper = "Deng et al. 2024, arXiv 2405.15349"
    summary = "trains a whole block to put out the state from which a long answer follows"
    choose = "answers of a sentence or two that are no triple; no subject needed"
    roles: ClassVar[tuple[str, ...]] = ("mlp.out", "attn.out")
    exports = ("merged", "gguf")
    Config = UnkeConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = dict.fromkeys(MODELS, PUBLISHED)

    def prepare(self, view: ModelView) -> list[Ids]:
        return preserved_rows(view, self.config, seed=self.seed, progress=self.progress)

    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: list[Ids], state: Any
    ) -> Patch:
        answers = [self._answer(view, request) for request in requests]
        return self._trained(view, requests, answers, self._values(view, answers), prepared)

    def edit_each(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: list[Ids], state: Any
    ) -> list[Patch]:
        answers = [self._answer(view, request) for request in requests]
        return [
            self._trained(view, [request], [answer], [delta_1D], prepared)
            for request, answer, delta_1D in zip(
                requests, answers, self._values(view, answers), strict=True
            )
        ]

    def layers(self, count: int) -> tuple[int, ...]:
        return (at_depth(DEPTH, count, self.config.layer),)

    def _answer(self, view: ModelView, request: EditRequest) -> LongAnswer:
        prompt, answer = self.encode(view, request)
        stops = self.config.chat if self.config.eos is None else self.config.eos
        return LongAnswer(prompt.ids, (*answer, *(view.stop_ids[:1] if stops else ())))

    def _values(self, view: ModelView, answers: Sequence[LongAnswer]) -> list[Tensor]:
        """Stage 1: by what the block's output should move at the question's last token (1, D)."""
        names = ("steps", "learning_rate", "clamp", "weight_decay", "enough")
        settings = ValueSettings(
            **{name: getattr(self.config, name) for name in names},
            kl_factor=0.0,
            dtype=fast_dtype(view.device) if self.config.precision == "auto" else None,
        )
        (layer,) = self.layers(len(view.roles.blocks))
        block = view.roles.blocks[layer]
        return window_values(view, block.module, answers, settings, self.progress)

    def _trained(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        answers: Sequence[LongAnswer],
        deltas: Sequence[Tensor],
        preserved: Sequence[Ids],
    ) -> Patch:
        """Stage 2."""
        moved = [
            Moved(answer.ids, len(answer.prompt), answer.positions, delta_1D)
            for answer, delta_1D in zip(answers, deltas, strict=True)
        ]
        (layer,) = self.layers(len(view.roles.blocks))
        changes = train_block(
            view, layer, moved, preserved, self.config, seed=self.seed, progress=self.progress
        )
        found = [self.delta(view, address, change) for address, change in changes]
        return self.patch(view, requests, deltas=found)

    def preparations(self, shape: Shape) -> list[Preparation]:
        return [preserved_item(shape.fingerprint, self.config, self.seed)]

    def cost(self, shape: Shape, lengths: Sequence[int]) -> Cost:
        values = self.config.steps * sum(lengths)
        rows = sum(lengths) + self.config.samples * ROW_TOKENS
        # The block's training runs one block of all.
        tokens = values + self.config.block_steps * rows // shape.layers
        block = 3 * shape.hidden * shape.inner + 4 * shape.hidden**2
        return Cost(tokens, tokens, extra_bytes=4 * 5 * block)
