"""One residual spread over several layers: MEMIT's loop (arXiv 2210.07229, algorithm 1).

What each fact wants is optimised at the last layer. From the first layer to the last, the gap that
is still open there is measured, a share of it (1 of the layers left) becomes the residual at this
layer's keys, and the change that writes it is in force when the next layer is looked at. Methods
differ in what a change should leave alone (parts/keep.py), in what is optimised, and in the share.
Axes: N facts, D hidden, I inner size of the MLP.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from knowpatch.deltas import WeightDelta
from knowpatch.models.passes import Shift, Tap
from knowpatch.models.view import ModelView
from knowpatch.parts.depths import Layers, between
from knowpatch.parts.facts import Fact
from knowpatch.parts.keep import Keep, Ridge, for_gain
from knowpatch.parts.located import Located, LocatedConfig, traced
from knowpatch.parts.pilots import pilots
from knowpatch.parts.solve import Factors, Form, energies, ridged
from knowpatch.parts.stabilise import joined
from knowpatch.parts.tasks import ValueTask
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

ADDS = 1e-3
"""Largest relative difference at which a map's output counts as added as it is."""

PILOTS = 40
"""Pilot facts whose keys say how strong a change has to be on this model."""


class SpreadConfig(LocatedConfig):
    """Options of the methods that write into several layers."""

    overruled: ClassVar[Mapping[str, str]] = {"gain": "weight"}

    layers: Layers | None = Field(
        None, description="blocks, [4,5,6] or 4-8; by default a share of the depth"
    )
    key: Literal["grouped", "both"] = Field(
        "grouped", description="a fact's key: bare and other contexts averaged, or both of them"
    )
    memory: bool = Field(True, description="leave alone what live edits of this method wrote")
    gain: float = Field(
        0.5, gt=0, lt=1, description="share of a pilot fact's residual that a layer's solve writes"
    )
    weight: float | None = Field(
        None, gt=0, description="of what to leave alone, itself (lambda, L2), in place of gain"
    )
    clamp: float = Field(2.0, gt=0, description="how far the value may move, in its own length")


class WeighedConfig(SpreadConfig):
    """Options of the methods that weigh all of the key statistics."""

    ridge: float = Field(0.1, ge=0, description="ridge on the statistics, in median variances")


def weighed(second_II: Tensor, pilots_IN: Tensor, config: WeighedConfig) -> Ridge:
    """The key statistics, weighed so that pilot keys (I, N) have their gain: MEMIT's lambda C."""
    form = Form.of(ridged(second_II, config.ridge))
    return Ridge(form.scaled(config.weight or for_gain(energies(pilots_IN, form), config.gain)))


@dataclass(frozen=True, eq=False)
class Prepared:
    """Context prefixes, what to leave alone in each layer, and the anchor of values, if any."""

    contexts: tuple[str, ...]
    keeps: Mapping[int, Keep]
    anchor: float | None
    guards: Mapping[int, Tensor | None]


@dataclass(frozen=True, eq=False)
class Written:
    """What live edits wrote.

    Attributes:
        keeps: what is to be left alone now, by layer.
        facts: prompts and keys (I, .) by layer, oldest first.
        sums: of the changes of each layer, if these are restrained.
    """

    keeps: Mapping[int, Keep]
    facts: tuple[tuple[str, Mapping[int, Tensor]], ...] = ()
    sums: Mapping[int, Factors] = field(default_factory=dict)

    def keeping(self, prompt: str, keys: Mapping[int, Tensor]) -> Written:
        """With a fact that was written at these keys of each layer (I, .)."""
        keeps = {
            layer: keep.keeping(keys[layer]) if layer in keys else keep
            for layer, keep in self.keeps.items()
        }
        return replace(self, keeps=keeps, facts=(*self.facts, (prompt, keys)))


