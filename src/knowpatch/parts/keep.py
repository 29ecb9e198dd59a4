"""What a change of one map should leave alone, and how much of a residual it may give up for that.

A Keep turns residuals and keys into a change in factors, and knows what earlier edits wrote: after
an edit it is another Keep, with the keys of that edit added. So a sequence of edits is folded from
the keys that the live patches carry, and undoing one is folding without it. Axes: D hidden, I width
of the map's input, F facts, N keys, J dimensions of a subspace.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from knowpatch.errors import EditError
from knowpatch.parts.solve import Factors, Form, update
from knowpatch.parts.space import Space


class Keep(Protocol):
    """What a change should leave alone."""

    @property
    def room(self) -> int | None:
        """How many more facts can be written; None where there is no limit."""

    def update(
        self, residuals_DF: Tensor, keys_IN: Tensor, owner_N: Tensor | None = None
    ) -> Factors:
        """The change that adds the residuals at the keys (parts/solve.py)."""

    def keeping(self, keys_IN: Tensor) -> Keep:
        """What is to be left alone once these keys have been written."""


@dataclass(frozen=True, eq=False)
class Ridge:
    """Text, by its key statistics, and what earlier edits wrote, by their keys (MEMIT, EMMET)."""

    form: Form
    slack: float = 1.0

    @property
    def room(self) -> int | None:
        return None

    def update(
        self, residuals_DF: Tensor, keys_IN: Tensor, owner_N: Tensor | None = None
    ) -> Factors:
        return update(residuals_DF, keys_IN, self.form, slack=self.slack, owner_N=owner_N)

    def keeping(self, keys_IN: Tensor) -> Ridge:
        return replace(self, form=self.form.keeping(keys_IN))


@dataclass(frozen=True, eq=False)
class Null:
    """Everything outside a subspace, exactly; in it, what earlier edits wrote, by their keys.

    AlphaEdit (arXiv 2410.02355) in reduced coordinates: keys and form live in the space (J).
    """

    space: Space
    form: Form

    @property
    def room(self) -> int | None:
        return max(self.space.width - self.form.kept, 0)

    def update(
        self, residuals_DF: Tensor, keys_IN: Tensor, owner_N: Tensor | None = None
    ) -> Factors:
        check_room(self, keys_IN.shape[1])
        inside_JN = self.space.inside(keys_IN)
        basis_IJ = self.space.basis_IJ
        return update(
            residuals_DF, inside_JN, self.form, slack=1.0, owner_N=owner_N, basis_IJ=basis_IJ
        )

    def keeping(self, keys_IN: Tensor) -> Null:
        return replace(self, form=self.form.keeping(self.space.inside(keys_IN)))


@dataclass(frozen=True, eq=False)
class Shrinking(Null):
    """Everything outside a subspace, exactly, and it loses the directions that edits have used.

    EvoEdit (arXiv 2510.13851): what earlier edits wrote cannot be reached by later ones. The form
    is a multiple of the identity.

    Attributes:
        least: directions that keys reach less far than this share of the farthest stay.
    """

    least: float = 1e-6

    @property
    def room(self) -> int | None:
        return self.space.room

    def keeping(self, keys_IN: Tensor) -> Shrinking:
        return replace(self, space=self.space.without(keys_IN, self.least))


def check_room(keep: Keep, facts: int) -> None:
    """EditError if there is less room than facts."""
    if keep.room is not None and keep.room < facts:
        raise EditError(
            f"there is room for {keep.room} more facts in the null space of the key statistics, "
            f"not for {facts}: take earlier edits back, give fewer facts at once, allow a larger "
            "null_share, or use a method that spends no room"
        )


def for_gain(energies_N: Tensor, gain: float) -> float:
    """The slack with which the median key has the share `gain` of a residual written.

    A key of energy g = k^T S^-1 k has g / (slack + g) of it written.
    """
    return float(torch.median(energies_N)) * (1 - gain) / gain
