"""Sides: what methods share that train something beside a map, for prompts that are recognised.

Adam (parts/descent.py) moves what is beside; a request is learned behind the bare prompt and behind
context prefixes. From which score on a prompt is recognised is calibrated on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from knowpatch.method import Cost, EditMethod, MethodConfig, Preparation, Shape
from knowpatch.models.load import fast_dtype
from knowpatch.models.passes import Act
from knowpatch.models.roles import LinearRole, at_depth
from knowpatch.models.view import ModelView
from knowpatch.parts import calibration, prefixes, readings
from knowpatch.parts.calibration import Calibration
from knowpatch.parts.descent import Example, Pace, Passes, descend
from knowpatch.parts.spans import continuation
from knowpatch.request import EditRequest

BATCH = 16
"""Rows per step."""
READ_TOKENS = 5_000
"""What the prompts to measure with come to, about."""


class SideConfig(MethodConfig):
    """Options that these methods share."""

    layer: int | None = Field(None, ge=0, description="block that is read; by default by depth")
    contexts: int = Field(4, ge=0, description="context prefixes to learn it behind as well")
    steps: int = Field(40, ge=1, description="steps of Adam, at most")
    rate: float = Field(
        0.02, gt=0, description="of Adam, as a share of the size (RMS) of the map's weights"
    )
    enough: float = Field(0.02, gt=0, description="stop when the mean loss is below this")
    precision: Literal["auto", "model"] = Field(
        "auto", description="of the passes: bfloat16 where that is fast (auto), or the model's"
    )
    threshold: float | None = Field(
        None, description="from which score on a prompt is recognised; by default calibrated"
    )


@dataclass(frozen=True)
class SidePrepared:
    """Context prefixes, the background of readings, the threshold, and how it was found."""

    prefixes: tuple[str, ...]
    background_I: Tensor
    threshold: float
    found: Calibration | None


class Side(EditMethod):
    """Trains something beside a map of one block.

    Class attributes:
        depth: of the block, as a share of the model's.
    """

    family = "merged"
    roles = ("mlp.out",)
    Config: ClassVar[type[SideConfig]] = SideConfig
    depth: ClassVar[float]

    def block(self, count: int) -> int:
        """The block whose map is read, of a model that has `count`."""
        return at_depth(self.depth, count, self.config.layer)

    def layers(self, count: int) -> tuple[int, ...]:
        return (self.block(count),)

    def role(self, view: ModelView) -> LinearRole:
        """The map that is read."""
        return view.roles.linear("mlp.out", self.block(len(view.roles.blocks)))

    def plan(self) -> tuple[tuple[int, int], ...]:
        """Half of the context prefixes of 5 tokens, half of 10."""
        short = self.config.contexts // 2
        return ((short, 5), (self.config.contexts - short, 10))

    def contexts(self, view: ModelView) -> tuple[str, ...]:
        return prefixes.context_prefixes(view, self.plan(), seed=self.seed, progress=self.progress)

    def examples(
        self, view: ModelView, request: EditRequest, contexts: Sequence[str]
    ) -> list[Example]:
        """The request's answer behind each context, the bare prompt first."""
        found = []
        for context in contexts:
            prompt = view.encode(request.prompt, chat=self.config.chat, before=context)
            found.append(Example(prompt.ids, continuation(view.tokenizer, prompt, request.target)))
        return found

    def passes(self, view: ModelView, examples: Sequence[Example], acts: Sequence[Act]) -> Passes:
        """Passes over examples with what is trained in the place of modules' outputs."""
        dtype = fast_dtype(view.device) if self.config.precision == "auto" else None
        lowest = min(view.roles.block_of(act.module) for act in acts)
        return Passes(view, examples, lowest=lowest, acts=acts, dtype=dtype)

    def descend(
        self,
        leaves: Sequence[Tensor],
        passes: Passes,
        weight: Tensor,
        besides: Callable[[], Tensor | float] = lambda: 0.0,
    ) -> None:
        """Adam on `leaves` until the answers are learned; `weight` says how large its steps are.

        `besides` is added to the loss of every step.
        """
        config, size = self.config, float(weight.square().mean().sqrt())
        descend(
            leaves,
            passes.learned,
            lambda numbers: besides() - passes.mean(passes.logprobs(numbers), numbers),
            Pace(config.steps, config.rate * size, BATCH, config.enough, seed=self.seed),
            progress=self.progress,
        )

    # -- before an edit ----------------------------------------------------------------------------

    def reading(self, count: int) -> dict[str, Any]:
        """What names the way of reading prompts in a model of `count` blocks, for the cache."""
        return {"method": self.name, "layer": self.block(count), "chat": self.config.chat}

    def shown(self, prepared: Any) -> list[str]:
        found = prepared.found
        return [] if found is None else [found.told(prepared.threshold)]

    def preparations(self, shape: Shape) -> list[Preparation]:
        print_, reading = shape.fingerprint, self.reading(shape.layers)
        tokens = sum(count * length for count, length in self.plan())
        items = [
            Preparation(
                "context prefixes", prefixes.kept_at(print_, self.plan(), self.seed), tokens
            ),
            Preparation(
                "what ordinary prompts have in common", readings.kept_at(print_, reading), 1000
            ),
        ]
        if self.config.threshold is None:
            path = calibration.kept_at(print_, reading)
            items.append(Preparation("scores of prompts in and out of scope", path, READ_TOKENS))
        return items

    def cost(self, shape: Shape, lengths: Sequence[int]) -> Cost:
        rows = 1 + self.config.contexts
        tokens = self.config.steps * rows * sum(length + 8 for length in lengths)
        return Cost(tokens, tokens, extra_bytes=4 * 4 * shape.hidden * shape.inner)