class Spread(Located):
    """A method that spreads residuals over several layers."""

    Config: ClassVar[type[SpreadConfig]] = SpreadConfig
    depths: ClassVar[tuple[float, float]] = (4 / 30, 8 / 30)
    """The first and the last published layer, as shares of the depth."""

    @abstractmethod
    def keep(self, second_II: Tensor, pilots_IN: Tensor) -> Keep:
        """What a change of one layer should leave alone, before any edit.

        Args:
            second_II: the second moment of its keys over text.
            pilots_IN: keys of pilot facts.
        """

    def share(self, layers_left: int) -> float:
        """The part of the open gap that a layer writes."""
        return 1 / layers_left

    def layers(self, count: int) -> tuple[int, ...]:
        if self.config.layers is not None:
            return tuple(self.config.layers)
        return between(self.depths, count)

    def written(self, view: ModelView) -> tuple[int, ...]:
        """The layers of this model that are written to.

        All of them where what a map puts out is added to the residual stream as it is. Where a norm
        comes in between (Gemma 2, OLMo 2) no gap further up can be divided among maps: the last.
        """
        layers = self.layers_of(view)
        return layers if adds(view, self.role(view, layers[-1]).module, layers[-1]) else layers[-1:]

    def value_modules(self, view: ModelView) -> tuple[str, ...]:
        return (self.gap_module(view),)

    def gap_module(self, view: ModelView) -> str:
        """Whose output is to move by the value: the last block's, or, behind a norm, the map's."""
        last = self.layers_of(view)[-1]
        out = self.role(view, last).module
        return view.roles.blocks[last].module if adds(view, out, last) else out

    # -- before an edit ----------------------------------------------------------------------------

    def prepare(self, view: ModelView) -> Prepared:
        contexts = self.contexts(view)
        second = self.statistics(view, self.layers_of(view))
        tasks = [self.task(view, request, contexts) for request in pilots(PILOTS)]
        keeps = {
            layer: self.keep(second[layer], self._keys(self.read(view, layer, tasks)))
            for layer in self.written(view)
        }
        guards = {layer: self.guard(view, layer) for layer in keeps}
        return Prepared(contexts, keeps, self.anchor(view), guards)

    def fold(self, prepared: Prepared, state: Written | None, patch: Patch) -> Written:
        written = state or Written(prepared.keeps)
        requests = patch.provenance.requests
        for number, request in enumerate(requests):
            keys = {
                layer: trace[owners(patch, len(trace)) == number].T
                for layer in prepared.keeps
                if self.config.memory and (trace := patch.traces.get(f"keys.{layer}")) is not None
            }
            written = written.keeping(request.prompt, keys)
        sums = dict(written.sums)
        for layer in prepared.keeps:
            if (change := traced(patch, layer)) is not None:
                sums[layer] = joined(sums.get(layer), change)
        return replace(written, sums=sums)

    def room(self, prepared: Prepared, state: Written | None) -> int | None:
        keeps = (state.keeps if state else prepared.keeps).values()
        return min((keep.room for keep in keeps if keep.room is not None), default=None)

    # -- an edit -----------------------------------------------------------------------------------

    def edit(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        prepared: Prepared,
        state: Written | None,
    ) -> Patch:
        tasks = [self.task(view, request, prepared.contexts) for request in requests]
        deltas_ND = self._deltas(view, requests, tasks, prepared)
        return self._write(view, requests, tasks, deltas_ND, prepared, state)

    def edit_each(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        prepared: Prepared,
        state: Written | None,
    ) -> list[Patch]:
        tasks = [self.task(view, request, prepared.contexts) for request in requests]
        deltas_ND = self._deltas(view, requests, tasks, prepared)
        return [
            self._write(view, [request], [task], delta_D[None], prepared, state)
            for request, task, delta_D in zip(requests, tasks, deltas_ND, strict=True)
        ]

    def _deltas(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        tasks: Sequence[ValueTask],
        prepared: Prepared,
    ) -> Tensor:
        """By what `gap_module`'s output should move at each bare prompt (N, D)."""
        values = self.values(view, tasks, self.terms(view, requests, prepared))
        return torch.stack(self.anchored(view, requests, tasks, values, prepared.anchor))

    def _write(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        tasks: Sequence[ValueTask],
        deltas_ND: Tensor,
        prepared: Prepared,
        state: Written | None,
    ) -> Patch:
        keeps = self._keeps(requests, prepared, state)
        now = Tap(self.gap_module(view), "output")
        wanted_ND: Tensor | None = None
        deltas: list[WeightDelta] = []
        traces: dict[str, Tensor] = {}
        for number, (layer, keep) in enumerate(keeps.items()):
            with view.trying(deltas):
                facts = self.read(view, layer, tasks, [now])
                keep = self.besides(view, layer, tasks, keep)
            # What is kept is what was solved with, to the last bit.
            keys_IN = self._keys(facts).float().double()
            output_ND = torch.stack([fact.outputs[now][0] for fact in facts])
            if wanted_ND is None:  # nothing is written yet
                wanted_ND = output_ND + deltas_ND
            gap_ND = wanted_ND - output_ND
            residuals_DN = self.share(len(keeps) - number) * gap_ND.T
            owner_N = torch.arange(len(facts)).repeat_interleave(keys_IN.shape[1] // len(facts))
            factors = keep.update(residuals_DN, keys_IN, owner_N)
            self.check_change(view, layer, factors, len(facts))
            # Later layers look at what was really written, whatever the options made of it.
            earlier = state.sums.get(layer) if state else None
            guard_IR = prepared.guards[layer]
            deltas.append(self.change(view, layer, factors, earlier=earlier, guard_IR=guard_IR))
            traces |= self.traces(layer, factors)
            if self.config.memory:
                traces[f"keys.{layer}"] = keys_IN.T.float().contiguous()
        return self.patch(view, requests, deltas=deltas, traces=traces)

    def besides(self, view: ModelView, layer: int, tasks: Sequence[ValueTask], keep: Keep) -> Keep:
        """What to leave alone in a layer besides, on the model as changed so far."""
        return keep

    def check_change(self, view: ModelView, layer: int, factors: Factors, facts: int) -> None:
        """Refuse a change of a layer that no edit should make."""

    def _keeps(
        self, requests: Sequence[EditRequest], prepared: Prepared, state: Written | None
    ) -> Mapping[int, Keep]:
        """What to leave alone: not what an earlier edit wrote for the same prompt."""
        if state is None:
            return prepared.keeps
        again = {request.prompt for request in requests}
        if not again & {prompt for prompt, _ in state.facts}:
            return state.keeps
        written = Written(prepared.keeps)
        for prompt, keys in state.facts:
            written = written if prompt in again else written.keeping(prompt, keys)
        return written.keeps

    def _keys(self, facts: Sequence[Fact]) -> Tensor:
        """The facts' keys (I, N), or two for each, after each other."""
        if self.config.key == "grouped":
            return torch.stack([fact.grouped_I for fact in facts], dim=1)
        keys = [key for fact in facts for key in fact.both()]
        return torch.stack(keys, dim=1)


def owners(patch: Patch, keys: int) -> Tensor:
    """Which request each key of a patch is of: as it says, else each of as many."""
    count = len(patch.provenance.requests)
    even_N = torch.arange(count).repeat_interleave(keys // count)
    return patch.traces.get("owners", even_N)


def adds(view: ModelView, module: str, layer: int) -> bool:
    """Whether what `module` puts out arrives in the output of its block as it is; tried once."""
    known = ("adds", module)
    if known not in view.probed:
        block = Tap(view.roles.blocks[layer].module, "output")
        places = [(0, 1)]
        plain = view.run([(1, 2, 3)], taps=[block]).at(block, places)
        # As large as what it is added to, or low precision would swallow it.
        shift_MD = plain.abs().mean() * torch.ones_like(plain)
        shifts = [Shift(module, places, shift_MD)]
        moved = view.run([(1, 2, 3)], taps=[block], shifts=shifts).at(block, places)
        apart = float((moved - plain - shift_MD).norm() / shift_MD.norm())
        holds = apart < view.limits.slack(ADDS)
        view.probed[known] = None if holds else f"what it puts out is {apart:.1g} off"
    return view.probed[known] is None
