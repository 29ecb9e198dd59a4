"""A subspace of a map's input: where a change may read from, for the null-space methods.

Axes: I width of the map's input, J coordinates of the space, N keys, M closed directions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

ROUNDING = 1e-12
"""Of a product of float64 matrices, as a share of its size."""


@dataclass(frozen=True, eq=False)
class Space:
    """The subspace that a change may read from: where keys over text have least energy.

    It is held by a basis, or, where it is most of all directions, by those that lie outside.

    Attributes:
        basis_IJ: orthonormal columns; None for I's own coordinates.
        closed_JM: orthonormal directions, in these coordinates, that are not to be read.
        outside: how many of them, from the first on, never belonged to the space.
    """

    basis_IJ: Tensor | None
    closed_JM: Tensor
    outside: int = 0

    @classmethod
    def below(cls, values_I: Tensor, vectors_II: Tensor, largest: float) -> Space:
        """The eigenvectors (columns) whose eigenvalue is below `largest`."""
        inside_I = values_I < largest
        if 2 * int(inside_I.sum()) > len(inside_I):
            outside_IM = vectors_II[:, ~inside_I].double().contiguous()
            return cls(None, outside_IM, outside_IM.shape[1])
        basis_IJ = vectors_II[:, inside_I].double().contiguous()
        return cls(basis_IJ, torch.zeros(basis_IJ.shape[1], 0, dtype=torch.float64))

    @property
    def coordinates(self) -> int:
        """J, the numbers that a key inside is given by."""
        return len(self.closed_JM)

    @property
    def width(self) -> int:
        """Dimensions of the space before anything was spent."""
        return self.coordinates - self.outside

    @property
    def room(self) -> int:
        """Dimensions that are left."""
        return self.coordinates - self.closed_JM.shape[1]

    def inside(self, keys_IN: Tensor) -> Tensor:
        """The part of keys that lies in the space, in its coordinates (J, N)."""
        return self._open(keys_IN, self.closed_JM)

    def compressed(self, matrix_II: Tensor) -> Tensor:
        """A symmetric matrix as it acts inside the space (J, J)."""
        return self.inside(self.inside(matrix_II).T)

    def _open(self, keys_IN: Tensor, closed_JM: Tensor) -> Tensor:
        """Keys in the coordinates, without the directions that are closed."""
        keys_JN = keys_IN.double()
        if self.basis_IJ is not None:
            keys_JN = self.basis_IJ.T @ keys_JN
        for _ in range(2 if closed_JM.shape[1] else 0):  # once more, for what rounding left
            keys_JN = keys_JN - closed_JM @ (closed_JM.T @ keys_JN)
        return keys_JN

    def without(self, keys_IN: Tensor, least: float) -> Space:
        """The space without the directions of these keys (EvoEdit, arXiv 2510.13851).

        Args:
            keys_IN: to be out of reach of later changes.
            least: directions that the keys reach less far than this share of the farthest stay;
                the farthest is measured before what is spent is taken away.
        """
        keys_IN = keys_IN.double()
        if not keys_IN.shape[1] or not self.width:
            return self
        # Beside what is spent already, and beside what lies outside, the rest may be all rounding.
        first_JN = self._open(keys_IN, self.closed_JM[:, : self.outside])
        whole = torch.linalg.matrix_norm(first_JN, 2)
        smallest = max(least * whole, ROUNDING * torch.linalg.matrix_norm(keys_IN, 2))
        left_JN, sizes_N, _ = torch.linalg.svd(self.inside(keys_IN), full_matrices=False)
        new_JN = left_JN[:, sizes_N > smallest]
        new_JN = new_JN - self.closed_JM @ (self.closed_JM.T @ new_JN)
        new_JN = torch.linalg.qr(new_JN).Q
        return replace(self, closed_JM=torch.cat([self.closed_JM, new_JN], dim=1))
