"""GRACE: a codebook that answers for one block where a prompt is recognised.

Hartvigsen et al., "Aging with GRACE" (arXiv 2211.11031). An entry holds a key (what enters the MLP
output map of one block at the prompt's last token), a value and a radius. A prompt whose key lies
inside a radius gets the stored value as the map's output at that token; every other prompt runs as
before, bit for bit. Radii grow, and are split, as the entries are folded (parts/memory.py), so that
undoing an edit gives its neighbours their radii back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field

from knowpatch.method import Cost, EditMethod, MethodConfig, Preparation, Shape, register
from knowpatch.models.passes import Row, Tap
from knowpatch.models.roles import LinearRole, at_depth
from knowpatch.models.view import ModelView
from knowpatch.parts import scope
from knowpatch.parts.kinds.codebook import codebook
from knowpatch.parts.memory import Memory
from knowpatch.parts.tasks import ValueTask
from knowpatch.parts.values import ValueSettings, optimise
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

DEPTH = 27 / 32
"""The published layer (27 of 32 blocks) as a share of the depth."""

CALIBRATION_TOKENS = 5_000
"""What the prompts to measure with come to, about."""


class GraceConfig(MethodConfig):
    """Options of GRACE."""

    layer: int | None = Field(None, ge=0, description="block; by default 27/32 of the depth")
    radius: float | None = Field(
        None, gt=0, description="of a new entry; by default from how far prompts lie apart"
    )
    steps: int = Field(60, ge=2, description="steps of a value's optimisation, at most")
    learning_rate: float | None = Field(
        None, gt=0, description="of Adam on a value; by default from the value's size"
    )
    enough: float = Field(0.05, gt=0, description="stop when the target's mean NLL is below this")


@dataclass(frozen=True)
class _Prepared:
    radius: float


@register("grace")
class Grace(EditMethod):
    """Answers beside one MLP, where a key is recognised."""

    name = "grace"
    family = "merged"
    paper = "Hartvigsen et al. 2023, arXiv 2211.11031"
    summary = "a codebook on one block: recognised prompts get a stored value, others nothing"
    choose = "many exact fixes with next to no side effects, where rewordings need not follow"
    roles = ("mlp.out",)
    Config = GraceConfig

    def layers(self, count: int) -> tuple[int, ...]:
        return (at_depth(DEPTH, count, self.config.layer),)

    def prepare(self, view: ModelView) -> _Prepared:
        if self.config.radius is not None:
            return _Prepared(self.config.radius)
        (layer,) = self.layers(len(view.roles.blocks))
        found = scope.key_scope(view, "mlp.out", layer, self.progress)
        return _Prepared(0.5 * min(found.near, found.far))

    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: _Prepared, state: Any
    ) -> Patch:
        module = self._role(view).module
        entries = [entry for _, entry in self._entries(view, module, requests, prepared)]
        return self.patch(view, requests, wraps=[codebook(module, entries)])

    def edit_each(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: _Prepared, state: Any
    ) -> list[Patch]:
        module = self._role(view).module
        return [
            self.patch(view, [request], wraps=[codebook(module, [entry])])
            for request, entry in self._entries(view, module, requests, prepared)
        ]

    def _entries(
        self,
        view: ModelView,
        module: str,
        requests: Sequence[EditRequest],
        prepared: _Prepared,
    ) -> list[tuple[EditRequest, Memory]]:
        """Each request with its entry, a memory of one."""
        tasks = [self._task(view, request) for request in requests]
        values = optimise(view, [module], tasks, self._settings(), self.progress)
        prompts = [task.contexts[0] for task in tasks]
        tap = Tap(module, "input")
        run = view.run([row.ids[: row.position + 1] for row in prompts], taps=[tap])
        keys_NI = run.at(tap, [(i, row.position) for i, row in enumerate(prompts)]).cpu()
        return [
            (
                request,
                Memory(
                    keys_NI=key_I[None],
                    values_ND=(value.clean_D + value.delta_D)[None].cpu(),
                    radii_N=torch.tensor([prepared.radius]),
                    labels=(task.target,),
                ),
            )
            for request, key_I, value, task in zip(requests, keys_NI, values, tasks, strict=True)
        ]

    def _task(self, view: ModelView, request: EditRequest) -> ValueTask:
        prompt, target = self.encode(view, request)
        row = Row((*prompt.ids, *target[:-1]), len(prompt.ids) - 1, len(prompt.ids))
        return ValueTask(target, (row,))

    def _settings(self) -> ValueSettings:
        return ValueSettings(
            steps=self.config.steps,
            learning_rate=self.config.learning_rate,
            clamp=None,
            weight_decay=0.0,
            kl_factor=0.0,
            enough=self.config.enough,
        )

    def _role(self, view: ModelView) -> LinearRole:
        return view.roles.linear(
            "mlp.out", at_depth(DEPTH, len(view.roles.blocks), self.config.layer)
        )

    def preparations(self, shape: Shape) -> list[Preparation]:
        if self.config.radius is not None:
            return []
        path = scope.kept_at(
            shape.fingerprint, "mlp.out", at_depth(DEPTH, shape.layers, self.config.layer)
        )
        return [Preparation("how far apart prompts lie", path, CALIBRATION_TOKENS)]

    def cost(self, shape: Shape, lengths: Sequence[int]) -> Cost:
        tokens = self.config.steps * sum(lengths)
        return Cost(tokens, tokens)
