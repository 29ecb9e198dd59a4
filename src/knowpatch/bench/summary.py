"""A cell's rows as numbers: each metric's mean, before and after, with its interval."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from knowpatch.bench.retention import Retention, Scored, retention
from knowpatch.bench.schema import CellFacts, Row, ScoreRow, facts_of, rows_of
from knowpatch.bench.statistics import (
    STREAM,
    Combine,
    Design,
    Floats,
    Record,
    Records,
    Resamples,
    Summary,
    column,
    combined,
    plain,
    summary_of,
)
from knowpatch.errors import DataError
from knowpatch.metrics.metric import (
    Columns,
    Metric,
    Values,
    part_columns,
    total_columns,
    value_columns,
)

Catalogue = Mapping[str, Metric]


@dataclass(frozen=True)
class Reading:
    """How a metric's values are read; of one that is not in the catalogue, as plain means."""

    name: str
    about: str = "not in the catalogue: plain means"
    protocol: str = "unknown"
    better: Literal["more", "less", "neither"] = "neither"
    published: bool = False
    percent: bool = False
    columns: Callable[[Values], Columns] = value_columns
    combine: Combine = plain


def reading(name: str, catalogue: Catalogue) -> Reading:
    """How the metric called `name` is read."""
    found = catalogue.get(name)
    if found is None:
        return Reading(name)
    return Reading(
        name,
        found.about,
        found.protocol,
        found.better,
        found.published,
        found.percent,
        found.columns,
        plain if found.combine is Metric.combine else found.combine,
    )


@dataclass(frozen=True)
class Cell:
    """A cell as it is on disk.

    Attributes:
        id: its folder's name.
        open: whether it holds patches, which only a cell that is not finished does.
    """

    id: str
    facts: CellFacts
    rows: tuple[Row, ...]
    open: bool

    @property
    def final(self) -> list[Row]:
        """The last word on each case, in the dataset's order; of a case run twice the later."""
        found = {row.case: row for row in self.rows if row.final}
        return sorted(found.values(), key=lambda row: row.index)

    def design(self, rows: Sequence[Row]) -> Design:
        """Which records hang together: a stream's neighbours, and cases about one subject."""
        if self.facts.mode == "sequential":
            return STREAM
        return Design(groups=tuple(row.subject or row.case for row in rows))


@dataclass(frozen=True)
class Part:
    """One sub-kind of a metric: means over the records that have it."""

    after: Summary
    before: Summary | None


@dataclass(frozen=True)
class MetricSummary:
    """One metric of a cell.

    Attributes:
        after, before: of the edited and of the unedited model.
        gain: after minus before, over records that have both.
        parts: by sub-kind, where there are any.
        micro: mean over all queries alike, after and before.
        queries: how many those are, of the edited model.
        unscored: reasons to how many records could not be scored for them.
    """

    reading: Reading
    after: Summary | None
    before: Summary | None
    gain: Summary | None
    parts: Mapping[str, Part]
    micro: tuple[float | None, float | None]
    queries: int
    unscored: Mapping[str, int]


@dataclass(frozen=True)
class CellSummary:
    """A cell in numbers.

    Attributes:
        records: rows that are the last word on their case, failures included.
        expected: how many there should be; None where nothing says.
        failures: (case, why) of every row without scores, earlier moments included.
        seconds: median and mean per edit; peak_mb: the most of any.
    """

    cell: Cell
    records: int
    expected: int | None
    metrics: Mapping[str, MetricSummary]
    failures: tuple[tuple[str, str], ...]
    seconds: tuple[float, float] | None
    peak_mb: float | None
    retention: Mapping[str, Retention]

    @property
    def facts(self) -> CellFacts:
        return self.cell.facts

    @property
    def complete(self) -> bool:
        """Whether all cases have their last word."""
        return not self.cell.open and self.records >= (self.expected or 1)


def cell_of(folder: Path) -> Cell:
    """The cell whose folder this is."""
    patches = folder / "patches"
    is_open = patches.is_dir() and any(patches.iterdir())
    return Cell(folder.name, facts_of(folder), tuple(rows_of(folder)), is_open)


def cells_of(folder: Path) -> list[Cell]:
    """The cells of a results folder, in the order of what they are.

    Raises:
        DataError: there are none, or one is damaged.
    """
    found = [cell_of(path) for path in sorted((folder / "cells").glob("*/"))]
    if not found:
        raise DataError(f"{folder}: no cells of results in it; run a plan into it first")
    return sorted(found, key=lambda cell: (*_kind(cell.facts), cell.facts.method, cell.id))


def _kind(facts: CellFacts) -> tuple[str, ...]:
    return (str(sorted(facts.model.items())), facts.mode, facts.dataset, facts.split)


