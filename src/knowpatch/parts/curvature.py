"""Where the loss over text hardly bends: K-FAC factors of a map, and changes that stay there.

The Fisher information of a map's weight is taken as the Kronecker product of A, the second moment
of what enters it, and B, that of the gradients at what leaves it. In their eigenbases each
direction u_b u_a^T has a curvature s_b s_a of its own; those that hold most of all curvature are
left alone. Axes: I and D width of the map's input and output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowpatch.deltas import Delta, Dense
from knowpatch.models.roles import LinearRole


@dataclass(frozen=True, eq=False)
class Curvature:
    """inputs_II and outputs_DD: eigenvectors as columns; free_DI: which directions may be used."""

    inputs_II: Tensor
    outputs_DD: Tensor
    free_DI: Tensor

    @classmethod
    def of(cls, inputs_II: Tensor, gradients_DD: Tensor, energy: float) -> Curvature:
        """From the two factors (float64): the sharpest directions hold a share `energy`."""
        a_I, vectors_II = torch.linalg.eigh(inputs_II)
        b_D, vectors_DD = torch.linalg.eigh(gradients_DD)
        bends_DI = b_D.clamp(min=0)[:, None] * a_I.clamp(min=0)[None, :]
        return cls(vectors_II, vectors_DD, flat(bends_DI, energy))

    @property
    def room(self) -> float:
        """The share of all directions that may be used."""
        return float(self.free_DI.double().mean())

    def into(self, change_DI: Tensor) -> Tensor:
        """A change in the eigenbases."""
        outputs_DD, inputs_II = (each.to(change_DI) for each in (self.outputs_DD, self.inputs_II))
        return outputs_DD.T @ change_DI @ inputs_II

    def back(self, rotated_DI: Tensor) -> Tensor:
        """A change from the eigenbases, without what may not be used; differentiable."""
        outputs_DD, inputs_II = (each.to(rotated_DI) for each in (self.outputs_DD, self.inputs_II))
        return outputs_DD @ (rotated_DI * self.free_DI.to(rotated_DI)) @ inputs_II.T

    def project(self, change_DI: Tensor) -> Tensor:
        """What of a change may be used."""
        return self.back(self.into(change_DI))


def flat(bends_DI: Tensor, energy: float) -> Tensor:
    """Which directions are left when the sharpest that hold a share `energy` are taken away.

    Directions as sharp as the last one taken go with it.
    """
    falling = bends_DI.flatten().sort(descending=True).values
    held = falling.cumsum(0)
    if float(held[-1]) <= 0:  # a text without any gradient bends nothing
        return torch.ones_like(bends_DI, dtype=torch.bool)
    count = int((held < energy * held[-1]).sum())
    return bends_DI < falling[min(count, len(falling) - 1)]


class Rotated:
    """A change that is trained in the eigenbases, so that every step stays where it may be.

    Adam divides each entry of a gradient by a scale of its own: what was projected before is no
    longer inside afterwards. In the eigenbases the projection is a mask, entry by entry, and Adam
    never moves what has no gradient.
    """

    def __init__(self, role: LinearRole, curvature: Curvature) -> None:
        leaf = torch.zeros(curvature.free_DI.shape)
        leaf = leaf.to(curvature.free_DI.device)
        leaf.requires_grad_()
        self._leaf, self._role, self._curvature = leaf, role, curvature

    @property
    def leaves(self) -> Sequence[Tensor]:
        return (self._leaf,)

    def delta(self) -> Delta:
        return Dense(self._role.oriented(self._curvature.back(self._leaf)))

    def settle(self) -> None:
        pass


class Projected(Rotated):
    """A change whose gradients are projected before Adam sees them, as published: it may leave."""

    def __init__(self, role: LinearRole, curvature: Curvature) -> None:
        super().__init__(role, curvature)
        self._leaf.register_hook(curvature.project)

    def delta(self) -> Delta:
        return Dense(self._role.oriented(self._leaf))
