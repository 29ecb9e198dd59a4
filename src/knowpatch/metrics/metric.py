"""Metric and Score: what a metric is, and what it gives for one case.

A metric is a function of a case and of the two models, `before` (unedited) and `after`. It asks its
questions, which are answered later together with those of all other metrics and cases, and returns
a function that makes a Score of the answers:

    @metric(protocol="teacher-forced", about="share of the target's tokens that lead")
    def success_tf(case, before, after):
        asked = [after.force(p.prompt, p.expected) for p in case.of("rewrite")]
        return lambda: Score({"": [future.result().accuracy for future in asked]})

Where a case has nothing that the metric could ask, it returns None: the case does not count. A
Score without values is unscored, which is not zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from knowpatch.data.case import Case
from knowpatch.metrics.asker import Asker
from knowpatch.registry import Registry

Protocol = Literal["teacher-forced", "probability", "free generation", "multiple choice", "judge"]
Values = Mapping[str, Sequence[float]]
"""Sub-kind ("" where there is none) to the value of each of its queries."""
Columns = dict[str, float]


@dataclass(frozen=True)
class Score:
    """What one metric says of one case.

    Attributes:
        after: of the edited model: sub-kind to the value of each query.
        before: the same of the unedited model, measured by the same code; None where there is no
            such value (a comparison of the two models).
        unscored: why there is no value, where there is none.
    """

    after: Values
    before: Values | None = None
    unscored: str | None = None

    @classmethod
    def none(cls, reason: str, before: Values | None = None) -> Score:
        """A case that the metric applies to but cannot score; the unedited model's value, if there
        is one, counts all the same."""
        return cls({}, before or None, reason)


def macro(values: Values | None) -> float | None:
    """Queries to their sub-kind's mean, sub-kinds to the record's; None where there are none."""
    means = [fmean(queries) for queries in (values or {}).values() if len(queries)]
    return fmean(means) if means else None


def value_columns(values: Values) -> Columns:
    """One column, "value": the record's mean over its sub-kinds."""
    found = macro(values)
    return {} if found is None else {"value": found}


def part_columns(values: Values) -> Columns:
    """A column for each sub-kind: its mean over the record's queries."""
    return {kind: fmean(queries) for kind, queries in values.items() if len(queries)}


def total_columns(values: Values) -> Columns:
    """A column for each sub-kind: its sum over the record's queries."""
    return {kind: sum(queries) for kind, queries in values.items() if len(queries)}


Result = Callable[[], Score]
Ask = Callable[[Case, Asker, Asker], Result | None]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: unique; says its protocol, so that forced and free answers never share a name.
        protocol: how answers are had.
        about: what is measured, one line.
        ask: asks of one case; see the module.
        better: whether more or less is better, or neither.
        published: whether it repeats a published computation with its faults, for comparison only.
        percent: whether it is a share, shown as a percentage.
        general: whether it asks general questions, which no case has of its own.
        setting: what its values depend on besides the models (a judge), as text.
        columns: a record's score as numbers whose means over records are taken.
        combine: those means to the metric's value; by default there is one, "value". Intervals
            resample records and combine anew.
    """

    name: str
    protocol: Protocol
    about: str
    ask: Ask = field(repr=False)
    better: Literal["more", "less", "neither"] = "more"
    published: bool = False
    percent: bool = True
    general: bool = False
    setting: Callable[[], str] | None = field(default=None, repr=False)
    columns: Callable[[Values], Columns] = field(default=value_columns, repr=False)
    combine: Callable[[Columns], float | None] = field(
        default=lambda means: means.get("value"), repr=False
    )


METRICS: Registry[Sequence[Metric]] = Registry(
    "group of metrics",
    package="knowpatch.metrics.kinds",
    group="knowpatch.metrics",
    variable="KNOWPATCH_METRICS",
)


def metric(*, protocol: Protocol, about: str, **facts: Any) -> Callable[[Ask], Metric]:
    """Decorator: make a Metric of the function; its name is the function's."""

    def make(ask: Ask) -> Metric:
        return Metric(ask.__name__, protocol, about, ask, **facts)

    return make


def register(group: str, *metrics: Metric) -> None:
    """Enter a file's metrics under its stem."""
    METRICS.register(group)(metrics)
