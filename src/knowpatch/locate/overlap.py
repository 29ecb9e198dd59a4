"""Whether what is located belongs together: RSim (KnowEdit, arXiv 2401.01286, Figure 8).

After KLoB (Ju et al., arXiv 2309.16535): of each prompt the n highest scored blocks are taken, and
two prompts are as alike as their sets overlap. Prompts that ought to be found in one place (of one
fact in several wordings, say) are compared with prompts of different facts:

    RSim = max((Sim_related - Sim_all) / (1 - Sim_all), 0),

so that a locator that always says the same has none. The same for ranks of all blocks: Spearman's
correlation in the place of the overlap. Axes: P and Q prompts, L blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

RELATED, EVERY = "related", "every"
"""Columns: how alike related prompts are, and those of different facts."""


def rsim(related: float, every: float) -> float:
    """How far related prompts are above all pairs, as a share of what there is above them."""
    return 0.0 if every >= 1 else max((related - every) / (1 - every), 0.0)


def combined(means: dict[str, float]) -> float | None:
    """RSim of the means of the two columns."""
    if RELATED not in means or EVERY not in means:
        return None
    return rsim(means[RELATED], means[EVERY])


def highest(scores_PL: Tensor, n: int) -> Tensor:
    """1 where a block is among the n highest scored ones of its row, of equals the lower one."""
    order_PL = scores_PL.argsort(dim=1, descending=True, stable=True)[:, :n]
    return torch.zeros_like(scores_PL).scatter(1, order_PL, 1.0)


def overlap(one_PL: Tensor, other_QL: Tensor, n: int) -> Tensor:
    """The share of the n highest blocks that each two rows have in common (P, Q)."""
    return highest(one_PL, n) @ highest(other_QL, n).T / n


def ranks(scores_PL: Tensor) -> Tensor:
    """Ranks from 1 within each row; equals share the mean of theirs."""
    less_PL = (scores_PL[:, None] < scores_PL[:, :, None]).double().sum(2)
    same_PL = (scores_PL[:, None] == scores_PL[:, :, None]).double().sum(2)
    return less_PL + (same_PL + 1) / 2


def pearson(one_PL: Tensor, other_QL: Tensor) -> Tensor:
    """Correlation of each two rows (P, Q); 0 where a row does not vary."""
    normed = [
        torch.nn.functional.normalize(x.double() - x.double().mean(1, keepdim=True), dim=1)
        for x in (one_PL, other_QL)
    ]
    return normed[0] @ normed[1].T


def spearman(one_PL: Tensor, other_QL: Tensor) -> Tensor:
    """Correlation of the ranks of each two rows (P, Q)."""
    return pearson(ranks(one_PL), ranks(other_QL))