def summaries_of(folder: Path, catalogue: Catalogue) -> list[CellSummary]:
    """All cells of a results folder in numbers.

    A cell without a limit should have as many cases as the fullest cell of the same data.
    """
    cells = cells_of(folder)
    most: dict[tuple[str, str, str], int] = {}
    for cell in cells:
        key = (cell.facts.dataset, cell.facts.split, cell.facts.digest)
        most[key] = max(most.get(key, 0), len(cell.final))
    found = []
    for cell in cells:
        facts = cell.facts
        fullest = most[facts.dataset, facts.split, facts.digest] or None
        found.append(summarise(cell, catalogue, facts.limit or fullest))
    return found


def summarise(cell: Cell, catalogue: Catalogue, expected: int | None = None) -> CellSummary:
    """One cell in numbers.

    Args:
        expected: how many cases it should have; by default as many as were asked for.
    """
    final = cell.final
    resamples = Resamples(len(final), cell.design(final))
    seconds = [row.seconds for row in final if row.seconds is not None]
    peaks = [row.peak_mb for row in final if row.peak_mb is not None]
    # The plan's order first, then what else there is.
    names = dict.fromkeys([*cell.facts.metrics, *(n for row in final for n in sorted(row.scores))])
    readings = [reading(name, catalogue) for name in names]
    return CellSummary(
        cell=cell,
        records=len(final),
        expected=expected or cell.facts.limit,
        metrics={
            r.name: _metric(r, [row.scores.get(r.name) for row in final], resamples)
            for r in readings
            if any(r.name in row.scores for row in final)
        },
        failures=tuple(dict.fromkeys((r.case, r.error) for r in cell.rows if r.error is not None)),
        seconds=(statistics.median(seconds), statistics.fmean(seconds)) if seconds else None,
        peak_mb=max(peaks, default=None),
        retention=_retention(cell, readings),
    )


def _metric(how: Reading, scores: list[ScoreRow | None], resamples: Resamples) -> MetricSummary:
    values = [score.after if score else None for score in scores]
    values_before = [score.before if score else None for score in scores]
    after, before = ([_columns(how, v) for v in side] for side in (values, values_before))
    parts, parts_before = ([_parts(how, v) for v in side] for side in (values, values_before))
    shared = [bool(a and b) for a, b in zip(after, before, strict=True)]
    gained = [[r if ok else None for r, ok in zip(x, shared, strict=True)] for x in (after, before)]
    means = resamples.means(after, before, *gained, parts, parts_before)
    curves = [combined(columns, how.combine) for columns in means[:4]]
    return MetricSummary(
        reading=how,
        after=summary_of(curves[0], after, share=how.percent),
        before=summary_of(curves[1], before, share=how.percent),
        gain=summary_of(curves[2] - curves[3], gained[0]),
        parts=_part_summaries(how, (parts, means[4]), (parts_before, means[5])),
        micro=(micro(values), micro(values_before)),
        queries=sum(len(q) for found in values if found for q in found.values()),
        unscored=Counter(score.unscored for score in scores if score and score.unscored),
    )


def _columns(how: Reading, values: Values | None) -> Record | None:
    return how.columns(values) if values else None


def _parts(how: Reading, values: Values | None) -> Record | None:
    """The columns of sub-kinds; "" is no sub-kind, and what is summed up has none."""
    if how.columns is total_columns:
        return None
    return {kind: mean for kind, mean in part_columns(values or {}).items() if kind} or None


def _part_summaries(how: Reading, *sides: tuple[Records, Mapping[str, Floats]]) -> dict[str, Part]:
    """Each sub-kind, after and (where there is such a side) before."""
    found = {}
    for kind in sorted(sides[0][1]):
        after, before = (
            summary_of(means[kind], column(records, kind), share=how.percent)
            if kind in means
            else None
            for records, means in sides
        )
        if after is not None:
            found[kind] = Part(after, before)
    return found


def micro(values: Sequence[Values | None]) -> float | None:
    """The mean over all queries of all records alike."""
    queries = [q for record in values for kind in (record or {}).values() for q in kind]
    return statistics.fmean(queries) if queries else None


def _retention(cell: Cell, readings: Sequence[Reading]) -> dict[str, Retention]:
    """The retention of each metric along a sequential cell; of a moment run twice, the later."""
    if cell.facts.mode != "sequential":
        return {}
    rows = list({(row.index, row.edits): row for row in cell.rows}.values())
    found = {}
    for how in readings:
        scored = []
        for row in rows:
            value = record_value(how, row.scores.get(how.name))
            if value is not None:
                scored.append(Scored(row.index, row.edits, row.age, value, row.final))
        if told := retention(scored, share=how.percent, ages=cell.facts.ages):
            found[how.name] = told
    return found


def record(how: Reading, score: ScoreRow | None) -> Record | None:
    """A record's columns, of the edited model."""
    return _columns(how, score.after if score else None)


def record_value(how: Reading, score: ScoreRow | None) -> float | None:
    """The metric's value of one record alone, of the edited model."""
    columns = record(how, score)
    return how.combine(dict(columns)) if columns else None
