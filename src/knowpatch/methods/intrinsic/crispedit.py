"""CrispEdit: fine-tuning inside the subspace in which the loss over text hardly bends.

CrispEdit (arXiv 2602.15823, ICML 2026). With A = E[a a^T] over what enters a map and B = E[g g^T]
over the loss's gradients at what leaves it, both over text, the direction u_b,j u_a,i^T has the
curvature s_b,j s_a,i. The sharpest directions, which together hold a share `energy` of all
curvature, are left alone:

    delta W = U_b (mask * X) U_a^T,  X trained with Adam on the answers.

The published program projects the gradient and then lets Adam rescale it entry by entry, so that
its steps leave the subspace (constrain=gradient). Here X itself is trained: the change has no part
in a direction that is masked. In a sequence, what earlier edits were learned at counts as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from knowpatch.method import Preparation, Shape, register
from knowpatch.models.roles import LinearRole
from knowpatch.models.view import ModelView
from knowpatch.parts import moments
from knowpatch.parts.curvature import Curvature, Projected, Rotated
from knowpatch.parts.depths import Layers, between
from knowpatch.parts.descent import Passes
from knowpatch.parts.gradients import Gradients
from knowpatch.parts.moments import Moments
from knowpatch.parts.tuned import Change, Tuned, TunedConfig
from knowpatch.patch import Patch

DEPTHS = (17 / 30, 21 / 30)
"""The first and the last block, as shares of the depth (published: 19-23 of 32)."""
PUBLISHED: dict[str, Any] = {
    "learning_rate": 5e-4,
    "steps": 25,
    "batch_size": 32,
    "energy": 0.99,
    "eos": False,
    "constrain": "gradient",
    "weight_decay": 0.0,
    "enough": 1e-2,
}


class CrispConfig(TunedConfig):
    """Options of CrispEdit."""

    layers: Layers | None = Field(
        None, description="blocks to edit, as 17-21; by default 17/30 to 21/30 of the depth"
    )
    steps: int = Field(60, ge=1, description="passes over the requests, at most")
    energy: float = Field(
        0.95, gt=0, lt=1, description="share of the curvature whose directions are left alone"
    )
    constrain: Literal["change", "gradient"] = Field(
        "change", description="what stays inside: the change, or the gradient alone (published)"
    )
    batch_size: int = Field(32, ge=1, description="rows per step")
    # Of 200 facts at once (24 scored, SmolLM2) all are learned with or without decay; with it the
    # perplexity of ordinary text rises by 4.1 %, not 9.7, and of neighbours .26 stay, not .15.
    weight_decay: float = Field(
        10.0,
        ge=0,
        description="pulls the change towards zero: its share per step and learning rate",
    )
    enough: float = Field(0.2, gt=0, description="stop when the mean loss is below this")
    eos: bool = Field(True, description="learn to stop after the answer (published: false)")
    text: str | None = Field(
        None, description="for curvature and keep: file, folder, hub dataset, or self"
    )
    tokens: int = Field(20_000, ge=100, description="tokens of text for the curvature")
    memory: bool = Field(True, description="what earlier edits were learned at counts as text")


@dataclass(frozen=True, eq=False)
class Factors:
    """Running sums of one map: what enters it, and the gradients at what leaves it."""

    inputs: Moments
    gradients: Moments

    def curvature(self, energy: float) -> Curvature:
        return Curvature.of(self.inputs.mean(), self.gradients.mean(), energy)


@dataclass(frozen=True, eq=False)
class Prepared:
    """The factors over text, and the curvature that they make, by block."""

    factors: Mapping[int, Factors]
    curvatures: Mapping[int, Curvature]


@register("crispedit")
class CrispEdit(Tuned):
    """Trains a few matrices where text hardly notices."""

    name = "crispedit"
    paper = "CrispEdit, arXiv 2602.15823"
    summary = "fine-tunes several MLP matrices inside the directions that text is indifferent to"
    choose = "many facts in one patch where general ability has to stay"
    Config = CrispConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "llama-3-8b": {**PUBLISHED, "layers": (19, 20, 21, 22, 23)},
        "qwen2.5-7b": {**PUBLISHED, "layers": (15, 16, 17, 18, 19)},
    }

    def layers(self, count: int) -> tuple[int, ...]:
        return self.config.layers or between(DEPTHS, count)

    def ends(self) -> bool:
        return bool(self.config.eos)

    def prepare(self, view: ModelView) -> Prepared:
        layers = self.layers(len(view.roles.blocks))
        for layer in layers:
            view.roles.linear(self.config.module, layer)
        asked: dict[str, Any] = {
            "text": self.config.text,
            "tokens": self.config.tokens,
            "seed": self.seed,
            "progress": self.progress,
        }
        inputs = moments.key_moments(view, self.config.module, layers, **asked)
        gradients = moments.key_moments(view, self.config.module, layers, gradients=True, **asked)
        factors = {layer: Factors(inputs[layer], gradients[layer]) for layer in layers}
        curvatures = {n: each.curvature(self.config.energy) for n, each in factors.items()}
        return Prepared(factors, curvatures)

    def fold(self, prepared: Prepared, state: Prepared | None, patch: Patch) -> Prepared:
        """What an edit was learned at joins the factors; its curvature is found when asked for."""
        before = state or prepared
        if not self.config.memory:
            return before
        factors = {}
        for layer, each in before.factors.items():
            found = patch.traces
            if f"inputs.{layer}" not in found:
                return before
            inputs_NI, gradients_ND = (
                found[f"{kind}.{layer}"].double() for kind in ("inputs", "gradients")
            )
            count = int(found["count"])
            factors[layer] = Factors(
                each.inputs + Moments(inputs_NI.T @ inputs_NI, count),
                each.gradients + Moments(gradients_ND.T @ gradients_ND, count),
            )
        return replace(before, factors=factors, curvatures={})

    def change(
        self, view: ModelView, role: LinearRole, prepared: Prepared, state: Prepared | None
    ) -> Change:
        layer = view.roles.block_of(role.module)
        now = state or prepared
        curvature = now.curvatures.get(layer) or now.factors[layer].curvature(self.config.energy)
        kind = Rotated if self.config.constrain == "change" else Projected
        return kind(role, curvature)

    def traces(
        self, view: ModelView, passes: Passes, roles: Sequence[LinearRole]
    ) -> dict[str, Tensor]:
        """What enters the maps over the examples' rows, and the gradients of their text's loss."""
        if not self.config.memory:
            return {}
        rows = [(*example.prompt, *example.answer) for example in passes.examples]
        places = [(row, at) for row, ids in enumerate(rows) for at in range(len(ids) - 1)]
        labels = [rows[row][at + 1] for row, at in places]
        prompts = [len(example.prompt) for example in passes.examples]
        gradients = Gradients(view, [role.module for role in roles])
        _, found = gradients.of(rows, places, labels, [1.0] * len(places), prompts=prompts)
        traces = {"count": torch.tensor([float(len(places))])}
        for role in roles:
            layer, each = view.roles.block_of(role.module), found[role.module]
            traces[f"inputs.{layer}"] = root(each.inputs_MI)
            traces[f"gradients.{layer}"] = root(each.gradients_MO)
        return traces

    def preparations(self, shape: Shape) -> list[Preparation]:
        return [
            item
            for gradients in (False, True)
            for item in moments.preparations(
                shape,
                self.config.module,
                self.layers(shape.layers),
                text=self.config.text,
                tokens=self.config.tokens,
                seed=self.seed,
                gradients=gradients,
            )
        ]


def root(rows_NI: Tensor) -> Tensor:
    """R (min(N, I), I), float32, with R^T R = rows^T rows."""
    if len(rows_NI) <= rows_NI.shape[1]:
        return rows_NI.float().contiguous()
    reduced: Tensor = torch.linalg.qr(rows_NI.double(), mode="r").R
    return reduced.float().contiguous()
