"""Where wraps sit in one pass, who hears what they decide, and what is kept of them.

Axes: B rows, T columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from knowpatch.parts.wraps import Decision, Kind, join, kind_of
from knowpatch.patch import Patch, Wrap

KEPT = 256
"""Joined wraps that a model keeps at most."""

_MUTED: ContextVar[frozenset[str]] = ContextVar("muted", default=frozenset())
_HEARD: ContextVar[tuple[list[Firing], ...]] = ContextVar("heard", default=())


@dataclass(frozen=True)
class Firing:
    """What a wrap decided of one row, by the entry that fired, or that came nearest.

    Attributes:
        patch: whose entry it is; kind, module: of the wrap.
        row: of the pass.
        fired: whether it answered.
        measure: what score and threshold are; these are None for what always acts.
        what: the entry in words, where it has any.
    """

    patch: Patch
    kind: str
    module: str
    row: int
    fired: bool
    measure: str
    score: float | None
    threshold: float | None
    what: str = ""


@contextlib.contextmanager
def listening() -> Iterator[list[Firing]]:
    """A list that fills, within the block and this context, with what wraps decide."""
    heard: list[Firing] = []
    token = _HEARD.set((*_HEARD.get(), heard))
    try:
        yield heard
    finally:
        _HEARD.reset(token)


def listeners() -> tuple[list[Firing], ...]:
    """Who listens in this context."""
    return _HEARD.get()


@contextlib.contextmanager
def muted(*kinds: str) -> Iterator[None]:
    """Within the block, and this context, wraps of these kinds do nothing: what trains on top of
    earlier ones of its own kind puts their sum in their place."""
    token = _MUTED.set(_MUTED.get() | set(kinds))
    try:
        yield
    finally:
        _MUTED.reset(token)


@dataclass(frozen=True, eq=False)
class Site:
    """Joined wraps on a module, of the session's rows that carry them.

    Attributes:
        key: names it among those of a pass.
        patches: whose the joined wraps are, one for each.
        source: the module whose inputs decide.
    """

    key: tuple[Any, ...]
    module: str
    source: str
    kind: Kind
    patches: tuple[Patch, ...]
    rows: tuple[int, ...]

    def firings(self, decision: Decision, rows: Tensor) -> list[Firing]:
        """What was decided, row by row; of a row that nothing fired at, what came nearest."""
        sign = -1.0 if self.kind.measure == "distance" else 1.0
        margins = sign * (decision.scores - decision.thresholds)
        found = []
        for number, row in enumerate(rows.tolist()):
            fired_M, margin_M, nearest_M = (
                each[number].reshape(-1)
                for each in (decision.entries >= 0, margins, decision.nearest)
            )
            wanted = nearest_M[fired_M].unique().tolist() or [int(nearest_M[margin_M.argmax()])]
            for entry in wanted:
                mine_M = torch.where(nearest_M == entry, margin_M, float("-inf"))
                place = int(mine_M.argmax())
                found.append(self._firing(decision, number, place, row, bool(fired_M[place])))
        return found

    def _firing(self, decision: Decision, number: int, place: int, row: int, fired: bool) -> Firing:
        score, threshold, entry = (
            each[number].reshape(-1)[place].item()
            for each in (decision.scores, decision.thresholds, decision.nearest)
        )
        owner = self.patches[self.kind.owners_N[int(entry)]]
        measure = self.kind.measure
        return Firing(owner, self.kind.kind, self.module, row, fired, measure, score, threshold)


@dataclass
class Kept:
    """What a model keeps of patches from one pass, or one question, to the next.

    Attributes:
        joined: wraps of one module as few, by module and patches.
        decided: for texts that are being written, by the cache of their attention.
        rules: prompt rules of one kind as one, by patches; encoders: by name.
    """

    joined: dict[Any, list[tuple[Kind, tuple[int, ...]]]] = field(default_factory=dict)
    decided: WeakKeyDictionary[Any, dict[Any, Decision]] = field(default_factory=WeakKeyDictionary)
    rules: dict[Any, Any] = field(default_factory=dict)
    encoders: dict[str, Any] = field(default_factory=dict)

    def sites(
        self, module: str, pairs: Sequence[tuple[Patch, Wrap]], rows: tuple[int, ...]
    ) -> list[Site]:
        """The wraps of one module, joined; the same patches and wraps are joined once."""
        key = (module, tuple((patch.id, wrap.kind) for patch, wrap in pairs))
        if key not in self.joined:
            if len(self.joined) >= KEPT:
                self.joined.pop(next(iter(self.joined)))
            self.joined[key] = join([wrap for _, wrap in pairs])
        return [
            Site(
                (module, rows, number),
                module,
                kind_of(pairs[run[0]][1]).source(pairs[run[0]][1]),
                kind,
                tuple(pairs[i][0] for i in run),
                rows,
            )
            for number, (kind, run) in enumerate(self.joined[key])
        ]


def carried_wraps(patches: Sequence[Patch]) -> list[Wrap]:
    """The wraps of patches that act in this context."""
    return [wrap for patch in patches for wrap in patch.wraps if wrap.kind not in _MUTED.get()]


def needs_whole(patches: Sequence[Patch]) -> bool:
    """Whether rows that carry these patches must be read in one piece."""
    return any(kind_of(wrap).whole() for wrap in carried_wraps(patches))


def sources(patches: Sequence[Patch]) -> list[str]:
    """The modules that decide for wraps on other modules."""
    wraps = carried_wraps(patches)
    return [path for wrap in wraps if (path := kind_of(wrap).source(wrap)) != wrap.module]
