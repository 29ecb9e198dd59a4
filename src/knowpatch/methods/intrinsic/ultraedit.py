"""UltraEdit: lifelong edits without subject, training or text, each coordinate normalised.

Gu et al., "UltraEdit" (arXiv 2505.14679). At every token of an answer, with h what enters a map, g
the loss's gradient at its output, and mu and sigma over all turns so far, this one included,

    h^ = (h - mu) / sigma        g^ = (g - mu) / sigma        v = -eta |h^|^2 g^
    delta W^T = (H^T H + alpha I)^-1 H^T V

Here statistics start from pilot facts, since those of a single edit's few tokens mean nothing; are
kept for each map, where the published ones are shared by maps of one shape; and a call may take
several rounds of steps, statistics and inputs being those of its first. Spread over the gate and
output maps of many late blocks a fact takes the least of each. The published program: one round,
warmup=none, loss=mean, eta and alpha themselves, gate and up maps, as in the presets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from knowpatch.method import register
from knowpatch.parts.lifelong import GATE, OUT, Lifelong, blocks, published
from knowpatch.parts.seen import Running, Scale


@register("ultraedit")
class UltraEdit(Lifelong):
    """Token gradients, each coordinate in its deviations."""

    name = "ultraedit"
    paper = "Gu et al. 2025, arXiv 2505.14679"
    summary = "closed-form steps from the answers' own gradients, normalised over all edits so far"
    choose = "streams of edits without naming subjects: prompt and answer are all it takes"
    roles = (OUT,)
    depths = ((GATE, 20 / 30, 28 / 30), (OUT, 20 / 30, 28 / 30))
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "llama-3-8b": published(gate=blocks(11, 15), up=blocks(18, 24)),
        "qwen2.5-7b": published(gate=blocks(18, 26), up=blocks(18, 26)),
        "mistral-7b": published(out=blocks(29, 30)),
        "gpt-j-6b": published(out=blocks(18, 26)),
    }

    def scale(self, gradients: Running) -> Scale:
        return Scale.diagonal(gradients)
