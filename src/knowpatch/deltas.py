"""Deltas: changes of parameters as values, addressed by parameter and slice.

Each is in the parameter's own orientation and in float32. Axes: R rows and C columns of a parameter
as stored, K the rank, N changed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt
from torch import Tensor, nn

from knowpatch.errors import PatchError


class Value(BaseModel):
    """Plain data that is checked, compared by content and never changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Address(Value):
    """Where a delta goes: a parameter, or the part of it from `start` to `stop` along `dim`."""

    parameter: str
    dim: NonNegativeInt = 0
    start: NonNegativeInt = 0
    stop: NonNegativeInt | None = None

    def narrow(self, tensor: Tensor) -> Tensor:
        """The addressed part of `tensor`, as a view on it."""
        stop = tensor.shape[self.dim] if self.stop is None else self.stop
        return tensor.narrow(self.dim, self.start, stop - self.start)


@dataclass(frozen=True, eq=False)
class LowRank:
    """left (R, K) @ right (K, C), float32: a rank-K change."""

    left: Tensor
    right: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[0]:
            raise PatchError(
                f"low-rank factors {tuple(self.left.shape)} and {tuple(self.right.shape)} "
                "do not multiply"
            )
        return (self.left.shape[0], self.right.shape[1])

    @property
    def rank(self) -> int:
        return int(self.left.shape[-1])

    def trimmed(self) -> LowRank:
        """Without what adds nothing."""
        used_K = (self.left != 0).any(0) & (self.right != 0).any(1)
        return LowRank(self.left[:, used_K].contiguous(), self.right[used_K].contiguous())

    def added_to(self, tensor: Tensor) -> Tensor:
        """`tensor` (R, C) plus this change, a new tensor; differentiable."""
        return tensor + self.left @ self.right

    def through(self, inputs: Tensor, stored_in_out: bool) -> Tensor:
        """What this change of a linear map adds to its outputs, for (..., in) inputs."""
        if stored_in_out:
            return inputs @ self.left @ self.right
        return inputs @ self.right.T @ self.left.T


@dataclass(frozen=True, eq=False)
class Rows:
    """values (N, C), float32, added to the rows `index` (N), int64, of a matrix."""

    index: Tensor
    values: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"index": self.index, "values": self.values}

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        index, values = self.index, self.values
        if index.ndim != 1 or values.ndim != 2 or values.shape[0] != index.shape[0]:
            raise PatchError("a rows delta needs one index for each row of values")
        if index.dtype != torch.int64 or len(index) == 0 or len(index.unique()) != len(index):
            raise PatchError("the row indices must be distinct int64 numbers")
        if int(index.min()) < 0 or int(index.max()) >= whole[0]:
            raise PatchError(f"a row index is outside 0..{whole[0] - 1}")
        return (whole[0], values.shape[1])

    @property
    def rank(self) -> int:
        return int(self.index.shape[0])

    def added_to(self, tensor: Tensor) -> Tensor:
        return tensor.index_add(0, self.index.to(tensor.device), self.values)

    def through(self, inputs: Tensor, stored_in_out: bool) -> Tensor:
        if stored_in_out:
            return inputs[..., self.index] @ self.values
        added = inputs.new_zeros(*inputs.shape[:-1], int(self.index.max()) + 1)
        return added.index_add(-1, self.index, inputs @ self.values.T)


@dataclass(frozen=True, eq=False)
class Dense:
    """delta, float32, of the addressed shape."""

    delta: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"delta": self.delta}

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.delta.shape)

    @property
    def rank(self) -> None:
        return None

    def added_to(self, tensor: Tensor) -> Tensor:
        return tensor + self.delta

    def through(self, inputs: Tensor, stored_in_out: bool) -> Tensor:
        return inputs @ (self.delta if stored_in_out else self.delta.T)


Delta = LowRank | Rows | Dense
FORMS: dict[str, type[Delta]] = {
    "low-rank": LowRank,
    "rows": Rows,
    "dense": Dense,
}


@dataclass(frozen=True, eq=False)
class WeightDelta:
    """One change of one parameter (or of a slice of it), in the parameter's own orientation.

    `base` is the hash of the stored tensor that the change was computed on, "" if not known.
    """

    address: Address
    change: Delta
    base: str = ""

    def added_to(self, whole: Tensor) -> Tensor:
        """The parameter `whole` plus this change, in float32, as a new tensor; differentiable."""
        dim, start, wide = self.address.dim, self.address.start, whole.float()
        size = whole.shape[dim]
        stop = size if self.address.stop is None else self.address.stop
        part = _on(self.change, wide.device).added_to(self.address.narrow(wide))
        if (start, stop) == (0, size):
            return part
        before, after = wide.narrow(dim, 0, start), wide.narrow(dim, stop, size - stop)
        return torch.cat([before, part, after], dim=dim)

    def through(self, inputs: Tensor, outputs: int, stored_in_out: bool) -> Tensor:
        """What this change of a weight adds to its map's outputs, float32.

        Args:
            inputs: (..., in), of any float dtype.
            outputs: the map's output size.
            stored_in_out: whether the weight is stored (in, out), not (out, in).
        """
        change, wide = _on(self.change, inputs.device), inputs.float()
        start = self.address.start
        if (self.address.dim == 0) == stored_in_out:  # a slice of the inputs
            stop = wide.shape[-1] if self.address.stop is None else self.address.stop
            wide, start = wide[..., start:stop], 0
        added = change.through(wide, stored_in_out)
        return nn.functional.pad(added, (start, outputs - start - added.shape[-1]))

    def check(self, whole: Sequence[int]) -> None:
        """PatchError unless the change fits a parameter of shape `whole`."""
        address = self.address
        stop = whole[address.dim] if address.dim < len(whole) else 0
        stop = stop if address.stop is None else address.stop
        if address.dim >= len(whole) or not address.start < stop <= whole[address.dim]:
            raise PatchError(f"{address.parameter}: no such slice in shape {tuple(whole)}")
        part = list(whole)
        part[address.dim] = stop - address.start
        given = self.change.shape(part)
        if tuple(given) != tuple(part):
            raise PatchError(
                f"{address.parameter}: a change of shape {tuple(given)} for {tuple(part)}"
            )


def _on(change: Delta, device: torch.device) -> Delta:
    return type(change)(**{name: tensor.to(device) for name, tensor in change.tensors().items()})


def is_finite(tensor: Tensor) -> bool:
    """Whether every number of `tensor` is finite; in pieces, to leave a mapped file on disk."""
    return all(bool(torch.isfinite(piece).all()) for piece in tensor.flatten().split(1 << 22))
