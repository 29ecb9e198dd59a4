"""R-ROME and p-ROME: ROME with one key throughout, as its rebuilding has them.

Gupta et al., "Rebuilding ROME" (arXiv 2403.07175). With k one and the same key everywhere, the
denominator k^T C^-1 k of

    delta W = (v* - W k) (C^-1 k)^T / (k^T C^-1 k)

is positive, so that no edit can blow up: the "disabling edits" of sequences of ROME go away. k is
the mean over contexts, bare one included (R-ROME), or the bare prompt's own (p-ROME).
Axes: C contexts, D hidden, I inner size of the MLP.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from knowpatch.method import register
from knowpatch.parts.published import SINGLE
from knowpatch.parts.single import Asked, Read, Single, SingleConfig, averaged
from knowpatch.parts.solve import Form


class RRomeConfig(SingleConfig):
    """Options of R-ROME."""

    key: Literal["averaged", "bare"] = Field(
        "averaged", description="averaged over contexts (R-ROME), or the bare prompt's (p-ROME)"
    )


@register("r_rome")
class RRome(Single):
    """Writes one association into one MLP, with one key throughout."""

    name = "r_rome"
    paper = "Gupta et al. 2024, arXiv 2403.07175"
    summary = "rank-one change of one MLP output map, with the same key in all its terms"
    choose = "to compare with the paper; rome here looks after subjects that open a prompt, too"
    Config = RRomeConfig
    presets = SINGLE

    def asked(self, read: Read, form: Form) -> Asked:
        if self.config.key == "bare":
            return Asked(read.keys_CI[0][:, None], read.delta_D)
        return averaged(read)
