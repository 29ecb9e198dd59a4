"""PMET: what attention should carry is kept apart from what is written into the MLPs.

Li et al., "PMET: Precise Model Editing in a Transformer" (arXiv 2308.08742). Two vectors are
optimised together at the last layer, one added to its attention's output and one to its MLP's; the
first takes up what does not belong into the MLP and is thrown away. A layer writes one over the
square root of the layers left of the gap; the solve is MEMIT's.

The published program measures the gap at the last MLP's output, which does not see what the lower
layers have put into the residual stream: together they write three times the value, times the share
that a solve writes, and how much of it differs from fact to fact. Measured in the stream (gap, the
default; where a norm follows the map, at the map) each layer corrects those below it. Nor are
values eased off here once the target leads (easing): a batch has to overcome its own facts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor

from knowpatch.method import register
from knowpatch.models.view import ModelView
from knowpatch.parts.keep import Ridge
from knowpatch.parts.published import PLAIN, SPREAD, extended
from knowpatch.parts.spread import Spread, WeighedConfig, weighed
from knowpatch.parts.valued import ROLE
from knowpatch.parts.values import ValueSettings


class PmetConfig(WeighedConfig):
    """Options of PMET."""

    clamp: float = Field(4.0, gt=0, description="how far a value may move, in its own length")
    gain: float = Field(
        0.6, gt=0, lt=1, description="share of a pilot fact's residual that a layer's solve writes"
    )
    easing: bool = Field(
        False, description="ease off once the target leads, and stop at little drift (published)"
    )
    gap: Literal["stream", "map"] = Field(
        "stream", description="what is missing is measured behind the block, or the map (published)"
    )


@register("pmet")
class Pmet(Spread):
    """Writes a batch of associations into several MLPs, with attention's part left out."""

    name = "pmet"
    paper = "Li et al. 2023, arXiv 2308.08742"
    summary = "as memit, with attention's and the MLP's values optimised apart"
    choose = "as memit; where memit's values spoil what is said around the fact"
    roles = (ROLE, "attn.out")
    Config = PmetConfig
    presets = extended(
        SPREAD,
        {
            "gpt-j-6b": {
                "learning_rate": 0.2,
                "steps": 30,
                "kl_factor": 1.0,
                "weight": 6000.0,
                "gap": "map",
                "easing": True,
                **PLAIN,
            },
            "llama-2-7b": {
                "steps": 20,
                "clamp": 1.0,
                "weight": 15_000.0,
                "gap": "map",
                "easing": True,
                **PLAIN,
            },
        },
    )

    def keep(self, second_II: Tensor, pilots_IN: Tensor) -> Ridge:
        return weighed(second_II, pilots_IN, self.config)

    def value_modules(self, view: ModelView) -> tuple[str, ...]:
        last = self.layers_of(view)[-1]
        return tuple(view.roles.linear(role, last).module for role in (ROLE, "attn.out"))

    def gap_module(self, view: ModelView) -> str:
        if self.config.gap == "map":
            return self.role(view, self.layers_of(view)[-1]).module
        return super().gap_module(view)

    def share(self, layers_left: int) -> float:
        return float(layers_left**-0.5)

    def settings(self, view: ModelView) -> ValueSettings:
        return replace(super().settings(view), easing=self.config.easing)
