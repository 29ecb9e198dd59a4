"""Studies: one way of looking at facts, and what it found of all that a model knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from knowpatch.ask import Speaker
from knowpatch.errors import InputError
from knowpatch.locate.attribution import attribute
from knowpatch.locate.averages import correlation
from knowpatch.locate.facts import Fact, asked
from knowpatch.locate.noise import Noise
from knowpatch.locate.rows import EFFECTS, Row, Rows
from knowpatch.locate.severed import Severed
from knowpatch.locate.tracing import WINDOW, Tracing, settings_of
from knowpatch.models.restorations import STATE, Kind
from knowpatch.models.view import ModelView
from knowpatch.progress import Progress, silent

CORRELATION = "correlation"


class Find(Protocol):
    """Makes a fact's row; with `every` also where there is too little to bring back, and with the
    effects of each draw."""

    def __call__(self, fact: Fact, *, every: bool = False, progress: Progress = silent) -> Row: ...


class Study:
    """One way of looking at facts: what it depends on, and what it finds of one.

    Args:
        settings: what rows depend on besides the fact, as plain data.
        find: makes a fact's row; without effects where there is too little to bring back.
    """

    def __init__(self, settings: Mapping[str, Any], find: Find) -> None:
        self.settings, self.find = settings, find
        self.rows = Rows(settings)

    def of(self, fact: Fact) -> Row:
        """A fact's row: found now, or found before."""
        return self.rows.of(fact) or self.rows.add(fact, self.find(fact))


def tracing(view: ModelView, noise: Noise, *, kind: Kind = STATE, window: int = WINDOW) -> Study:
    """Exact effects of every token and layer."""

    def find(fact: Fact, *, every: bool = False, progress: Progress = silent) -> Row:
        begun = Tracing(view, fact, noise, kind=kind)
        if not (every or begun.runs.enough):
            return begun.runs.about()
        return begun.trace(window=window, progress=progress).facts(draws=every)

    return Study(settings_of(view, noise, kind, window, method="tracing"), find)


def severed(view: ModelView, noise: Noise) -> Study:
    """Effects of states at the subject's last token, with nothing, MLPs or attentions severed."""

    def find(fact: Fact, *, every: bool = False, progress: Progress = silent) -> Row:
        begun = Severed(view, fact, noise)
        if not (every or begun.runs.enough):
            return begun.runs.about()
        return begun.facts(progress=progress)

    return Study(settings_of(view, noise, STATE, 1, method="severed"), find)


def attribution(
    view: ModelView,
    noise: Noise,
    *,
    kind: Kind = STATE,
    window: int = WINDOW,
    points: int = 1,
    exact: bool = False,
) -> Study:
    """Estimated effects; with `exact` also their rank correlation with the exact ones."""
    truth = tracing(view, noise, kind=kind, window=window) if exact else None

    def find(fact: Fact, *, every: bool = False, progress: Progress = silent) -> Row:
        found = attribute(view, fact, noise, kind=kind, window=window, points=points)
        if not (every or found.enough):
            return found.about()
        row = found.facts(draws=every)
        if truth is not None:
            other = truth.find(fact, every=True, progress=progress) if every else truth.of(fact)
            row[CORRELATION] = correlation(row, other)
        return row

    how = {"method": "attribution", "points": points, "exact": exact}
    return Study(settings_of(view, noise, kind, window, **how), find)


@dataclass(frozen=True)
class Found:
    """What a study found.

    Attributes:
        rows: those with effects; dropped: those of facts with too little to bring back.
        asked: facts that the model was asked about; known: those of them that it knows.
    """

    rows: list[Row]
    dropped: list[Row]
    asked: int
    known: int

    def check(self) -> None:
        """InputError where nothing is left to average."""
        if not self.rows:
            raise InputError(
                f"nothing to average: of {self.asked} facts the model knows {self.known}, and of "
                f"{len(self.dropped)} the noise takes too little of the answer; give other facts, "
                "or more noise with --noise"
            )


def run(
    model: Speaker,
    facts: Sequence[Fact],
    study: Study,
    *,
    most: int | None = None,
    progress: Progress = silent,
) -> Found:
    """Look at all facts that a model knows, in order; a run that was stopped goes on.

    Args:
        most: rows with effects that are enough.
    """
    rows: list[Row] = []
    dropped: list[Row] = []
    count = 0
    total = len(facts) if most is None else min(most, len(facts))
    for fact, knows in asked(model, facts):
        if len(rows) == most:
            break
        progress("facts", len(rows) if most is not None else count, total)
        count += 1
        if knows:
            row = study.of(fact)
            (rows if EFFECTS in row else dropped).append(row)
    progress("facts", total, total)
    return Found(rows, dropped, count, len(rows) + len(dropped))
