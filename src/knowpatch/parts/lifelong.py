"""Lifelong normalisation: edits without a subject, by the gradients of their own answers.

The answers of a call are one turn. At every answer token t an edited map has an input h_t and the
gradient g_t of the loss at its output. Both are normalised by all that turns have seen so far, this
one included, and what the map should add at h_t is v_t = -eta |h^_t|^2 g^_t. The change is

    delta W^T = (H^T H + alpha I)^-1 H^T V          (MALMEN's solve, arXiv 2311.04661)

with the inputs as they are; rounds on the same facts add to V, and one that raises the loss is
taken again from where it began, half as far. Statistics are means and sums of squared deviations,
merged by Chan's formula, which knows no order: a patch carries what its own turn adds, the state is
folded from the live patches, and a turn that is dropped was never seen.

Axes: T answer tokens, I and O width of a map's input and output, R rows of a root, F either width.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from knowpatch.deltas import WeightDelta
from knowpatch.errors import EditError
from knowpatch.files import kept_in, write_atomically
from knowpatch.method import Cost, EditMethod, MethodConfig, Preparation, Shape
from knowpatch.models.roles import LinearRole
from knowpatch.models.view import ModelView
from knowpatch.parts.depths import Layers, between
from knowpatch.parts.gradients import Gradients
from knowpatch.parts.pilots import pilots
from knowpatch.parts.seen import Running, Scale, State, Step, merged, seen_in, traces_of
from knowpatch.patch import Patch
from knowpatch.request import EditRequest, read_requests

VERSION = 1
"""Of what `prepare` keeps."""

PILOTS, NOTHING = "pilots", "none"

UP, GATE, OUT = "mlp.up", "mlp.gate", "mlp.out"


def blocks(first: int, last: int) -> tuple[int, ...]:
    return tuple(range(first, last + 1))


def published(**more: Any) -> dict[str, Any]:
    """The settings that were published for every model, and what is given of one."""
    same = {"eta": 1e-6, "alpha": 1.0, "rounds": 1, "loss": "mean", "warmup": NOTHING}
    return {**same, **more}


Depths = tuple[tuple[str, float, float], ...]


class LifelongConfig(MethodConfig):
    """Options of lifelong normalisation."""

    overruled: ClassVar[Mapping[str, str]] = {"gain": "eta", "slack": "alpha"}

    gate: Layers | None = Field(
        None, description="blocks whose gate map is edited, [4,5] or 4-8; none given: by depth"
    )
    up: Layers | None = Field(None, description="blocks whose up map is edited")
    out: Layers | None = Field(None, description="blocks whose output map is edited")
    gain: float = Field(
        5.0, gt=0, description="nats that a round adds to a usual answer token, to first order"
    )
    eta: float | None = Field(
        None, ge=0, description="step size, itself (published: 1e-6); by default from gain"
    )
    slack: float = Field(
        0.1, gt=0, description="alpha, in squared lengths of a usual input of the map"
    )
    alpha: float | None = Field(
        None, gt=0, description="of the solve, itself (published: 1); by default from slack"
    )
    micro: int = Field(10, ge=1, description="facts in one pass")
    loss: Literal["sum", "mean"] = Field(
        "sum", description="over the tokens of a pass; mean: a gradient depends on who shares it"
    )
    rounds: int = Field(12, ge=1, le=1000, description="steps on the same facts, at most")
    enough: float = Field(0.5, ge=0, description="stop when the answers' mean NLL is below this")
    warmup: str = Field(
        PILOTS, description="facts that statistics start from: pilots, none, or a file of requests"
    )


# -- the method ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """A prompt and its answer, as ids."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]


Rows = Mapping[str, tuple[Tensor, Tensor]]
"""By map: inputs (T, I) and gradients (T, O) at the answer tokens, on the CPU."""


