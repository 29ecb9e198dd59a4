"""A graph of edited facts: names, edges, and the way from an entity along a relation.

Names are compared without capitals, compatible characters and articles, and by their aliases,
which are united, never overwritten. Of one subject and relation the last edge counts; the ones
before it are its history. A question may leave out a hop ("the director of Hey Jude", who is its
performer's): where an entity is of a kind that does not have the relation, or has one that implies
it, the nearest edge that can be reached over other edges is taken, if there is one nearest, and the
hops to it are the way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from knowpatch.parts.relations import Relation, meant, plain

SKIPPED = 2
"""Hops that a question may leave out at one place."""


@dataclass(frozen=True)
class Edge:
    """A fact: subject and relation (by id) to object; `owner` is the joined patch it is of."""

    subject: str
    relation: str
    object: str
    owner: int


def name_key(name: str) -> str:
    """A name for comparing: without capitals and a leading article."""
    return re.sub(r"^(the|a|an)\s+(?=\S)", "", plain(name))


@dataclass(frozen=True, eq=False)
class Graph:
    """Edges, oldest first.

    Attributes:
        edges: all that were ever made; relations: those that they use, by id.
        aliases: other names, by name.
    """

    edges: tuple[Edge, ...]
    relations: Mapping[str, Relation]
    aliases: Mapping[str, Sequence[str]]

    @cached_property
    def _same(self) -> dict[str, str]:
        """Each known name's key to that of the entity; aliases never hide a name."""
        known = {name_key(name): name_key(name) for name in self.names}
        for name, others in self.aliases.items():
            for other in others:
                known.setdefault(name_key(other), name_key(name))
        return known

    @cached_property
    def _out(self) -> dict[str, dict[str, Edge]]:
        """Edges by entity and relation; of one place the last, and that last in order."""
        found: dict[str, dict[str, Edge]] = {}
        for edge in self.edges:
            there = found.setdefault(self.entity(edge.subject), {})
            there.pop(edge.relation, None)
            there[edge.relation] = edge
        return found

    @cached_property
    def _into(self) -> dict[str, list[Edge]]:
        """Edges by the entity that they lead to."""
        found: dict[str, list[Edge]] = {}
        for edge in self.edges:
            found.setdefault(self.entity(edge.object), []).append(edge)
        return found

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Subjects first, then objects that are none."""
        subjects = [edge.subject for edge in self.edges]
        return tuple(dict.fromkeys([*subjects, *(edge.object for edge in self.edges)]))

    def entity(self, name: str) -> str:
        """What stands for all names of an entity; an unknown one for itself."""
        key = name_key(name)
        return self._same.get(key, key)

    def edge(self, name: str, relation: str) -> Edge | None:
        return self._out.get(self.entity(name), {}).get(relation)

    def history(self, name: str, relation: str) -> list[Edge]:
        """All edges that were ever made at this place, oldest first."""
        at = self.entity(name), relation
        return [edge for edge in self.edges if (self.entity(edge.subject), edge.relation) == at]

    def start(self, question: str) -> tuple[str, tuple[int, int]] | None:
        """The longest known name in a question, and where it is: of something that edges leave,
        else of any; as written, else whatever the capitals; else where only its plural stands."""
        named = (self._leaving, self._others)
        for names in named:
            for flags in (re.NOFLAG, re.IGNORECASE):
                if found := _longest(question, names, flags):
                    return found
        plurals = (_longest(question, names, re.NOFLAG, "s") for names in named)
        return next(filter(None, plurals), None)

    @cached_property
    def _leaving(self) -> dict[str, str]:
        return {name: of for name, of in self._called.items() if self.entity(of) in self._out}

    @cached_property
    def _others(self) -> dict[str, str]:
        return {name: of for name, of in self._called.items() if name not in self._leaving}

    @cached_property
    def _called(self) -> dict[str, str]:
        """Every name and alias to a name."""
        called = {other: name for name, others in self.aliases.items() for other in others}
        return {**called, **{name: name for name in self.names}}

    def along(self, name: str, chain: Sequence[Relation]) -> list[Edge] | None:
        """Where a chain leads from an entity over edges alone; None where one is missing."""
        edges: list[Edge] = []
        for named in chain:
            relation = meant(named, self.kinds(name))
            if relation is None:
                continue
            way = self.way(name, relation)
            if not way:
                return None
            edges += way
            name = way[-1].object
        return edges

    def way(self, name: str, relation: Relation) -> list[Edge]:
        """Edges that lead from an entity along a relation, left-out hops included; none if none, or
        if as many hops lead to different ones."""
        if edge := self.edge(name, relation.id):
            return [edge]
        ways = [[edge] for edge in self._skipped(name, relation)]
        for _ in range(SKIPPED):
            ends = [(way, self.edge(way[-1].object, relation.id)) for way in ways]
            whole = {last: [*way, last] for way, last in ends if last}
            if whole:
                return whole.popitem()[1] if len(whole) == 1 else []
            ways = [[*w, e] for w in ways for e in self._from(w[-1].object) if e not in w]
        return []

    def _from(self, name: str) -> Iterator[Edge]:
        """Edges that leave an entity, the newest first."""
        return reversed(self._out.get(self.entity(name), {}).values())

    def _skipped(self, name: str, relation: Relation) -> list[Edge]:
        """First hops that a question about this relation of this entity may have left out."""
        kinds = self.kinds(name)
        foreign = bool(kinds and relation.of) and not kinds & set(relation.of)
        return [e for e in self._from(name) if foreign or e.relation in relation.through]

    def kinds(self, name: str) -> set[str]:
        """What kinds of thing an entity is by the edges that lead to it, else by those that leave;
        empty where they do not agree."""
        at = [self.relations[e.relation] for e in self._into.get(self.entity(name), ())]
        left = [self.relations[e.relation] for e in self._from(name)]
        for kinds in ([set(r.gives) for r in at], [set(r.of) for r in left]):
            known = [some for some in kinds if some]
            if known:
                return set.intersection(*known)
        return set()


def _longest(
    question: str, names: Mapping[str, str], flags: re.RegexFlag, ending: str = ""
) -> tuple[str, tuple[int, int]] | None:
    """The longest of the names, each with what it stands for, that is in a question as words."""
    folded = question.casefold()
    there = [name for name in names if name.casefold() in folded]
    for name in sorted(there, key=lambda name: (-len(name), name)):
        if match := re.search(rf"(?<!\w){re.escape(name)}{ending}(?!\w)", question, flags):
            return names[name], match.span()
    return None
