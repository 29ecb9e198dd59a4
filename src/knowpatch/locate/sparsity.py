"""How a weight change is spread over its matrix (KnowEdit, arXiv 2401.01286, Figure 6).

Few columns or the whole matrix? A column of an MLP's output map is what one neuron writes, so a
change of few columns is a change of few memories. Norms are in float64: sums of squares of a
million small numbers lose digits in float32. Axes: D outputs and I inputs of a linear map, K rank,
S singular values, G by H cells of a heat map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CELLS = 64
"""Cells of a heat map along each side."""
TOP, PERCENT = 5, 0.01
"""Columns (and rows) that count as few: so many, and such a share of them."""
CURVE = 60
"""Points of a curve of mass."""


@dataclass(frozen=True)
class Sparsity:
    """One matrix's change in numbers.

    Attributes:
        relative: norm of the change over the matrix's own (Frobenius).
        hoyer_entries, hoyer_columns, hoyer_rows: Hoyer's sparsity of the entries, and of the norms
            of columns and rows: 0 where all are alike, 1 where one has it all.
        gini_columns: Gini coefficient of the columns' norms.
        top_columns, top_rows: share of the squared mass in the TOP largest.
        percent_columns, percent_rows: in the largest one percent (one at least).
        untouched: share of the columns that are exactly as they were.
        stable_rank: squared norm over the largest squared singular value.
        participation: (sum of singular values)^2 over the sum of their squares.
    """

    relative: float
    hoyer_entries: float
    hoyer_columns: float
    hoyer_rows: float
    gini_columns: float
    top_columns: float
    top_rows: float
    percent_columns: float
    percent_rows: float
    untouched: float
    stable_rank: float
    participation: float


def sparsity(change_DI: Tensor, weight_DI: Tensor, singular_S: Tensor) -> Sparsity:
    """The numbers of one matrix's change, which must not be zero.

    Args:
        change_DI: the change, oriented (out, in).
        weight_DI: the matrix before it.
        singular_S: singular values of the change, largest first.
    """
    wide_DI, s_S = change_DI.double(), singular_S.double()
    columns_I, rows_D = wide_DI.norm(dim=0), wide_DI.norm(dim=1)
    return Sparsity(
        relative=float(wide_DI.norm() / weight_DI.double().norm().clamp(min=1e-300)),
        hoyer_entries=hoyer(wide_DI.flatten()),
        hoyer_columns=hoyer(columns_I),
        hoyer_rows=hoyer(rows_D),
        gini_columns=gini(columns_I),
        top_columns=held(columns_I, TOP),
        top_rows=held(rows_D, TOP),
        percent_columns=held(columns_I, _percent(columns_I)),
        percent_rows=held(rows_D, _percent(rows_D)),
        untouched=float((columns_I == 0).double().mean()),
        stable_rank=float(s_S.square().sum() / s_S[0].square()),
        participation=float(s_S.sum().square() / s_S.square().sum()),
    )


def _percent(norms_N: Tensor) -> int:
    return max(1, round(PERCENT * len(norms_N)))


def hoyer(x_N: Tensor) -> float:
    """Hoyer's sparsity, (sqrt(n) - l1/l2) / (sqrt(n) - 1); 0 of a single number."""
    root = math.sqrt(len(x_N))
    if root <= 1:
        return 0.0
    return float((root - x_N.abs().sum() / x_N.norm()) / (root - 1))


def gini(x_N: Tensor) -> float:
    """Gini coefficient of numbers that are not negative."""
    ordered_N, n = x_N.sort().values, len(x_N)
    order_N = torch.arange(1, n + 1, dtype=x_N.dtype, device=x_N.device)
    return float(((2 * order_N - n - 1) * ordered_N).sum() / (n * ordered_N.sum()))


def held(norms_N: Tensor, count: int) -> float:
    """Share of the squared mass that the `count` largest norms hold."""
    squares_N = norms_N.square()
    return float(squares_N.topk(min(count, len(squares_N))).values.sum() / squares_N.sum())


def curve(norms_N: Tensor) -> list[tuple[float, float]]:
    """(share of the columns, share of the squared mass that the largest of them hold).

    From one column to all, in steps that are even on a logarithmic scale.
    """
    squares_N = norms_N.square().sort(descending=True).values
    total_N, n = squares_N.cumsum(0) / squares_N.sum(), len(squares_N)
    counts = sorted({round(n ** (i / (CURVE - 1))) for i in range(CURVE)})
    return [(count / n, float(total_N[count - 1])) for count in counts]


def singular_values(change_DI: Tensor) -> Tensor:
    """Singular values, largest first (S), float32."""
    values_S: Tensor = torch.linalg.svdvals(change_DI.float())
    return values_S


def singular_values_of(left_DK: Tensor, right_KI: Tensor) -> Tensor:
    """Those of left @ right, from its factors: K of them at most; the matrix is never formed."""
    _, inner_left = torch.linalg.qr(left_DK.double())
    _, inner_right = torch.linalg.qr(right_KI.double().T)
    values_S: Tensor = torch.linalg.svdvals(inner_left @ inner_right.T)
    return values_S


def pooled(change_DI: Tensor, cells: int = CELLS) -> Tensor:
    """The mean |change| of each cell, over the largest cell's: (G, H), at most `cells` a side."""
    size_DI = change_DI.abs().double()
    rows, columns = (math.ceil(length / cells) for length in size_DI.shape)
    summed_GI = _summed(size_DI, rows)
    summed_GH = _summed(summed_GI.T, columns).T
    ones_DI = torch.ones_like(size_DI)
    count_GH = _summed(_summed(ones_DI, rows).T, columns).T
    mean_GH = summed_GH / count_GH  # what pads the last cell is not counted
    return mean_GH / mean_GH.max().clamp(min=1e-300)


def _summed(matrix: Tensor, size: int) -> Tensor:
    """Sums over groups of `size` rows, the last of which may be smaller."""
    length = math.ceil(matrix.shape[0] / size)
    padded = torch.nn.functional.pad(matrix, (0, 0, 0, length * size - matrix.shape[0]))
    return padded.reshape(length, size, -1).sum(1)
