"""What methods share that answer for one block at a prompt's end.

For each request the vector is optimised that the block's MLP output map must put out there, or have
added, for the target to follow (parts/values.py). When it answers is the method's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from knowpatch.method import Cost, EditMethod, MethodConfig, Shape
from knowpatch.models.passes import Row
from knowpatch.models.roles import at_depth
from knowpatch.models.view import ModelView
from knowpatch.parts.tasks import ValueTask
from knowpatch.parts.values import Value, ValueSettings, optimise
from knowpatch.request import EditRequest

ROLE = "mlp.out"
CALIBRATION_TOKENS = 6_000
"""What the prompts to calibrate with come to, about."""


class AtEndConfig(MethodConfig):
    """Options of how values are optimised."""

    steps: int = Field(60, ge=2, description="steps of a value's optimisation, at most")
    learning_rate: float | None = Field(
        None, gt=0, description="of Adam on a value; by default from the value's size"
    )
    enough: float = Field(0.05, gt=0, description="stop when the target's mean NLL is below this")


class AtEnd(EditMethod):
    """A method with a value for each request, at its prompt's last token.

    Class attributes:
        depth: of the block, as a share of the model's.
    """

    family = "merged"
    roles = (ROLE,)
    depth: ClassVar[float]
    Config: ClassVar[type[AtEndConfig]] = AtEndConfig

    def layer(self, count: int) -> int:
        """The block, of a model that has `count`."""
        return at_depth(self.depth, count, getattr(self.config, "layer", None))

    def layers(self, count: int) -> tuple[int, ...]:
        return (self.layer(count),)

    def module(self, view: ModelView) -> str:
        """The map that answers."""
        return view.roles.linear(ROLE, self.layer(len(view.roles.blocks))).module

    def tasks(self, view: ModelView, requests: Sequence[EditRequest]) -> list[ValueTask]:
        """The requests' prompts with their targets, changed at the prompt's end."""
        found = []
        for request in requests:
            prompt, target = self.encode(view, request)
            row = Row((*prompt.ids, *target[:-1]), len(prompt.ids) - 1, len(prompt.ids))
            found.append(ValueTask(target, (row,)))
        return found

    def values(self, view: ModelView, tasks: Sequence[ValueTask]) -> list[Value]:
        """What the map must put out for the targets to follow."""
        settings = ValueSettings(
            steps=self.config.steps,
            learning_rate=self.config.learning_rate,
            clamp=None,
            weight_decay=0.0,
            kl_factor=0.0,
            enough=self.config.enough,
        )
        return optimise(view, [self.module(view)], tasks, settings, self.progress)

    def cost(self, shape: Shape, lengths: Sequence[int]) -> Cost:
        tokens = self.config.steps * sum(lengths)
        return Cost(tokens, tokens)
