"""Weight changes as factors of one rank: what every adapter format holds.

Axes: O outputs and I inputs of a linear map, K the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from knowpatch.deltas import Address, Dense, LowRank, Rows, WeightDelta
from knowpatch.errors import PatchError
from knowpatch.export.target import Cargo
from knowpatch.models.roles import LinearRole, linear_of

DENSE_RANK = 64
"""The rank that a change without a low rank of its own is cut down to, if none is given."""
NOTHING = 1e-7
"""Singular values below this share of the largest are rounding errors of float32."""


@dataclass(frozen=True, eq=False)
class Factors:
    """The change of one linear map: left_OK @ right_KI, float32.

    Attributes:
        role: the map.
        lost: what the factors leave out, as a share of the change (Frobenius norm).
    """

    role: LinearRole
    left_OK: Tensor
    right_KI: Tensor
    lost: float

    @property
    def rank(self) -> int:
        return self.left_OK.shape[1]


def factored(cargo: Cargo, rank: int | None) -> tuple[list[Factors], list[str]]:
    """The changes of all maps, brought to one rank by zeros, and what a person should know.

    Args:
        cargo: patches on a model.
        rank: the largest rank allowed. None: what it takes, and DENSE_RANK for a change that is
            not given in factors and has a higher rank.

    Raises:
        PatchError: a parameter is changed that is not the weight of a linear map, or is tied.
    """
    found = [_of_one(cargo, name, rank) for name in cargo.changed]
    widest = max(factors.rank for factors in found)
    notes = [f"rank {widest} in {len(found)} map{'s' * (len(found) > 1)}"]
    if worst := max(found, key=lambda factors: factors.lost).lost:
        notes.append(
            f"truncated: the factors leave out {worst:.2%} of the change (Frobenius norm, at "
            "most); a higher --rank leaves out less"
        )
    return [_padded(factors, widest) for factors in found], notes


def _of_one(cargo: Cargo, name: str, rank: int | None) -> Factors:
    alike = [other for other, first in cargo.canonical.items() if first == name]
    role = linear_of(cargo.model.model, name)
    if len(alike) > 1:
        raise PatchError(
            f"{name} is tied ({' = '.join(alike)}), and an adapter changes one map alone: ship it "
            "merged"
        )
    if role is None:
        raise PatchError(f"{name} is not the weight of a linear map, which adapters change")
    shape = tuple(cargo.unedited(name).shape)
    deltas = [
        delta
        for patch in cargo.patches
        for delta in patch.deltas
        if cargo.canonical[delta.address.parameter] == name
    ]
    left, right, lost = summed(deltas, shape, rank)
    if role.stored_in_out:
        left, right = right.T, left.T
    return Factors(role, left.contiguous(), right.contiguous(), lost)


def summed(
    deltas: Sequence[WeightDelta], shape: Sequence[int], rank: int | None
) -> tuple[Tensor, Tensor, float]:
    """Changes of one parameter of `shape` as one pair of factors, in its own orientation, and the
    share of their sum that the factors leave out.

    The factors of one low-rank change are its own, number for number.
    """
    if any(isinstance(delta.change, Dense) for delta in deltas):
        whole = torch.zeros(*shape)
        for delta in deltas:
            whole = delta.added_to(whole)
        left, values, right = torch.linalg.svd(whole.double(), full_matrices=False)
        return _cut(left, values, right, rank or DENSE_RANK)
    pairs = [_pair(delta, shape) for delta in deltas]
    left, right = torch.cat([one for one, _ in pairs], 1), torch.cat([two for _, two in pairs], 0)
    most = min(*shape, rank or min(shape))
    if len(pairs) == 1 and left.shape[1] <= most:
        return left, right, 0.0
    # The sum's own singular vectors, without ever forming it: of the product of two small factors.
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    inner, values, outer = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return _cut(q_left @ inner, values, outer @ q_right.T, most)


def _cut(left: Tensor, values: Tensor, right: Tensor, most: int) -> tuple[Tensor, Tensor, float]:
    """The largest singular values, spread evenly over both factors; float32."""
    kept = max(1, min(most, int((values > NOTHING * values[0]).sum())))
    roots = values[:kept].sqrt()
    total = float(values.norm())
    left_out = float(values[kept:].norm()) / total if total else 0.0
    lost = left_out if kept == most and left_out > NOTHING else 0.0
    return (left[:, :kept] * roots).float(), (roots[:, None] * right[:kept]).float(), lost


def _pair(delta: WeightDelta, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A change given in factors or rows, as factors of the whole parameter."""
    change, address = delta.change, delta.address
    if isinstance(change, Rows):
        height = _part(address, shape)[0]
        change = LowRank(nn.functional.one_hot(change.index, height).T.float(), change.values)
    assert isinstance(change, LowRank)
    stop = shape[address.dim] if address.stop is None else address.stop
    around = (address.start, shape[address.dim] - stop)
    if address.dim == 0:
        return nn.functional.pad(change.left, (0, 0, *around)), change.right
    return change.left, nn.functional.pad(change.right, around)


def _part(address: Address, shape: Sequence[int]) -> list[int]:
    """The shape of the addressed part."""
    part = list(shape)
    stop = shape[address.dim] if address.stop is None else address.stop
    part[address.dim] = stop - address.start
    return part


def _padded(factors: Factors, rank: int) -> Factors:
    more = rank - factors.rank
    left_OK = nn.functional.pad(factors.left_OK, (0, more))
    right_KI = nn.functional.pad(factors.right_KI, (0, 0, 0, more))
    return Factors(factors.role, left_OK, right_KI, factors.lost)
