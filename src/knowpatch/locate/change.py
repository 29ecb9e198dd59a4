"""What a patch does to the weights, matrix by matrix (KnowEdit, arXiv 2401.01286, Figure 6).

Of what changes no weight (memories, prompt rules, procedures) it says just that, and what there is
instead. Axes: D outputs and I inputs of a map, K rank, S singular values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from knowpatch.deltas import LowRank, WeightDelta
from knowpatch.locate.sparsity import Sparsity, singular_values, singular_values_of, sparsity
from knowpatch.models.roles import LinearRole
from knowpatch.models.view import ModelView
from knowpatch.patch import Patch


@dataclass(frozen=True, eq=False)
class Changed:
    """One matrix that a patch changes.

    Attributes:
        name: its parameter, or its role where that is a slice of one.
        layer, role: where it sits; None where it is no map of a block.
        change_DI, weight_DI: the change, and the matrix as it came: (out, in), float32.
        factors: the change as left (D, K) @ right (K, I), where the patch holds it so.
    """

    name: str
    layer: int | None
    role: str | None
    change_DI: Tensor
    weight_DI: Tensor
    factors: tuple[Tensor, Tensor] | None = None

    @cached_property
    def singular_S(self) -> Tensor:
        """Singular values, largest first."""
        if self.factors is None or self.factors[0].shape[1] >= min(self.change_DI.shape):
            return singular_values(self.change_DI)
        return singular_values_of(*self.factors)

    @cached_property
    def sparsity(self) -> Sparsity:
        return sparsity(self.change_DI, self.weight_DI, self.singular_S)

    @property
    def label(self) -> str:
        """For tables and pictures: short."""
        return self.name if self.layer is None else f"block {self.layer}, {self.role}"


def changed(view: ModelView, patch: Patch) -> Iterator[Changed]:
    """The matrices that a patch changes, from the lowest block up; one is held at a time.

    What is changed in pieces, or several times, is one change: their sum. A matrix that the patch
    names and leaves as it is does not come.
    """
    places = _places(view)
    parameters = dict.fromkeys(delta.address.parameter for delta in patch.deltas)
    for name in sorted(parameters, key=lambda one: (places.get(one, [(-1, "", None)])[0][0], one)):
        mine = [delta for delta in patch.deltas if delta.address.parameter == name]
        stored = view.originals.get(name, view.values(name)).float().cpu()
        whole = torch.zeros_like(stored)
        for delta in mine:
            whole = delta.added_to(whole)
        yield from matrices(view, name, whole, stored, mine)


def matrices(
    view: ModelView, name: str, change: Tensor, stored: Tensor, deltas: Sequence[WeightDelta] = ()
) -> Iterator[Changed]:
    """The maps that a parameter holds, those that change.

    Args:
        view: the model.
        name: the parameter.
        change, stored: its change and what it was, as it is stored.
        deltas: what the change is made of, if that is known.
    """
    for layer, role, linear in _places(view).get(name, [(None, None, None)]):
        found = _matrix(name, layer, role, linear, change, stored, deltas)
        if found.change_DI.any():
            yield found


def _places(view: ModelView) -> dict[str, list[tuple[int, str, LinearRole]]]:
    """The maps that each parameter holds: several where it is fused."""
    found: dict[str, list[tuple[int, str, LinearRole]]] = {}
    for layer, block in enumerate(view.roles.blocks):
        for role, linear in block.linears.items():
            found.setdefault(linear.address.parameter, []).append((layer, role, linear))
    return found


def _matrix(
    name: str,
    layer: int | None,
    role: str | None,
    linear: LinearRole | None,
    whole: Tensor,
    stored: Tensor,
    deltas: Sequence[WeightDelta],
) -> Changed:
    if linear is None:  # no map of a block: as it is stored
        change, weight = (tensor.reshape(len(tensor), -1) for tensor in (whole, stored))
        return Changed(name, None, None, change, weight)
    change, weight = (linear.oriented(linear.address.narrow(each)) for each in (whole, stored))
    return Changed(name, layer, role, change, weight, _factors(linear, deltas))


def _factors(linear: LinearRole, deltas: Sequence[WeightDelta]) -> tuple[Tensor, Tensor] | None:
    """The change in factors (D, K) and (K, I), if all of it is of low rank and of this map."""
    low = [delta.change for delta in deltas if isinstance(delta.change, LowRank)]
    elsewhere = any(delta.address != linear.address for delta in deltas)
    if not low or len(low) < len(deltas) or elsewhere:
        return None
    left = torch.cat([change.left for change in low], dim=1).cpu()
    right = torch.cat([change.right for change in low], dim=0).cpu()
    return (right.T, left.T) if linear.stored_in_out else (left, right)


def besides(patch: Patch) -> list[str]:
    """What a patch holds that is no change of a weight, a line each."""
    found = []
    for wrap in patch.wraps:
        size = sum(tensor.nbytes for tensor in wrap.tensors.values())
        found.append(f"{wrap.kind} on {wrap.module}, {size} bytes, acts while the model runs")
    if patch.rule is not None:
        found.append(f"{patch.rule.kind}, a prompt rule")
    if patch.procedure is not None:
        found.append(f"{patch.procedure.kind}, a procedure")
    return found
