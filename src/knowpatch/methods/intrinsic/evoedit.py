"""EvoEdit: a null space that loses the directions that edits have used.

Lyu et al., "EvoEdit" (arXiv 2510.13851). As AlphaEdit, but instead of weighing the keys of earlier
edits in the solve, their directions are taken out of the projector: what they wrote cannot be
reached by later changes at all. Each fact costs one dimension, so there is an end, which `room`
tells.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from knowpatch.method import register
from knowpatch.parts.keep import Shrinking
from knowpatch.parts.nulls import NullConfig, weighed_null
from knowpatch.parts.published import SPREAD, extended
from knowpatch.parts.spread import Spread


class EvoEditConfig(NullConfig):
    """Options of EvoEdit."""

    least: float = Field(
        1e-6, gt=0, lt=1, description="directions reached by less than this share are not spent"
    )


@register("evoedit")
class EvoEdit(Spread):
    """Writes associations where neither text nor earlier edits read."""

    name = "evoedit"
    paper = "Lyu et al. 2025, arXiv 2510.13851"
    summary = "as alphaedit, with the directions of earlier edits out of reach"
    choose = "a limited number of facts, each to be left alone by all later ones"
    Config = EvoEditConfig
    presets = extended(
        SPREAD,
        {
            name: {"threshold": 0.02, "weight": 1.0}
            for name in ("gpt2-xl", "gpt-j-6b", "llama-3-8b", "qwen2.5-7b")
        },
    )

    def keep(self, second_II: Tensor, pilots_IN: Tensor) -> Shrinking:
        null = weighed_null(second_II, pilots_IN, self.config)
        return Shrinking(null.space, null.form, self.config.least)