class Lifelong(EditMethod):
    """A method that normalises token gradients by all it has seen."""

    family = "intrinsic"
    exports = ("merged", "peft", "gguf", "gguf-lora")
    Config: ClassVar[type[LifelongConfig]] = LifelongConfig
    root: ClassVar[bool] = False
    """Whether the gradients' covariance is kept, too."""
    depths: ClassVar[Depths]
    """Roles, with the first and the last block of each, as shares of the depth."""

    @abstractmethod
    def scale(self, gradients: Running) -> Scale:
        """How gradients are brought to one scale."""

    # -- what is edited ----------------------------------------------------------------------------

    def places(self, count: int) -> tuple[tuple[str, int], ...]:
        """Roles and blocks to edit of a model that has `count` blocks."""
        if given := self._given():
            return tuple((role, block) for role, blocks in given.items() for block in blocks)
        found = []
        for role, first, last in self.depths:
            found += [(role, block) for block in between((first, last), count)]
        return tuple(found)

    def layers(self, count: int) -> tuple[int, ...]:
        return tuple(sorted({block for _, block in self.places(count)}))

    def _given(self) -> dict[str, tuple[int, ...]]:
        named = {GATE: self.config.gate, UP: self.config.up, OUT: self.config.out}
        return {role: blocks for role, blocks in named.items() if blocks}

    def wanted_roles(self) -> tuple[str, ...]:
        return tuple(self._given()) or self.roles

    def maps(self, view: ModelView) -> dict[str, LinearRole]:
        """The maps to edit, by name. Where a block has no gate, up does its work."""
        found = {}
        for role, block in self.places(len(view.roles.blocks)):
            there = role if self._given() or not view.roles.lacks(role) else UP
            found[f"{there}.{block}"] = view.roles.linear(there, block)
        return found

    # -- reading -----------------------------------------------------------------------------------

    def answers(self, view: ModelView, requests: Sequence[EditRequest]) -> list[Answer]:
        pairs = [self.encode(view, request) for request in requests]
        return [Answer(prompt.ids, target) for prompt, target in pairs]

    def read(
        self, view: ModelView, maps: Mapping[str, LinearRole], answers: Sequence[Answer]
    ) -> tuple[float, Rows]:
        """The answers' mean NLL per token, and each map's rows, on the model as it is now."""
        gradients = Gradients(view, list(dict.fromkeys(role.module for role in maps.values())))
        total, tokens = 0.0, 0
        found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in maps}
        for start in range(0, len(answers), self.config.micro):
            part = answers[start : start + self.config.micro]
            rows = [(*a.prompt, *a.target[:-1]) for a in part]
            spots = [
                (row, len(a.prompt) - 1 + i)
                for row, a in enumerate(part)
                for i in range(len(a.target))
            ]
            labels = [token for a in part for token in a.target]
            weight = 1 / len(labels) if self.config.loss == "mean" else 1.0
            prompts = [len(a.prompt) for a in part]
            loss, at = gradients.of(rows, spots, labels, [weight] * len(labels), prompts=prompts)
            total, tokens = total + loss / weight, tokens + len(labels)
            for name, role in maps.items():
                both = at[role.module]
                # Of a fused map, the part of its outputs that the role is.
                mine_TO = role.address.narrow(both.gradients_MO.T).T
                found[name].append((both.inputs_MI.cpu(), mine_TO.cpu()))
        if not total < float("inf"):
            raise EditError(
                "the loss of these answers is not finite: use a smaller gain, or load the model "
                "in float32"
            )
        joined = {
            name: (torch.cat([h for h, _ in parts]), torch.cat([g for _, g in parts]))
            for name, parts in found.items()
        }
        return total / tokens, joined

    # -- before an edit ----------------------------------------------------------------------------

    def warmup(self) -> tuple[EditRequest, ...]:
        """The facts that statistics start from."""
        if self.config.warmup == NOTHING:
            return ()
        if self.config.warmup == PILOTS:
            return pilots()
        return tuple(read_requests(self.config.warmup))

    def prepare(self, view: ModelView) -> State:
        facts = self.warmup()
        if not facts:
            return {}
        path = self._kept_at(view.fingerprint, len(view.roles.blocks), facts)
        try:
            return seen_in(load(path.read_bytes()))
        except (OSError, KeyError, SafetensorError):
            pass
        self.progress("reading facts to start from", 0, len(facts))
        _, rows = self.read(view, self.maps(view), self.answers(view, facts))
        traces = self.traces(rows)
        write_atomically(path, save(traces))
        self.progress("reading facts to start from", len(facts), len(facts))
        return seen_in(traces)

    def traces(self, rows: Rows) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, (inputs_TI, gradients_TO) in rows.items():
            found |= traces_of(name, inputs_TI, gradients_TO, self.root)
        return found

    def _kept_at(self, fingerprint: str, blocks: int, facts: Sequence[EditRequest]) -> Path:
        asked = [(fact.prompt, fact.target) for fact in facts]
        how = (self.config.chat, self.config.loss, self.config.micro, self.root)
        content = json.dumps([VERSION, fingerprint, self.places(blocks), *how, asked])
        return kept_in("lifelong", content, ".safetensors")

    def fold(self, prepared: State, state: State | None, patch: Patch) -> State:
        return merged(prepared if state is None else state, seen_in(patch.traces))

    def preparations(self, shape: Shape) -> list[Preparation]:
        facts = self.warmup()
        if not facts:
            return []
        path = self._kept_at(shape.fingerprint, shape.layers, facts)
        return [Preparation(f"gradients of {len(facts)} facts", path, 3 * 16 * len(facts))]

    def cost(self, shape: Shape, lengths: Sequence[int]) -> Cost:
        tokens = self.config.rounds * sum(lengths)
        maps = len(self.places(shape.layers))
        return Cost(tokens, tokens, extra_bytes=4 * maps * shape.hidden * shape.inner)

    # -- an edit -----------------------------------------------------------------------------------

    def edit(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        prepared: State,
        state: State | None,
    ) -> Patch:
        maps, answers = self.maps(view), self.answers(view, requests)
        loss, rows = self.read(view, maps, answers)
        traces = self.traces(rows)
        known = prepared if state is None else state
        steps = self.steps(merged(known, seen_in(traces)), maps)
        # All rounds write at the inputs of the first: what is solved stays, so does the rank.
        inputs = {name: inputs_TI for name, (inputs_TI, _) in rows.items()}
        best, share = loss, 1.0
        kept = {name: torch.zeros_like(rows[name][1], dtype=torch.float64) for name in maps}
        slopes = {name: steps[name].values(inputs[name], rows[name][1]) for name in maps}
        deltas: list[WeightDelta] = []
        for number in range(1, self.config.rounds + 1):
            self.progress("rounds", number - 1, self.config.rounds)
            values = {name: kept[name] + share * slopes[name] for name in maps}
            deltas = self._deltas(view, maps, steps, inputs, values)
            if number == self.config.rounds:
                break
            with view.trying(deltas):
                loss, rows = self.read(view, maps, answers)
            if loss < self.config.enough:
                break
            if loss >= best:  # too far: again from where it was, half as far
                share /= 2
                continue
            best, kept = loss, values
            slopes = {name: steps[name].values(inputs[name], rows[name][1]) for name in maps}
        self.progress("rounds", self.config.rounds, self.config.rounds)
        return self.patch(view, requests, deltas=deltas, traces=traces)

    def _deltas(
        self,
        view: ModelView,
        maps: Mapping[str, LinearRole],
        steps: Mapping[str, Step],
        inputs: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
    ) -> list[WeightDelta]:
        """The changes that add these values (T, O) at the inputs (T, I) of each map."""
        factors = {name: steps[name].factors(inputs[name], values[name]) for name in maps}
        return [
            self.delta(view, role.address, role.factored(*factors[name]))
            for name, role in maps.items()
        ]

    def steps(self, state: State, maps: Mapping[str, LinearRole]) -> Mapping[str, Step]:
        """What a round takes of each map, by what has been seen, this turn included.

        A change adds v to a usual input h times |h|^2 / (|h|^2 + alpha), and g v is what that adds
        to the loss: so the mean of it over what was seen, summed over the maps, is eta's unit.
        """
        bare, unit = {}, 0.0
        for name in maps:
            inputs, gradients = state[name].inputs, state[name].gradients
            if inputs.count < 2:
                raise EditError(
                    "a single answer token cannot be normalised by itself: give more facts at "
                    "once, or facts to start from (warmup=pilots)"
                )
            alpha = self.config.alpha or self.config.slack * inputs.energy
            bare[name] = Step(inputs, self.scale(gradients), alpha, 0.0)
            written = inputs.energy / (inputs.energy + alpha)
            unit += written * len(inputs.mean_F) * bare[name].scale.size
        eta = self.config.eta
        if eta is None:
            eta = self.config.gain / unit
        return {name: replace(step, eta=eta) for name, step in bare.items()}
