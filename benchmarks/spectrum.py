"""Synthetic key statistics of any width, whose eigenvectors are known without being computed.

The eigenvalues fall as a power law, by CONDITION in all (real ones: 1e4 to 1e5);
the eigenvectors are the identity's columns after a few reflections. Axes: I inputs, J dimensions of
the null space, N keys, R reflections.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from knowpatch.parts.nulls import NullConfig
from knowpatch.parts.space import Space

CONDITION = 3e4
MEAN = 0.03
"""Mean eigenvalue: what a block of an early layer has."""
REFLECTIONS = 8
NULL_SHARE: float = NullConfig.model_fields["null_share"].default
"""Share of the statistics' trace that lies in the space AlphaEdit may use: the library's own."""


class Spectrum:
    """A second moment Q diag(values) Q^T of keys whose eigenvectors, Q's columns, are known."""

    def __init__(self, inputs: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        ranks_I = torch.arange(1, inputs + 1, dtype=torch.float64)
        fallen_I = ranks_I ** -(math.log(CONDITION) / math.log(inputs))
        self.values_I = fallen_I * (MEAN / fallen_I.mean())
        normals_RI = self.normal(REFLECTIONS, inputs)
        self.normals_RI = normals_RI / normals_RI.norm(dim=1, keepdim=True)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def rotated(self, columns_IN: Tensor) -> Tensor:
        """Q X (I, N), in place: one Householder reflection after the other."""
        for normal_I in self.normals_RI:
            columns_IN.addr_(normal_I, normal_I @ columns_IN, alpha=-2)
        return columns_IN

    def matrix(self, diagonal_I: Tensor) -> Tensor:
        """Q diag(.) Q^T (I, I), float64, without a product of matrices."""
        found_II = torch.diag(diagonal_I)
        for normal_I in self.normals_RI:
            turned_I = found_II @ normal_I
            turned_I -= (turned_I @ normal_I) * normal_I
            found_II.addr_(normal_I, turned_I, alpha=-2).addr_(turned_I, normal_I, alpha=-2)
        return found_II

    def second(self) -> Tensor:
        """C0 (I, I)."""
        return self.matrix(self.values_I)

    def keys(self, count: int) -> Tensor:
        """Keys (I, N) from the normal distribution with this second moment."""
        drawn_IN = self.normal(len(self.values_I), count)
        return self.rotated(self.values_I.sqrt()[:, None] * drawn_IN)

    @property
    def null(self) -> int:
        """J: the last eigenvectors, which hold NULL_SHARE of the trace at most."""
        held_I = self.values_I.flip(0).cumsum(0) / self.values_I.sum()
        return int((held_I <= NULL_SHARE).sum())

    def projector(self) -> Tensor:
        """P (I, I) onto the null space."""
        chosen_I = torch.zeros_like(self.values_I)
        chosen_I[-self.null :] = 1
        return self.matrix(chosen_I)

    def space(self) -> Space:
        inputs, outside = len(self.values_I), len(self.values_I) - self.null
        if self.null > outside:
            return Space(None, self.rotated(torch.eye(inputs, outside).double()), outside)
        basis_IJ = torch.zeros(inputs, self.null, dtype=torch.float64)
        basis_IJ.diagonal(-outside).fill_(1)
        none = torch.zeros(self.null, 0, dtype=torch.float64)
        return Space(self.rotated(basis_IJ), none)
