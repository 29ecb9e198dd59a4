"""MEMIT: many facts at once, spread over several MLPs.

Meng et al., "Mass-Editing Memory in a Transformer" (arXiv 2210.07229). At each layer the change is

    delta W = R K^T (lambda C + Kp Kp^T + K K^T)^-1        (equation 14)

with C the second moment of keys over text. Kp are the keys that earlier live edits were written at:
with them a sequence of edits comes to what one edit of all facts would have been, where the
published method, with memory=false, forgets.

The published lambda = 15,000 is right where keys have 14,336 entries: a key of energy
g = k^T C^-1 k has g / (lambda + g) of its residual written, and g grows with the width. So lambda
is set here by that share (gain) for the median pilot fact.
"""

from __future__ import annotations

from torch import Tensor

from knowpatch.method import register
from knowpatch.parts.keep import Ridge
from knowpatch.parts.published import PLAIN, SPREAD, extended
from knowpatch.parts.spread import Spread, WeighedConfig, weighed


@register("memit")
class Memit(Spread):
    """Writes a batch of associations into several MLPs."""

    name = "memit"
    paper = "Meng et al. 2022, arXiv 2210.07229"
    summary = "least-squares change of several MLP output maps, for many facts at once"
    choose = "many facts about named subjects in one patch, or one after the other"
    Config = WeighedConfig
    presets = extended(
        SPREAD,
        {name: {"weight": 20_000.0 if name == "gpt2-xl" else 15_000.0, **PLAIN} for name in SPREAD},
    )

    def keep(self, second_II: Tensor, pilots_IN: Tensor) -> Ridge:
        return weighed(second_II, pilots_IN, self.config)
