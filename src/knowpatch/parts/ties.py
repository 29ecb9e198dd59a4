"""TIES: several changes of one matrix as one, without averaging what contradicts itself.

Yadav et al., "TIES-Merging" (arXiv 2306.01708): trim, elect signs, merge what agrees.
Axes: S changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ties(changes: Sequence[Tensor], density: float) -> Tensor:
    """The change that stands for all of these, each of the same weight.

    Args:
        density: share of each change's entries, the largest, that is kept.
    """
    trimmed_S = torch.stack([_trimmed(change, density) for change in changes])
    sign = torch.where(trimmed_S.sum(0) < 0, -1.0, 1.0)
    agree_S = trimmed_S * sign > 0
    return (trimmed_S * agree_S).sum(0) / agree_S.sum(0).clamp(min=1)


def _trimmed(change: Tensor, density: float) -> Tensor:
    """A change with its largest entries alone."""
    count = max(1, round(density * change.numel()))
    least = change.abs().flatten().topk(count).values[-1]
    return torch.where(change.abs() >= least, change, 0.0)
