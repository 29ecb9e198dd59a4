"""AlphaEdit: changes that cannot be read from keys that ordinary text has.

Fang et al., "AlphaEdit: Null-Space Constrained Knowledge Editing" (arXiv 2410.02355). P projects
onto the directions in which keys over text have least energy, and

    delta W = R K^T P (K K^T P + Kp Kp^T P + L2 I)^-1

with Kp the keys of earlier live edits. Solved in the coordinates of that subspace, where the system
is symmetric and small. How much of it they may have is a share of the trace here (null_share):
the published threshold of 0.02 is in units of squared activation, and means another space on every
model. A share is a trade: what lies inside is not protected, but in a small space many facts crowd,
their changes grow, and more is lost than the space protects.
"""

from __future__ import annotations

from torch import Tensor

from knowpatch.method import register
from knowpatch.parts.keep import Null
from knowpatch.parts.nulls import NullConfig, weighed_null
from knowpatch.parts.published import SPREAD, extended
from knowpatch.parts.spread import Spread


@register("alphaedit")
class AlphaEdit(Spread):
    """Writes associations where text does not read."""

    name = "alphaedit"
    paper = "Fang et al. 2024, arXiv 2410.02355"
    summary = "as memit, in the null space of the key statistics"
    choose = "many facts one after the other, where what else the model says must stay"
    Config = NullConfig
    presets = extended(
        SPREAD,
        {
            name: {"threshold": 0.02, "weight": 1.0 if name == "qwen2.5-7b" else 10.0}
            for name in ("gpt2-xl", "gpt-j-6b", "llama-3-8b", "qwen2.5-7b")
        },
    )

    def keep(self, second_II: Tensor, pilots_IN: Tensor) -> Null:
        return weighed_null(second_II, pilots_IN, self.config)
