"""EMMET: several facts at once, each written exactly; ROME for a batch.

Gupta et al., "A Unified Framework for Model Editing" (arXiv 2403.14236). Of all changes that write
every residual it takes the one that moves ordinary keys least,

    delta W = R (K^T C^-1 K + alpha I)^-1 K^T C^-1

which is MEMIT's with lambda = alpha, in one layer. The published alpha = 0.1 beside C weighed by up
to 100,000 gives up much of each residual; here a thousandth is (gain), which only tells nearly
equal keys apart. Keys of earlier edits are kept as MEMIT keeps them.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from knowpatch.method import register
from knowpatch.parts.keep import Ridge
from knowpatch.parts.published import PLAIN, SPREAD, extended
from knowpatch.parts.spread import Spread, WeighedConfig, weighed


class EmmetConfig(WeighedConfig):
    """Options of EMMET."""

    gain: float = Field(
        0.999, gt=0, lt=1, description="share of a pilot fact's residual that the solve writes"
    )


@register("emmet")
class Emmet(Spread):
    """Writes a batch of associations into one MLP, exactly."""

    name = "emmet"
    paper = "Gupta et al. 2024, arXiv 2403.14236"
    summary = "least change of one MLP output map that writes every fact of a batch exactly"
    choose = "a few facts about different subjects that must all hold, in a tiny patch"
    Config = EmmetConfig
    presets = extended(
        SPREAD,
        {
            "gpt2-xl": {"layers": (17,), "weight": 100.0, **PLAIN},
            "gpt-j-6b": {"layers": (5,), "weight": 0.1, **PLAIN},
            "llama-2-7b": {"layers": (5,), "weight": 0.1, **PLAIN},
        },
    )
    depths = (5 / 30, 5 / 30)

    def keep(self, second_II: Tensor, pilots_IN: Tensor) -> Ridge:
        return weighed(second_II, pilots_IN, self.config)
