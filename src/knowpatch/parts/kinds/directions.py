"""Directions: where a prompt speaks of an entity, a vector is added at the entity's last token.

What REMEDI (arXiv 2304.00740) does with an entity that has been given an attribute. An entity is
found by its token ids, behind a space or not; its last occurrence in the prompt counts. Of several
directions for one entity the sum is added, but no more than twice their mean length; where several
entities end at one token, the longest is meant. Axes: B rows, T columns, D width of the output, N
entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from knowpatch.parts.wraps import Decision, Kind, Tokens, expect, is_labels, register
from knowpatch.patch import Wrap

DIRECTIONS = "directions@1"
LONGEST = 2.0
"""Length of a sum of directions at most, in mean lengths of its parts."""

Forms = tuple[tuple[int, ...], ...]
"""The ways to write an entity, as token ids; by the first one it is known."""


def directions(module: str, inputs: int, entities: Sequence[Forms], directions_ND: Tensor) -> Wrap:
    """A wrap that adds a direction to a module's output where its entity is spoken of.

    Args:
        module: a linear map; `inputs`: the width of what enters it.
        entities: of each direction.
        directions_ND: float32.
    """
    return Wrap(
        module=module,
        kind=DIRECTIONS,
        data={"inputs": inputs, "entities": [[list(way) for way in ways] for ways in entities]},
        tensors={"directions": directions_ND},
    )


def _is_entities(value: object, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(is_labels(ways) and ways and all(ways) for ways in value)
    )


@register("directions")
@dataclass(frozen=True, eq=False)
class Directions(Kind):
    """What is known of entities, and in which wrap's entry."""

    entities: tuple[Forms, ...]
    directions_ND: Tensor
    owners: tuple[int, ...]

    kind = DIRECTIONS
    reads = "prompt"
    acts = "prompt"
    measure = "words"

    @classmethod
    def check(cls, wrap: Wrap) -> tuple[int, int]:
        count = len(wrap.tensors.get("directions", ()))
        data = {
            "inputs": lambda value: isinstance(value, int) and value > 0,
            "entities": lambda value: _is_entities(value, count),
        }
        expect(wrap, {"directions": 2}, data, alike=("directions",))
        return wrap.data["inputs"], wrap.tensors["directions"].shape[1]

    @classmethod
    def join(cls, wraps: Sequence[Wrap]) -> Directions:
        found = [
            (tuple(tuple(way) for way in ways), number)
            for number, wrap in enumerate(wraps)
            for ways in wrap.data["entities"]
        ]
        joined_ND = torch.cat([wrap.tensors["directions"] for wrap in wraps])
        return cls(tuple(each for each, _ in found), joined_ND, tuple(n for _, n in found))

    @property
    def owners_N(self) -> Sequence[int]:
        return self.owners

    @cached_property
    def _known(self) -> dict[tuple[int, ...], int]:
        """Each way to write an entity, with the last entry of the entity."""
        last = {ways[0]: number for number, ways in enumerate(self.entities)}
        return {way: last[ways[0]] for ways in self.entities for way in ways}

    @cached_property
    def _totals_ND(self) -> Tensor:
        """Of each entry the sum over all of its entity."""
        together: dict[tuple[int, ...], list[int]] = {}
        for number, ways in enumerate(self.entities):
            together.setdefault(ways[0], []).append(number)
        totals = {first: bounded_sum(self.directions_ND[mine]) for first, mine in together.items()}
        return torch.stack([totals[ways[0]] for ways in self.entities])

    def decide(self, tokens: Tokens) -> Decision:
        """Which entry acts at which token (B, T)."""
        entries_BT = torch.full_like(tokens.ids_BT, -1)
        for row, (ids_T, prompt_T) in enumerate(zip(tokens.ids_BT, tokens.prompt_BT, strict=True)):
            columns = prompt_T.nonzero()[:, 0].tolist()
            for place, entry in self.found(ids_T[prompt_T].tolist()).items():
                entries_BT[row, columns[place]] = entry
        found_BT = (entries_BT >= 0).float()
        nearest_BT = entries_BT.clamp(min=0)
        return Decision(entries_BT, found_BT, torch.full_like(found_BT, 0.5), nearest_BT)

    def found(self, ids: Sequence[int]) -> dict[int, int]:
        """Places among the ids where an entity ends for the last time, with its entry."""
        last: dict[int, tuple[int, int]] = {}
        for size in sorted({len(way) for way in self._known}):
            for end in range(size, len(ids) + 1):
                entry = self._known.get(tuple(ids[end - size : end]))
                if entry is not None:
                    last[entry] = max(last.get(entry, (-1, 0)), (end - 1, size))
        rising = sorted(last.items(), key=lambda item: item[1][1])
        return {place: entry for entry, (place, _) in rising}

    def act(self, tokens: Tokens, outputs_BTD: Tensor, decision: Decision) -> Tensor:
        # A pass without a cache reads the prompt again, with the answer so far behind it.
        entries_BT = decision.entries
        behind = outputs_BTD.shape[1] - entries_BT.shape[1]
        entries_BT = torch.nn.functional.pad(entries_BT, (0, behind), value=-1)
        added_BTD = self._totals_ND.to(outputs_BTD)[entries_BT.clamp(min=0)]
        return torch.where((entries_BT >= 0)[..., None], outputs_BTD + added_BTD, outputs_BTD)


def bounded_sum(parts_ND: Tensor) -> Tensor:
    """The sum of vectors, shortened to twice their mean length if it is longer."""
    total_D = parts_ND.sum(0)
    most = LONGEST * parts_ND.norm(dim=1).mean()
    share: Tensor = (most / total_D.norm().clamp(min=1e-30)).clamp(max=1)
    return total_D * share
