"""StableEdit: lifelong normalisation that is warmed up, and whitens gradients.

Ma et al., "More Edits, More Stable" (arXiv 2605.11836). As UltraEdit, but with

    g^ = (g - mu) S^-1/2,       S = scatter / (n - O - 1)

over the n rows of all turns so far; below twice as many rows as the map has outputs S is next to
singular, and each coordinate is divided by its deviation instead.

The published warm-up edits some 2,000 facts into the model. An edit here changes a model by its own
patch and by nothing else, so the warm-up facts give statistics alone: `warmup` names a file of
them, and by default they are the pilot facts, too few to whiten by before many edits are live.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from knowpatch.method import register
from knowpatch.parts.lifelong import OUT, Lifelong, blocks, published
from knowpatch.parts.seen import Running, Scale

LEAST = 1e-6
"""No direction's variance counts as smaller than this share of the median one."""


@register("stableedit")
class StableEdit(Lifelong):
    """Token gradients, whitened."""

    name = "stableedit"
    paper = "Ma et al. 2026, arXiv 2605.11836"
    summary = "closed-form steps from the answers' own gradients, whitened over all edits so far"
    choose = "long streams of edits without naming subjects, with a file of facts to warm up on"
    roles = (OUT,)
    depths = ((OUT, 20 / 30, 28 / 30),)
    root = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mistral-7b": published(out=blocks(28, 31), alpha=10.0, warmup="pilots"),
        "qwen2.5-7b": published(
            out=(*blocks(8, 14), *blocks(18, 25)), alpha=10.0, eta=2e-6, warmup="pilots"
        ),
        "gpt-j-6b": published(
            out=(*blocks(8, 15), *blocks(22, 24)), alpha=10.0, eta=2e-6, warmup="pilots"
        ),
    }

    def scale(self, gradients: Running) -> Scale:
        count, width = gradients.count, len(gradients.mean_F)
        if gradients.scatter_FF is None or count < 2 * width:
            return Scale.diagonal(gradients)
        found = torch.linalg.eigh(gradients.scatter_FF / (count - width - 1))
        least = LEAST * float(found.eigenvalues.median())
        sigma_O = found.eigenvalues.clamp(min=max(least, torch.finfo(torch.float32).tiny)).sqrt()
        by_OO = (found.eigenvectors / sigma_O) @ found.eigenvectors.T
        return Scale(gradients.mean_F, by_OO, float(sigma_O.sum()))
