"""Memory: keys with values, found again by distance.

Entries are rows of tensors; which is nearest is found exactly (parts/nearest.py).
Axes: N entries, Q queries, I size of a key, D size of a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from knowpatch.parts.nearest import Index

Label = tuple[int, ...]
MARGIN = 1e-5
SAME = 1e-2
"""Share of a radius within which two keys are one: another rounding of the same prompt."""


@dataclass(frozen=True, eq=False)
class Memory:
    """A discrete key-value memory (GRACE, Hartvigsen et al., arXiv 2211.11031).

    Attributes:
        keys_NI, values_ND: entries, float32.
        radii_N: how far from its key an entry still answers.
        labels: the token ids that each entry's value stands for.
        owners: of what `grown` took in, the number of the memory that each entry came with.
    """

    keys_NI: Tensor
    values_ND: Tensor
    radii_N: Tensor
    labels: tuple[Label, ...]
    owners: tuple[int, ...] = ()

    def nearest(self, queries_QI: Tensor) -> tuple[Tensor, Tensor]:
        """For each query the distance to its nearest key, and that key's number (Q each)."""
        distances_Q1, numbers_Q1 = self.index.nearest(queries_QI)
        return distances_Q1[:, 0], numbers_Q1[:, 0]

    @cached_property
    def index(self) -> Index:
        """The keys, to be searched."""
        return Index(self.keys_NI)

    def to(self, device: torch.device) -> Memory:
        if self.keys_NI.device == device:
            return self
        return replace(
            self,
            keys_NI=self.keys_NI.to(device),
            values_ND=self.values_ND.to(device),
            radii_N=self.radii_N.to(device),
        )


def grown(entries: Sequence[Memory]) -> Memory:
    """The memory after `entries`, taken one by one in their order (GRACE, algorithm 1).

    A key outside every ball, at more than its own radius plus the nearest one's, is a new entry. A
    key within reach of an entry with the same label widens that entry up to the key and is not
    kept. With another label it is a new entry, and the two share the distance between them; where
    there is none to share (a fact edited again), it takes the other's place.
    """
    kept: list[tuple[int, int]] = []  # number of the memory, and of the entry in it
    keys_NI = torch.cat([memory.keys_NI for memory in entries])
    radii: list[float] = []
    numbers: list[int] = []  # of kept keys, in keys_NI
    for offset, (owner, i) in enumerate(_each(entries)):
        memory = entries[owner]
        initial = float(memory.radii_N[i])
        if numbers:
            gaps_N = (keys_NI[numbers] - keys_NI[offset]).norm(dim=1)
            near = int(gaps_N.argmin())
            gap = float(gaps_N[near])
            if gap <= initial + radii[near]:
                if _label(entries, kept[near]) == memory.labels[i]:
                    radii[near] = max(radii[near], gap * (1 + MARGIN))
                    continue
                if gap <= SAME * initial:
                    kept[near], numbers[near], radii[near] = (owner, i), offset, initial
                    continue
                radii[near], initial = gap / 2 - MARGIN, gap / 2
        kept.append((owner, i))
        numbers.append(offset)
        radii.append(initial)
    return Memory(
        keys_NI[numbers],
        torch.stack([entries[owner].values_ND[i] for owner, i in kept]),
        torch.tensor(radii),
        tuple(_label(entries, one) for one in kept),
        tuple(owner for owner, _ in kept),
    )


def _each(entries: Sequence[Memory]) -> list[tuple[int, int]]:
    return [(n, i) for n, memory in enumerate(entries) for i in range(len(memory.labels))]


def _label(entries: Sequence[Memory], one: tuple[int, int]) -> Label:
    return entries[one[0]].labels[one[1]]
