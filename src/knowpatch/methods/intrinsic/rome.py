"""ROME: rank-one model editing, with the averaged key throughout.

Meng et al., "Locating and Editing Factual Associations in GPT" (arXiv 2202.05262); Gupta et al.,
"Rebuilding ROME" (arXiv 2403.07175) for the key. The MLP output map of one block is taken as a
memory from key k (what enters it at the subject's last token) to value v, and changed by

    delta W = (v* - W k) (C^-1 k)^T / (k^T C^-1 k)

with k averaged over contexts and C the second moment of keys over text. The published ROME takes
u = C^-1 k from the averaged key and the rest from the bare prompt's (option key=mix): that product
can vanish, and the edit with it, so it is guarded. Where the averaged key says nothing of the bare
prompt, the fact is written at both (parts/single.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from knowpatch.method import register
from knowpatch.parts.published import SINGLE, extended
from knowpatch.parts.single import Read, Single, SingleConfig
from knowpatch.parts.solve import Factors, Form, mixed_change


class RomeConfig(SingleConfig):
    """Options of ROME."""

    key: Literal["averaged", "mix"] = Field(
        "averaged", description="averaged, or mix (as published; may refuse a fact)"
    )


@register("rome")
class Rome(Single):
    """Writes one association into one MLP."""

    name = "rome"
    paper = "Meng et al. 2022, arXiv 2202.05262"
    summary = "rank-one change of one MLP output map at the subject's last token"
    choose = "one or a few facts about named subjects; a tiny patch that is an exact LoRA"
    Config = RomeConfig
    presets = extended(SINGLE, {name: {"key": "mix"} for name in SINGLE})

    def factors(self, reads: Sequence[Read], form: Form) -> Factors:
        if self.config.key == "averaged":
            return super().factors(reads, form)
        pieces = [
            mixed_change(read.delta_D, read.keys_CI.mean(0), read.keys_CI[0], form)
            for read in reads
        ]
        return torch.cat([left for left, _ in pieces], 1), torch.cat([right for _, right in pieces])
