"""A patch's changes as plain data: the figures of each matrix, and the words it writes.

Several patches of the same kind (one fact each, say) are averaged, each counting once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from knowpatch.bench.statistics import Summary, bootstrap
from knowpatch.locate.change import Changed, besides, changed
from knowpatch.locate.sparsity import Sparsity, curve, pooled
from knowpatch.locate.vocabulary import KS, Projected, columns, project
from knowpatch.models.view import ModelView
from knowpatch.patch import Patch

SPECTRUM = 64
"""Singular values that are told."""
WAYS = {"as published": False, "normed": True}
"""Whether columns are taken times the final norm's gain."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """One matrix's change.

    Attributes:
        label: what it is; layer, role: where it sits, if it is a map of a block.
        shape: (outputs, inputs); mass: squared norm of the change; weight: of the matrix before.
        sparsity: the numbers.
        map_GH: mean |change| by cell, over the largest cell's.
        columns, rows: curves of mass (sparsity.curve).
        spectrum: singular values over the largest, SPECTRUM at most.
    """

    label: str
    layer: int | None
    role: str | None
    shape: tuple[int, int]
    mass: float
    weight: float
    sparsity: Sparsity
    map_GH: Tensor
    columns: list[tuple[float, float]]
    rows: list[tuple[float, float]]
    spectrum: list[float]

    @classmethod
    def of(cls, one: Changed) -> Matrix:
        wide_DI, s_S = one.change_DI.double(), one.singular_S.double()
        return cls(
            label=one.label,
            layer=one.layer,
            role=one.role,
            shape=(wide_DI.shape[0], wide_DI.shape[1]),
            mass=float(wide_DI.square().sum()),
            weight=float(one.weight_DI.double().square().sum()),
            sparsity=one.sparsity,
            map_GH=pooled(wide_DI),
            columns=curve(wide_DI.norm(dim=0)),
            rows=curve(wide_DI.norm(dim=1)),
            spectrum=(s_S / s_S[0])[:SPECTRUM].tolist(),
        )


@dataclass(frozen=True, eq=False)
class Portrait:
    """What one patch changes.

    Attributes:
        patch: it; matrices: from the lowest block up; besides: what is no weight change.
        columns: (block, column) of those that changed most, most changed first.
        projected: for each way to take columns, each request's answers in them; empty where no
            map that writes states is changed, or the head reads other vectors than these.
    """

    patch: Patch
    matrices: tuple[Matrix, ...]
    besides: tuple[str, ...]
    columns: tuple[tuple[int, int], ...]
    projected: dict[str, list[Projected]]

    def numbers(self) -> dict[str, float]:
        """The numbers of all matrices together: means by mass; relative, of all their norms."""
        total = sum(one.mass for one in self.matrices)
        if not total:
            return {}
        found = {
            field.name: sum(getattr(one.sparsity, field.name) * one.mass for one in self.matrices)
            / total
            for field in fields(Sparsity)
        }
        weight = sum(one.weight for one in self.matrices)
        return {**found, "relative": (total / weight) ** 0.5, "matrices": len(self.matrices)}

    def plain(self, maps: Sequence[str] = ()) -> dict[str, Any]:
        """As JSON has it; the maps of the matrices of these labels are in it."""
        return {
            "patch": self.patch.id,
            "method": self.patch.provenance.method,
            "facts": len(self.patch.provenance.requests),
            "besides": list(self.besides),
            "matrices": [_plain(one, mapped=one.label in maps) for one in self.matrices],
            "numbers": self.numbers(),
            "columns": [{"block": block, "column": i} for block, i in self.columns],
            "projected": {
                way: [asdict(one) for one in found] for way, found in self.projected.items()
            },
        }


def _plain(one: Matrix, *, mapped: bool) -> dict[str, Any]:
    found = {name: value for name, value in vars(one).items() if name != "map_GH"}
    found["sparsity"] = asdict(one.sparsity)
    if mapped:
        found["map"] = [[round(value, 6) for value in line] for line in one.map_GH.tolist()]
    return found


def portrait(view: ModelView, patch: Patch) -> Portrait:
    """What a patch changes, by itself: over the model as it came."""
    matrices = list(changed(view, patch))
    found = columns(matrices)
    requests = patch.provenance.requests
    projected = {}
    width = view.parameter(f"{view.roles.head}.weight").shape[1]
    if found is not None and requests and width == view.roles.hidden_size:
        projected = {
            way: project(view, found, requests, normed=normed) for way, normed in WAYS.items()
        }
    return Portrait(
        patch,
        tuple(map(Matrix.of, matrices)),
        tuple(besides(patch)),
        () if found is None else found.places,
        projected,
    )


def averages(portraits: Sequence[Portrait]) -> dict[str, Summary]:
    """Each number's mean over patches that change weights, with its interval."""
    records = [numbers for one in portraits if (numbers := one.numbers())]
    names = records[0] if records else ()
    found = {name: bootstrap([{"value": record[name]} for record in records]) for name in names}
    return {name: summary for name, summary in found.items() if summary is not None}


def hits(
    portraits: Sequence[Portrait], way: str, answer: str = "new"
) -> dict[int, dict[str, Summary]]:
    """Hit@k before, after, and in random columns, over the requests whose token is telling.

    Args:
        way: of WAYS; answer: new, or old.
    """
    told = [one for each in portraits for one in each.projected.get(way, ()) if one.telling]
    ranked = [ranks for one in told if (ranks := getattr(one, answer)) is not None]
    found: dict[int, dict[str, Summary]] = {}
    for k in KS if ranked else ():
        records = [ranks.hits(k) for ranks in ranked]
        summaries = {
            name: bootstrap([{"value": record[name]} for record in records], share=name != "random")
            for name in records[0]
        }
        found[k] = {name: summary for name, summary in summaries.items() if summary is not None}
    return found
