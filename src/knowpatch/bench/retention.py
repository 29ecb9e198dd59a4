"""What a stream of edits keeps: success against the number of edits that came later.

A sequential cell is scored after some numbers of edits; a row is one edit at one such moment. Its
age is how many edits came after it. R(a) is the mean success at age a, of all edits, and of those
alone that were right at age 0 (an edit that never took cannot be forgotten). Ages are shown in
bins, 0, 1, 2-3, 4-7 and so on; the half-life and the slope use them one by one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from knowpatch.bench.statistics import (
    STREAM,
    Records,
    Resamples,
    Summary,
    column,
    combined,
    summary_of,
)

WHOLE = 1 - 1e-9


@dataclass(frozen=True)
class Scored:
    """One edit at one moment: its number in the stream, how many edits there were, its value."""

    edit: int
    edits: int
    age: int
    value: float
    final: bool


@dataclass(frozen=True)
class Curve:
    """R by age.

    Attributes:
        bins: youngest age of each bin to R there.
        half_life: least age at which R, made non-increasing, is at most half of R(0); None where
            that is not reached, or there is no row of age 0.
        oldest: the greatest age that was scored; an unreached half-life is beyond it.
        slope: of R on log2(1 + age): what each doubling of the age takes away.
        n: edits in it.
    """

    bins: Mapping[int, Summary]
    half_life: int | None
    oldest: int
    slope: Summary | None
    n: int


@dataclass(frozen=True)
class Retention:
    """One metric along one stream.

    Attributes:
        every: the curve of all edits; lasting: of those that were right at age 0.
        checkpoints: numbers of edits to the mean over the edits scored then.
        final: mean over all edits after the last one (F).
        transfer: final value minus the value at age 0, of edits that have both (BWT).
    """

    every: Curve
    lasting: Curve | None
    checkpoints: Mapping[int, Summary]
    final: Summary | None
    transfer: Summary | None


def retention(
    scored: Sequence[Scored], *, share: bool, ages: Collection[int] | None = None
) -> Retention | None:
    """The retention of one metric; None where no edit was scored at two moments or ages.

    Args:
        share: whether values are shares; else no edit counts as right, and there is no `lasting`.
        ages: the numbers of edits that are checkpoints, besides the end; by default all there are.
    """
    if len({row.age for row in scored}) < 2:
        return None
    streams: dict[int, list[Scored]] = {}
    for row in scored:
        streams.setdefault(row.edit, []).append(row)
    edits = [streams[edit] for edit in sorted(streams)]
    right = [rows for rows in edits if any(r.age == 0 and r.value >= WHOLE for r in rows)]
    resamples = Resamples(len(edits), STREAM)
    moments = [
        _means({r.edits: [r.value] for r in rows if r.final or ages is None or r.edits in ages})
        for rows in edits
    ]
    transfers = [_transfer(rows) for rows in edits]
    finals = [next(({"value": r.value} for r in rows if r.final), None) for rows in edits]
    return Retention(
        every=_curve(edits, share=share),
        lasting=_curve(right, share=share) if share and right else None,
        checkpoints=_by_number(resamples, moments, share=share),
        final=resamples.summary(finals, share=share),
        transfer=resamples.summary(transfers),
    )


def _means(values: Mapping[int, Sequence[float]]) -> dict[str, float]:
    return {str(key): sum(found) / len(found) for key, found in values.items()}


def _transfer(rows: Sequence[Scored]) -> dict[str, float]:
    first = [row.value for row in rows if row.age == 0]
    last = [row.value for row in rows if row.final]
    return {"value": last[-1] - first[0]} if first and last else {}


def _by_number(resamples: Resamples, records: Records, *, share: bool) -> dict[int, Summary]:
    """The mean of each column, whose names are numbers, in the numbers' order."""
    [means] = resamples.means(records)
    found = {}
    for name in sorted(means, key=int):
        if summary := summary_of(means[name], column(records, name), share=share):
            found[int(name)] = summary
    return found


def bin_of(age: int) -> int:
    """The youngest age of the bin: 0, 1, 2, 4, 8, ..."""
    return 0 if age == 0 else 1 << (age.bit_length() - 1)


def _curve(edits: Sequence[Sequence[Scored]], *, share: bool) -> Curve:
    resamples = Resamples(len(edits), STREAM)
    records = []
    for rows in edits:
        binned: dict[int, list[float]] = {}
        for row in rows:
            binned.setdefault(bin_of(row.age), []).append(row.value)
        records.append(_means(binned))
    points = [(row.age, row.value) for rows in edits for row in rows]
    sums = [_sums(rows) for rows in edits]
    [means] = resamples.means(sums)
    return Curve(
        bins=_by_number(resamples, records, share=share),
        half_life=half_life(points),
        oldest=max(age for age, _ in points),
        slope=summary_of(combined(means, _slope), sums),
        n=len(edits),
    )


def _sums(rows: Sequence[Scored]) -> dict[str, float]:
    """What a line of least squares needs of one edit's points."""
    points = [(math.log2(1 + row.age), row.value) for row in rows]
    return {
        "n": float(len(points)),
        "x": sum(x for x, _ in points),
        "y": sum(y for _, y in points),
        "xx": sum(x * x for x, _ in points),
        "xy": sum(x * y for x, y in points),
    }


def _slope(sums: Mapping[str, float]) -> float | None:
    spread = sums["n"] * sums["xx"] - sums["x"] ** 2
    if spread <= 1e-12 * sums["n"] * sums["xx"]:
        return None
    return (sums["n"] * sums["xy"] - sums["x"] * sums["y"]) / spread


def non_increasing(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest non-increasing values by weighted least squares (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        mean, heavy, count = value, weight, 1
        while pools and pools[-1][0] < mean:
            before, more, some = pools.pop()
            mean = (before * more + mean * heavy) / (more + heavy)
            heavy, count = heavy + more, count + some
        pools.append((mean, heavy, count))
    return [mean for mean, _, count in pools for _ in range(count)]


def half_life(points: Sequence[tuple[int, float]]) -> int | None:
    """The least age at which R, made non-increasing, is at most half of what it is at age 0."""
    by_age: dict[int, list[float]] = {}
    for age, value in points:
        by_age.setdefault(age, []).append(value)
    ages = sorted(by_age)
    if not ages or ages[0] != 0:
        return None
    means = [sum(by_age[age]) / len(by_age[age]) for age in ages]
    fitted = non_increasing(means, [float(len(by_age[age])) for age in ages])
    if fitted[0] <= 0:
        return None
    return next(
        (age for age, r in zip(ages, fitted, strict=True) if r <= fitted[0] / 2 + 1e-12), None
    )
