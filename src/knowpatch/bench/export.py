"""The report for programs: rows and means as CSV, everything as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from knowpatch.bench.groups import Comparison, Group
from knowpatch.bench.schema import Row
from knowpatch.bench.statistics import Summary
from knowpatch.bench.summary import CellSummary, MetricSummary

CELL = ("cell", "label", "method", "dataset", "split", "mode")
ROW = ("case", "index", "edits", "age", "final", "metric", "sub_kind", "after", "before")
WHY = ("values_after", "values_before", "unscored", "seconds", "peak_mb", "error")
MEANS = ("mean", "low", "high", "n")
DIGITS = 9


def rows_csv(groups: Sequence[Group]) -> str:
    """One line for each case, metric and sub-kind at each moment; what failed has one line."""
    return _csv((*CELL, *ROW, *WHY), _row_lines(groups))


def _row_lines(groups: Sequence[Group]) -> Iterator[Sequence[Any]]:
    for group in groups:
        for label, cell in group.cells.items():
            for row in cell.cell.rows:
                moment = (row.case, row.index, row.edits, row.age, int(row.final))
                end = (row.seconds, row.peak_mb, row.error)
                for values in _values(row):
                    yield (*_cell(label, cell), *moment, *values, *end)


def _values(row: Row) -> Iterator[tuple[Any, ...]]:
    """Metric, sub-kind, means, values apart, and why there are none."""
    if not row.scores:
        yield ("",) * 4 + ("",) * 3
    for name, score in sorted(row.scores.items()):
        before = score.before or {}
        kinds = sorted({*score.after, *before})
        if not kinds:
            yield (name, "", "", "", "", "", score.unscored)
        for kind in kinds:
            sides = [score.after.get(kind, ()), before.get(kind, ())]
            means = [sum(side) / len(side) if side else "" for side in sides]
            apart = [" ".join(map(repr, side)) for side in sides]
            yield (name, kind, *means, *apart, score.unscored)


def summary_csv(groups: Sequence[Group]) -> str:
    """One line for each cell and metric, and one for each of its sub-kinds."""
    facts = ("metric", "sub_kind", "protocol", "published", "percent", "better")
    sides = [f"{side}_{name}" for side in ("after", "before", "gain") for name in MEANS]
    tail = ("micro_after", "micro_before", "queries", "unscored", "cases", "expected", "complete")
    return _csv((*CELL, *facts, *sides, *tail), _summary_lines(groups))


def _summary_lines(groups: Sequence[Group]) -> Iterator[Sequence[Any]]:
    for group in groups:
        for label, cell in group.cells.items():
            reach = (cell.records, cell.expected, int(cell.complete))
            for name, metric in cell.metrics.items():
                how = metric.reading
                head = (*_cell(label, cell), name)
                facts = (how.protocol, int(how.published), int(how.percent), how.better)
                whole = (*_four(metric.after), *_four(metric.before), *_four(metric.gain))
                counts = (*metric.micro, metric.queries, sum(metric.unscored.values()))
                yield (*head, "", *facts, *whole, *counts, *reach)
                for kind, part in metric.parts.items():
                    sides = (*_four(part.after), *_four(part.before), *_four(None))
                    yield (*head, kind, *facts, *sides, *("",) * 4, *reach)


def _cell(label: str, cell: CellSummary) -> tuple[str, ...]:
    facts = cell.facts
    return (cell.cell.id, label, facts.method, facts.dataset, facts.split, facts.mode)


def _four(summary: Summary | None) -> tuple[Any, ...]:
    if summary is None:
        return ("",) * 4
    return (summary.mean, summary.low, summary.high, summary.n)


def _csv(columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(columns)
    for line in lines:
        writer.writerow(["" if value is None else rounded(value) for value in line])
    return target.getvalue()


def rounded(value: Any) -> Any:
    """Numbers without the digits in which two machines may differ, in whatever holds them."""
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, Mapping):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def report_json(groups: Sequence[Group], compared: Sequence[Comparison]) -> str:
    """Cells with all their numbers, and comparisons."""
    cells = [_cell_json(label, c) for group in groups for label, c in group.cells.items()]
    pairs = [
        {
            "cells": [one.group.cells[name].cell.id for name in (one.a, one.b)],
            "a": one.a,
            "b": one.b,
            "metric": one.reading.name,
            "difference": asdict(one.paired.difference),
            "p": one.paired.p,
            "p_holm": one.adjusted,
        }
        for one in compared
    ]
    whole = rounded({"cells": cells, "comparisons": pairs})
    return json.dumps(whole, ensure_ascii=False, allow_nan=False, sort_keys=True, indent=1) + "\n"


def _cell_json(label: str, cell: CellSummary) -> dict[str, Any]:
    return {
        "id": cell.cell.id,
        "label": label,
        "facts": cell.facts.model_dump(mode="json"),
        "cases": cell.records,
        "expected": cell.expected,
        "complete": cell.complete,
        "metrics": {name: metric_json(metric) for name, metric in cell.metrics.items()},
        "failures": [{"case": case, "error": why} for case, why in cell.failures],
        "seconds": None
        if cell.seconds is None
        else dict(zip(("median", "mean"), cell.seconds, strict=True)),
        "peak_mb": cell.peak_mb,
        "retention": {name: asdict(kept) for name, kept in cell.retention.items()},
    }


def metric_json(metric: MetricSummary) -> dict[str, Any]:
    """One metric's numbers as plain JSON."""
    how = metric.reading
    return {
        "protocol": how.protocol,
        "published": how.published,
        "percent": how.percent,
        "better": how.better,
        "after": metric.after and asdict(metric.after),
        "before": metric.before and asdict(metric.before),
        "gain": metric.gain and asdict(metric.gain),
        "parts": {kind: asdict(part) for kind, part in metric.parts.items()},
        "micro": dict(zip(("after", "before"), metric.micro, strict=True)),
        "queries": metric.queries,
        "unscored": dict(metric.unscored),
    }
