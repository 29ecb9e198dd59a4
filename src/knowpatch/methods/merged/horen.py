"""HoReN: a codebook on the unit sphere, asked through one step of a Hopfield network.

Fang, Xie and Ran, "HoReN" (arXiv 2605.08143). As in GRACE an entry answers where a prompt is
recognised, but by the whole of it: its key is the mean of what enters the MLP output map of one
block over the last 60 % of the prompt's tokens. Queries are drawn towards the keys they are near to
before the nearest one's cosine is held against a threshold, and the entry's value is added to the
map's output at the prompt's last token (parts/kinds/hopfield.py).

Where this is not the published program: keys are centred by a mean, without which all prompts are
alike; the threshold is calibrated on the model; the value starts at nothing, and not at noise that
would be added; the bank has no dummy key (it could win, and block a match). A key that is near to
an older one with the same target is an entry of its own and does not retrain the other's value: a
patch holds only what is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from knowpatch.method import Preparation, Shape, register
from knowpatch.models.sites import muted
from knowpatch.models.view import ModelView
from knowpatch.parts.calibration import Asked, Calibration, calibrate, kept_at
from knowpatch.parts.ends import CALIBRATION_TOKENS, AtEnd, AtEndConfig
from knowpatch.parts.inputs import centre, read_inputs
from knowpatch.parts.kinds.hopfield import HOPFIELD, ending, hopfield, query, refined
from knowpatch.parts.nearest import Index
from knowpatch.patch import Patch
from knowpatch.request import EditRequest


class HorenConfig(AtEndConfig):
    """Options of HoReN."""

    layer: int | None = Field(None, ge=0, description="block; by default 29/32 of the depth")
    threshold: float | None = Field(
        None, gt=-1, lt=1, description="cosine above which an entry answers; by default calibrated"
    )


@dataclass(frozen=True, eq=False)
class _Prepared:
    mean_I: Tensor
    threshold: float
    calibration: Calibration | None


@register("horen")
class Horen(AtEnd):
    """Adds a value at the end of a prompt that is recognised as a whole."""

    name = "horen"
    paper = "Fang, Xie and Ran 2026, arXiv 2605.08143"
    summary = "a codebook on the unit sphere, asked by the mean of a prompt through a Hopfield step"
    choose = "thousands of exact fixes, asked in much the same words, with next to no side effects"
    depth = 29 / 32
    Config = HorenConfig

    def prepare(self, view: ModelView) -> _Prepared:
        mean_I = centre(view, self.module(view), self.progress)
        if self.config.threshold is not None:
            return _Prepared(mean_I, self.config.threshold, None)

        def keys(asked: Sequence[Asked]) -> Tensor:
            return self._keys(view, [one.prompt for one in asked], mean_I)

        def scores(queries_QI: Tensor, keys_NI: Tensor) -> Tensor:
            return refined(queries_QI, Index(keys_NI)) @ keys_NI.T

        reading = self._reading(self.layer(len(view.roles.blocks)))
        found = calibrate(view.fingerprint, reading, "similarity", keys, scores)
        return _Prepared(mean_I, found.threshold(), found)

    def _reading(self, layer: int) -> dict[str, Any]:
        return {"by": self.name, "layer": layer, "chat": self.config.chat}

    def _keys(self, view: ModelView, prompts: Sequence[str], mean_I: Tensor) -> Tensor:
        read = read_inputs(
            view, self.module(view), prompts, chat=self.config.chat, progress=self.progress
        )
        return query(torch.stack([ending(one.inputs_TI) for one in read]), mean_I)

    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: _Prepared, state: Any
    ) -> Patch:
        keys_NI, values_ND = self._entries(view, requests, prepared)
        return self._patch(view, requests, keys_NI, values_ND, prepared)

    def edit_each(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: _Prepared, state: Any
    ) -> list[Patch]:
        entries = zip(*self._entries(view, requests, prepared), strict=True)
        return [
            self._patch(view, [request], key_I[None], value_D[None], prepared)
            for request, (key_I, value_D) in zip(requests, entries, strict=True)
        ]

    def _patch(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        keys_NI: Tensor,
        values_ND: Tensor,
        prepared: _Prepared,
    ) -> Patch:
        wrap = hopfield(self.module(view), keys_NI, values_ND, prepared.mean_I, prepared.threshold)
        return self.patch(view, requests, wraps=[wrap])

    def _entries(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: _Prepared
    ) -> tuple[Tensor, Tensor]:
        """Keys (N, I) and values (N, D). Only one entry ever acts, so none does while training."""
        with muted(HOPFIELD):
            values = self.values(view, self.tasks(view, requests))
        keys_NI = self._keys(view, [request.prompt for request in requests], prepared.mean_I)
        return keys_NI, torch.stack([value.delta_D for value in values]).cpu()

    def shown(self, prepared: _Prepared) -> list[str]:
        found = prepared.calibration
        return [] if found is None else [found.told(prepared.threshold)]

    def preparations(self, shape: Shape) -> list[Preparation]:
        if self.config.threshold is not None:
            return []
        path = kept_at(shape.fingerprint, self._reading(self.layer(shape.layers)))
        return [Preparation("calibration of the threshold", path, CALIBRATION_TOKENS)]
