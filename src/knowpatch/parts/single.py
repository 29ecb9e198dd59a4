"""Facts written exactly into one layer: ROME's form (Meng et al., arXiv 2202.05262, equation 2).

The value is optimised at the MLP's own output, and of all changes that give it at the fact's key
(or keys) the one that moves ordinary keys least is taken. Facts whose keys nearly coincide are
written one after the other. Axes: C contexts, N keys, D hidden, I inner size of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from knowpatch.deltas import WeightDelta
from knowpatch.method import Preparation, Shape
from knowpatch.models.passes import Tap
from knowpatch.models.roles import at_depth
from knowpatch.models.view import ModelView
from knowpatch.parts.located import Located, LocatedConfig, traced
from knowpatch.parts.solve import Factors, Form, apart, gain, ridged, update
from knowpatch.parts.stabilise import joined
from knowpatch.parts.tasks import ValueTask
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

DEPTH = 5 / 30
"""The published layer (5 of 28 to 32 blocks) as a share of the depth."""


LEAST_GAIN = 0.5
"""Share of the change that must arrive at the bare prompt's own key."""


class SingleConfig(LocatedConfig):
    """Options of the methods that write into one layer."""

    layer: int | None = Field(None, ge=0, description="block to edit; by default 1/6 of the depth")
    ridge: float = Field(0.1, ge=0, description="ridge on the statistics, in median variances")
    moments: Literal["text", "identity"] = Field(
        "text", description="key statistics from text, or the identity (nothing to prepare)"
    )


@dataclass(frozen=True, eq=False)
class Prepared:
    """Context prefixes, the layer, the form of its key statistics, and what options ask for."""

    contexts: tuple[str, ...]
    layer: int
    form: Form
    anchor: float | None
    guard_IR: Tensor | None


@dataclass(frozen=True, eq=False)
class Asked:
    """What one fact asks: at each of its keys (I, N) the residual (D) is to be added."""

    keys_IN: Tensor
    residual_D: Tensor


@dataclass(frozen=True, eq=False)
class Read:
    """What the map does for one fact now: keys (C, I) and outputs (C, D), bare first; delta (D)."""

    keys_CI: Tensor
    outputs_CD: Tensor
    delta_D: Tensor


def averaged(read: Read) -> Asked:
    """The value at the key averaged over all contexts (R-ROME)."""
    residual_D = read.outputs_CD[0] + read.delta_D - read.outputs_CD.mean(0)
    return Asked(read.keys_CI.mean(0)[:, None], residual_D)


def reached(read: Read, form: Form) -> Asked:
    """The value at the averaged key, where that reaches the bare prompt, too.

    Where the subject opens the prompt, its key there can be foreign to its keys behind other text
    (the first positions are the attention sink's): the averaged key then says nothing of the prompt
    itself. If less than LEAST_GAIN of the change would arrive there, the residual is written at
    both keys; it is the same one, so the change is still of rank one.
    """
    bare_I = read.keys_CI[0]
    if gain(bare_I, read.keys_CI.mean(0), form) >= LEAST_GAIN:
        return averaged(read)
    return Asked(torch.stack([read.keys_CI[1:].mean(0), bare_I], dim=1), read.delta_D)


class Single(Located):
    """A method that writes facts into one layer."""

    Config: ClassVar[type[SingleConfig]] = SingleConfig

    def asked(self, read: Read, form: Form) -> Asked:
        """At which keys a fact is to be written, and what is to be added there."""
        return reached(read, form)

    def factors(self, reads: Sequence[Read], form: Form) -> Factors:
        """The change that writes these facts."""
        asked = [self.asked(read, form) for read in reads]
        return update(
            torch.stack([one.residual_D for one in asked], dim=1),
            torch.cat([one.keys_IN for one in asked], dim=1),
            form,
            slack=0.0,
            owner_N=torch.tensor([i for i, one in enumerate(asked) for _ in one.keys_IN.T]),
        )

    def layers(self, count: int) -> tuple[int, ...]:
        return (at_depth(DEPTH, count, self.config.layer),)

    def prepare(self, view: ModelView) -> Prepared:
        (layer,) = self.layers_of(view)
        if self.config.moments == "identity":
            form = Form.even(1.0, view.base(self.role(view, layer)).shape[1])
        else:
            form = Form.of(ridged(self.statistics(view, [layer])[layer], self.config.ridge))
        return Prepared(
            self.contexts(view), layer, form, self.anchor(view), self.guard(view, layer)
        )

    def fold(self, prepared: Prepared, state: Factors | None, patch: Patch) -> Factors | None:
        """The sum of the changes, if it is restrained."""
        change = traced(patch, prepared.layer)
        return state if change is None else joined(state, change)

    def edit(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        prepared: Prepared,
        state: Factors | None,
    ) -> Patch:
        layer, form = prepared.layer, prepared.form
        tasks = [self.task(view, request, prepared.contexts) for request in requests]
        bare_IN = torch.stack([fact.bare_I for fact in self.read(view, layer, tasks)], dim=1)
        deltas: list[WeightDelta] = []
        done: Factors | None = None
        # Facts with nearly the same key cannot be solved for at once: the later ones are computed
        # on the model as edited so far.
        for wave in apart(bare_IN, form):
            with view.trying(deltas):
                mine = [requests[i] for i in wave], [tasks[i] for i in wave]
                factors = self.factors(self._reads(view, *mine, prepared), form)
                earlier = state if done is None else joined(state, done)
                change = self._change(view, factors, earlier, prepared)
            deltas.append(change)
            done = joined(done, factors)
        assert done is not None
        return self.patch(view, requests, deltas=deltas, traces=self.traces(layer, done))

    def edit_each(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        prepared: Prepared,
        state: Factors | None,
    ) -> list[Patch]:
        tasks = [self.task(view, request, prepared.contexts) for request in requests]
        patches = []
        reads = self._reads(view, requests, tasks, prepared)
        for request, read in zip(requests, reads, strict=True):
            factors = self.factors([read], prepared.form)
            change = self._change(view, factors, state, prepared)
            traces = self.traces(prepared.layer, factors)
            patches.append(self.patch(view, [request], deltas=[change], traces=traces))
        return patches

    def _change(
        self, view: ModelView, factors: Factors, earlier: Factors | None, prepared: Prepared
    ) -> WeightDelta:
        return self.change(
            view, prepared.layer, factors, earlier=earlier, guard_IR=prepared.guard_IR
        )

    def _reads(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        tasks: Sequence[ValueTask],
        prepared: Prepared,
    ) -> list[Read]:
        """What the map does for each fact, on the model as edited so far, and what to add."""
        values = self.values(view, tasks, self.terms(view, requests, prepared))
        deltas = self.anchored(view, requests, tasks, values, prepared.anchor)
        out = Tap(self.value_modules(view)[0], "output")
        facts = self.read(view, prepared.layer, tasks, [out])
        return [
            Read(fact.keys_CI, fact.outputs[out], delta_D)
            for fact, delta_D in zip(facts, deltas, strict=True)
        ]

    def preparations(self, shape: Shape) -> list[Preparation]:
        items = super().preparations(shape)
        return items if self.config.moments == "text" else items[:1]
