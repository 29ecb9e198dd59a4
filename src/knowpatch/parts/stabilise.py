"""Restraints that any closed-form edit can take as an option, so that many edits do not add up.

A change of W (D, I) is left (D, N) @ right (N, I), all float64. Two of the restraints keep it in
factors, of no higher rank; RECT cannot, since what it drops follows no factor:

    rect         the entries that change most for their size stay     RECT, arXiv 2401.04700
    restrained   large singular values of a sum of changes shrink     PRUNE, arXiv 2405.16821
    kept_off     the leading input directions of W are read less      SPHERE, arXiv 2510.01172
    anchored     the output that is asked for gets an ordinary norm   NAS, arXiv 2602.02543

Axes: D outputs, I inputs, N factors, M pilots, R leading directions, S singular values, T steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from knowpatch.errors import EditError
from knowpatch.parts.solve import Factors

LEAST_WEIGHT = 1e-12
"""Added to |W| where a change is measured against it: a weight of zero counts as a small one."""

NEAR = 1e-6
"""Relative error allowed in a largest singular value."""

OUTLIERS = 0.05
"""The share of pilots, those of the largest norm, that an anchor leaves out."""


def rect(change_DI: Tensor, weight_DI: Tensor, share: float) -> Tensor:
    """The entries of a change with the largest |change| / |W|; the others 0 (RECT).

    Entries that tie with the last one kept are kept as well, so that the order of rows and columns
    does not matter.

    Args:
        change_DI: delta W.
        weight_DI: W, which it is to be added to.
        share: of the entries, from 0 to 1; 1 keeps all.
    """
    count = round(share * change_DI.numel())
    if count >= change_DI.numel():
        return change_DI
    if count <= 0:
        return torch.zeros_like(change_DI)
    relative_DI = change_DI.double().abs()
    relative_DI = relative_DI / (weight_DI.double().abs() + LEAST_WEIGHT)
    # A selection, not a sort: linear time, some seconds for 59 million entries.
    place = relative_DI.numel() - count + 1
    least = relative_DI.flatten().kthvalue(place).values
    return change_DI * (relative_DI >= least)


def largest_singular(weight_DI: Tensor) -> float:
    """The largest singular value of W to NEAR, by Lanczos steps on the smaller Gram matrix G.

    That is power iteration which keeps the vectors it has seen. Plain power iteration slows down so
    much where two singular values are nearly equal that it looks done; here |G u - value u| tells
    how far off the value is. For a map of low rank the steps end at once.
    """
    wide_DI = weight_DI.double() if len(weight_DI) <= weight_DI.shape[1] else weight_DI.double().T
    start_D = torch.randn(
        len(wide_DI), dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    basis_TD = (start_D / start_D.norm())[None]
    inner: list[float] = []  # the diagonal of G in the basis, and beside it
    beside: list[float] = []
    while True:
        image_D = wide_DI @ (wide_DI.T @ basis_TD[-1])
        inner.append(float(image_D @ basis_TD[-1]))
        for _ in range(2):  # once more, for what rounding left
            image_D = image_D - basis_TD.T @ (basis_TD @ image_D)
        size = float(image_D.norm())
        value, last = _top(inner, beside)
        if not size * last > NEAR * value:
            return math.sqrt(max(value, 0.0))
        beside.append(size)
        basis_TD = torch.cat([basis_TD, (image_D / size)[None]])


def _top(inner: list[float], beside: list[float]) -> tuple[float, float]:
    """The largest eigenvalue of a tridiagonal matrix, and |last entry| of its eigenvector."""
    small_TT = torch.diag(torch.tensor(inner, dtype=torch.float64))
    side_T = torch.tensor(beside, dtype=torch.float64)
    small_TT += torch.diag(side_T, 1) + torch.diag(side_T, -1)
    values_T, vectors_TT = torch.linalg.eigh(small_TT)
    return float(values_T[-1]), abs(float(vectors_TT[-1, -1]))


def restrained(left_DN: Tensor, right_NI: Tensor, largest: float, base: float = math.e) -> Factors:
    """left (D, S), right (S, I): the change with its large singular values held back (PRUNE).

    For the sum of all changes since the first weights, and once: it is the sum that grows, and what
    is restrained twice is restrained too much. A change that needs none is given back as it came.

    Args:
        left_DN, right_NI: the accumulated change W - W0.
        largest: the largest singular value of W0.
        base: of the logarithm, above 1; nearer to 1 restrains less.
    """
    left_DS, left_SN = torch.linalg.qr(left_DN.double())
    right_IS, right_SN = torch.linalg.qr(right_NI.double().T)
    core_left_SS, sizes_S, core_right_SS = torch.linalg.svd(
        left_SN @ right_SN.T, full_matrices=False
    )
    if not bool((sizes_S > largest).any()):
        return left_DN, right_NI
    kept_S = held_back(sizes_S, largest, base)
    return left_DS @ (core_left_SS * kept_S), core_right_SS @ right_IS.T


def held_back(sizes_S: Tensor, largest: float, base: float = math.e) -> Tensor:
    """log_b(s) - log_b(largest) + largest for singular values s above `largest` (PRUNE).

    Never more than s: the slope just above `largest` is 1 / (largest ln b). Where `largest` is less
    than 1 / ln b (a map of small norm, or a base near 1), the formula alone would enlarge what it
    is to restrain.
    """
    beyond_S = (sizes_S / largest).log() / math.log(base) + largest
    return torch.where(sizes_S > largest, torch.minimum(beyond_S, sizes_S), sizes_S)


def joined(first: Factors | None, second: Factors) -> Factors:
    """The sum of two changes, in factors."""
    if first is None:
        return second
    return torch.cat([first[0], second[0]], dim=1), torch.cat([first[1], second[1]])


def step(change: Factors, earlier: Factors | None, base_DI: Tensor, base: float) -> Factors:
    """What an edit adds where the sum of all edits is restrained (PRUNE).

    The sum of such steps is the restrained sum of the changes: it is restrained once and as a
    whole, not edit by edit.

    Args:
        change: of this edit; earlier: the sum of those before it, unrestrained.
        base_DI: the map as it came; base: of the logarithm.
    """
    largest = largest_singular(base_DI)
    total = joined(earlier, change)
    after = restrained(total[0], total[1], largest, base)
    before = None if earlier is None else restrained(earlier[0], earlier[1], largest, base)
    if after[0] is total[0] and (before is None or before[0] is earlier[0]):  # type: ignore[index]
        return change
    return after if before is None else joined(after, (-before[0], before[1]))


def leading(weight_DI: Tensor, share: float) -> Tensor:
    """The fewest leading right singular vectors of W that hold `share` of its energy: U (I, R).

    They are the eigenvectors of W^T W, and their share is of its trace; from the SVD of W no (I, I)
    matrix is formed. An SVD of a large map takes minutes: for many changes of one W do it once.
    """
    _, sizes_S, right_SI = torch.linalg.svd(weight_DI.double(), full_matrices=False)
    energy_S = sizes_S.square()
    before_S = energy_S.cumsum(0) - energy_S
    chosen_RI: Tensor = right_SI[before_S < share * energy_S.sum()]
    return chosen_RI.T


def kept_off(right_NI: Tensor, leading_IR: Tensor, strength: float = 1.0) -> Tensor:
    """right (I - strength U U^T): a change that reads the leading directions of W less (SPHERE).

    Args:
        right_NI: the factor that reads inputs.
        leading_IR: U, the protected directions (`leading`).
        strength: 1 takes all of what a change reads there, 0 nothing.
    """
    right = right_NI.double()
    return right - strength * (right @ leading_IR) @ leading_IR.T


def anchored(
    output_D: Tensor, delta_D: Tensor, norm: float, *, most: float = 2.0, cap: bool = False
) -> Tensor | None:
    """delta' with |output + delta'| = norm, in the direction of output + delta (NAS).

    None where |output + delta| is more than `most` times the norm: such an edit is to be given up,
    and only the caller knows its name.

    Args:
        output_D: what the map says now.
        delta_D: what the edit wants added.
        norm: the anchor.
        cap: never enlarge, since that would make a small edit do more than it needs.
    """
    wanted_D = output_D.double() + delta_D.double()
    size = float(wanted_D.norm())
    if size > most * norm:
        return None
    scale = norm / size if size else 0.0  # nothing has no direction to be enlarged in
    if cap:
        scale = min(scale, 1.0)
    return (wanted_D * scale - output_D.double()).to(delta_D.dtype)


def anchor(norms_M: Tensor) -> tuple[float, float]:
    """The mean of the norms without the largest OUTLIERS, and the standard error of that mean.

    Args:
        norms_M: |output + delta| of pilot edits of the unedited model.

    Raises:
        EditError: fewer than two norms, which have no standard error.
    """
    if len(norms_M) < 2:
        raise EditError(f"a norm anchor needs at least two pilot edits, not {len(norms_M)}")
    dropped = int(OUTLIERS * len(norms_M))
    kept_M = norms_M.double().sort().values[: len(norms_M) - dropped]
    return float(kept_M.mean()), float(kept_M.std() / len(kept_M) ** 0.5)
