"""GRACE: a codebook that answers for one block where a prompt is recognised.

Hartvigsen et al., "Aging with GRACE" (arXiv 2211.11031). An entry holds a key (what enters the MLP
output map of one block at the prompt's last token), a value and a radius. A prompt whose key lies
inside a radius gets the stored value as the map's output at that token; every other prompt runs as
before, bit for bit. Radii grow, and are split, as the entries are folded (parts/memory.py), so that
undoing an edit gives its neighbours their radii back. How far a new entry reaches is calibrated on
the model (parts/calibration.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from knowpatch.method import Preparation, Shape, register
from knowpatch.models.view import ModelView
from knowpatch.parts.calibration import Asked, Calibration, calibrate, kept_at
from knowpatch.parts.ends import CALIBRATION_TOKENS, AtEnd, AtEndConfig
from knowpatch.parts.inputs import read_ends
from knowpatch.parts.kinds.codebook import codebook
from knowpatch.parts.memory import MARGIN, Memory
from knowpatch.patch import Patch
from knowpatch.request import EditRequest


class GraceConfig(AtEndConfig):
    """Options of GRACE."""

    layer: int | None = Field(None, ge=0, description="block; by default 27/32 of the depth")
    radius: float | None = Field(
        None, gt=0, description="of a new entry; by default calibrated on the model"
    )


@dataclass(frozen=True)
class _Prepared:
    radius: float
    calibration: Calibration | None


@register("grace")
class Grace(AtEnd):
    """Answers beside one MLP, where a key is recognised."""

    name = "grace"
    paper = "Hartvigsen et al. 2023, arXiv 2211.11031"
    summary = "a codebook on one block: recognised prompts get a stored value, others nothing"
    choose = "many exact fixes with next to no side effects, where rewordings need not follow"
    depth = 27 / 32
    Config = GraceConfig

    def prepare(self, view: ModelView) -> _Prepared:
        if self.config.radius is not None:
            return _Prepared(self.config.radius, None)

        def keys(asked: Sequence[Asked]) -> Tensor:
            return self._keys(view, [one.prompt for one in asked])

        reading = self._reading(self.layer(len(view.roles.blocks)))
        found = calibrate(view.fingerprint, reading, "distance", keys, torch.cdist)
        # A ball holds its edge.
        return _Prepared(found.threshold() * (1 - MARGIN), found)

    def _reading(self, layer: int) -> dict[str, Any]:
        return {"by": self.name, "layer": layer, "chat": self.config.chat}

    def _keys(self, view: ModelView, prompts: Sequence[str]) -> Tensor:
        """What enters the map at the prompts' last tokens."""
        module, chat = self.module(view), self.config.chat
        return read_ends(view, module, prompts, self.progress, chat=chat).cpu()

    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: _Prepared, state: Any
    ) -> Patch:
        entries = self._entries(view, requests, prepared)
        return self.patch(view, requests, wraps=[codebook(self.module(view), entries)])

    def edit_each(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: _Prepared, state: Any
    ) -> list[Patch]:
        module, entries = self.module(view), self._entries(view, requests, prepared)
        return [
            self.patch(view, [request], wraps=[codebook(module, [entry])])
            for request, entry in zip(requests, entries, strict=True)
        ]

    def _entries(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: _Prepared
    ) -> list[Memory]:
        """Each request's entry, a memory of one."""
        tasks = self.tasks(view, requests)
        values = self.values(view, tasks)
        keys_NI = self._keys(view, [request.prompt for request in requests])
        return [
            Memory(
                keys_NI=key_I[None],
                values_ND=(value.clean_D + value.delta_D)[None].cpu(),
                radii_N=torch.tensor([prepared.radius]),
                labels=(task.target,),
            )
            for key_I, value, task in zip(keys_NI, values, tasks, strict=True)
        ]

    def shown(self, prepared: _Prepared) -> list[str]:
        found = prepared.calibration
        return [] if found is None else [found.told(prepared.radius)]

    def preparations(self, shape: Shape) -> list[Preparation]:
        if self.config.radius is not None:
            return []
        path = kept_at(shape.fingerprint, self._reading(self.layer(shape.layers)))
        return [Preparation("calibration of the radius", path, CALIBRATION_TOKENS)]
