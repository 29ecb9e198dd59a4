"""What the locate-then-edit methods share: facts are written into the MLP output maps of blocks.

The key of a fact is what enters the map at the subject's last token, the value what a module should
put out there for the target to follow (parts/values.py); both are taken behind several contexts
(parts/prefixes.py). What text needs of the map is its key statistics (parts/moments.py).
Axes: C contexts, D hidden, I inner size of the MLP, N facts.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from knowpatch.deltas import Dense, WeightDelta
from knowpatch.errors import EditError
from knowpatch.files import kept_in, write_atomically
from knowpatch.method import Cost, Preparation, Shape
from knowpatch.models.passes import Tap
from knowpatch.models.view import ModelView
from knowpatch.parts import moments
from knowpatch.parts.pilots import pilots
from knowpatch.parts.solve import Factors
from knowpatch.parts.stabilise import anchor, anchored, kept_off, leading, rect, step
from knowpatch.parts.tasks import ValueTask
from knowpatch.parts.valued import ROLE, Valued, ValuedConfig
from knowpatch.parts.values import Value
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

log = logging.getLogger(__name__)

ANCHORS = 100
"""Pilot facts whose values say how long values should be."""


class LocatedConfig(ValuedConfig):
    """Options that the locate-then-edit methods share."""

    text: str | None = Field(
        None, description="for key statistics: file, folder, hub dataset, or self (the model's own)"
    )
    tokens: int = Field(20_000, ge=100, description="tokens of text for the key statistics")
    anchor: Literal["scale", "cap"] | None = Field(
        None, description="scale: values as long as pilot edits' (NAS); cap: never longer"
    )
    sparse: float | None = Field(
        None, gt=0, le=1, description="share of the change's entries to keep (RECT); makes it dense"
    )
    protect: float | None = Field(
        None, gt=0, lt=1, description="share of the map's energy to leave alone (SPHERE)"
    )
    restrain: float | None = Field(
        None, gt=1, description="hold the sum of such edits below the map's norm: log base (PRUNE)"
    )


class Located(Valued):
    """A method that writes facts into the MLP output map of some blocks."""

    family = "intrinsic"
    exports = ("merged", "peft", "gguf", "gguf-lora")
    Config: ClassVar[type[LocatedConfig]] = LocatedConfig

    # -- statistics --------------------------------------------------------------------------------

    def statistics(self, view: ModelView, layers: Sequence[int]) -> dict[int, Tensor]:
        """The second moment of keys over text (I, I), float64, of each of these layers."""
        found = moments.key_moments(
            view,
            ROLE,
            layers,
            text=self.config.text,
            tokens=self.config.tokens,
            seed=self.seed,
            progress=self.progress,
        )
        return {layer: moment.mean() for layer, moment in found.items()}

    # -- stabilisers -------------------------------------------------------------------------------

    def anchor(self, view: ModelView) -> float | None:
        """The norm that values of pilot edits have, if values are to be anchored (NAS)."""
        if self.config.anchor is None:
            return None
        path = self._anchor_path(view.fingerprint)
        with contextlib.suppress(OSError, ValueError):
            return float(json.loads(path.read_text()))
        tasks = [self.task(view, request, ("",)) for request in pilots(ANCHORS)]
        values = self.values(view, tasks)
        outputs = self._mlp_outputs(view, tasks)
        norms = [
            (output_D + value.delta_D.cpu().double()).norm()
            for output_D, value in zip(outputs, values, strict=True)
        ]
        norm, error = anchor(torch.stack(norms))
        log.info("values are anchored at a norm of %.3g (standard error %.2g)", norm, error)
        write_atomically(path, json.dumps(norm).encode())
        return norm

    def _anchor_path(self, fingerprint: str) -> Path:
        asked = [(request.prompt, request.target) for request in pilots(ANCHORS)]
        place = json.dumps([fingerprint, self.name, self.config.model_dump_json(), asked])
        return kept_in("anchors", place, ".json")

    def anchored(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        tasks: Sequence[ValueTask],
        values: Sequence[Value],
        norm: float | None,
    ) -> list[Tensor]:
        """The values' changes (D each), float64, brought to the anchor."""
        deltas = [value.delta_D.cpu().double() for value in values]
        if norm is None:
            return deltas
        outputs = self._mlp_outputs(view, tasks)
        cap = self.config.anchor == "cap"
        found = []
        for request, output_D, delta_D in zip(requests, outputs, deltas, strict=True):
            changed_D = anchored(output_D, delta_D, norm, cap=cap)
            if changed_D is None:
                raise EditError(
                    f"the value of {request.prompt!r} is more than twice as long as those of pilot "
                    "edits: use a smaller clamp or learning_rate, or leave out this fact"
                )
            found.append(changed_D)
        return found

    def _mlp_outputs(self, view: ModelView, tasks: Sequence[ValueTask]) -> list[Tensor]:
        """What the last layer's MLP puts out at each bare prompt (D each), float64."""
        return self.outputs(view, self.role(view, self.layers_of(view)[-1]).module, tasks)

    def outputs(self, view: ModelView, module: str, tasks: Sequence[ValueTask]) -> list[Tensor]:
        """What a module at the last layer puts out at each bare prompt (D each), float64."""
        tap = Tap(module, "output")
        bare = [replace(task, contexts=task.contexts[:1], own=None) for task in tasks]
        facts = self.read(view, self.layers_of(view)[-1], bare, [tap])
        return [fact.outputs[tap][0] for fact in facts]

    def change(
        self,
        view: ModelView,
        layer: int,
        factors: Factors,
        *,
        earlier: Factors | None,
        guard_IR: Tensor | None,
    ) -> WeightDelta:
        """A change of a layer's map from its factors, as the options want it.

        Args:
            earlier: the sum of what live edits of this method computed for the layer (`traced`).
            guard_IR: directions that are not to be read (`guard`).
        """
        role = self.role(view, layer)
        left_DF, right_FI = factors
        if self.config.restrain is not None:
            base_DI = view.base(role).cpu().double()
            left_DF, right_FI = step(factors, earlier, base_DI, self.config.restrain)
        if guard_IR is not None:
            right_FI = kept_off(right_FI, guard_IR)
        if self.config.sparse is not None:
            weight_DI = view.weight(role).cpu().double()
            whole = rect(left_DF @ right_FI, weight_DI, self.config.sparse)
            return self.delta(view, role.address, Dense(role.oriented(whole).float().contiguous()))
        return self.delta(view, role.address, role.factored(left_DF, right_FI))

    def guard(self, view: ModelView, layer: int) -> Tensor | None:
        """Directions that no change of a layer may read from, if the map is protected."""
        if self.config.protect is None:
            return None
        return leading(view.base(self.role(view, layer)).cpu().double(), self.config.protect)

    def traces(self, layer: int, factors: Factors) -> dict[str, Tensor]:
        """What later edits have to know of a change, if its sum with theirs is restrained."""
        if self.config.restrain is None:
            return {}
        left_DF, right_FI = (factor.float().contiguous() for factor in factors)
        return {f"left.{layer}": left_DF, f"right.{layer}": right_FI}

    # -- before an edit ----------------------------------------------------------------------------

    def preparations(self, shape: Shape) -> list[Preparation]:
        items = super().preparations(shape)
        items += moments.preparations(
            shape,
            ROLE,
            self.layers(shape.layers),
            text=self.config.text,
            tokens=self.config.tokens,
            seed=self.seed,
        )
        if self.config.anchor is not None:
            tokens = ANCHORS * 30 * self.config.steps
            items.append(Preparation("anchor", self._anchor_path(shape.fingerprint), tokens))
        return items

    def cost(self, shape: Shape, lengths: Sequence[int]) -> Cost:
        blocks = len(self.layers(shape.layers))
        extra = 3 * blocks * 8 * shape.inner**2
        return replace(super().cost(shape, lengths), extra_bytes=extra)


def traced(patch: Patch, layer: int) -> Factors | None:
    """What an edit computed for a layer, before its sum with earlier ones was restrained."""
    if f"left.{layer}" not in patch.traces:
        return None
    return patch.traces[f"left.{layer}"].double(), patch.traces[f"right.{layer}"].double()
