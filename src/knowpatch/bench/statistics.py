"""Means over records with their intervals, and comparisons of two methods on the same records.

The unit that is drawn anew is the record, never the query or the token: a record's queries hang
together. Records that hang together themselves are drawn together (Design). A record is a dict of
columns; what is reported is a function (`combine`) of the columns' means, which is computed anew in
each replicate, so that ratios and harmonic means have honest intervals.

A replicate is kept as how often each record is in it, so that all columns' means are one product
of matrices.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Record = Mapping[str, float]
Records = Sequence[Record | None]
"""Columns of each record; a record may lack any of them, and None has none."""
Combine = Callable[[dict[str, float]], float | None]

REPLICATES, FLIPS = 2000, 10_000
SEED = 2401
CHUNK = 500
STREAM_BLOCK = 20
LEAST_BLOCKS = 10
Z95 = 1.959963984540054


def plain(means: dict[str, float]) -> float | None:
    """The mean of the column "value"; known to this module, which need not call it."""
    return means.get("value")


@dataclass(frozen=True)
class Summary:
    """A mean over `n` records with its 95 % interval; no interval where one record is all."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Paired:
    """One method minus another over the records that both have, and the p of no difference."""

    difference: Summary
    p: float


@dataclass(frozen=True)
class Design:
    """Which records are drawn together.

    Attributes:
        groups: a key for each record; records of the same key (the same subject) go together.
        block: how many consecutive records go together, for a stream whose records depend on what
            came just before. Shorter where the stream would not hold ten blocks.
    """

    groups: tuple[Hashable, ...] | None = None
    block: int = 1

    def units(self, n: int) -> NDArray[np.int64]:
        """The number of each record's group."""
        numbers: dict[Hashable, int] = {}
        keys = range(n) if self.groups is None else self.groups
        return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)

    def length(self, units: int) -> int:
        """The block's length among so many groups."""
        return max(1, min(self.block, units // LEAST_BLOCKS))


RECORDS = Design()
STREAM = Design(block=STREAM_BLOCK)


class Resamples:
    """Replicates of `n` records; equal n, design and seed give the same ones."""

    def __init__(
        self,
        n: int,
        design: Design = RECORDS,
        *,
        replicates: int = REPLICATES,
        seed: int = SEED,
    ) -> None:
        # The first line is the records as they are: estimate and replicates are computed alike.
        self.weights = np.vstack([np.ones((1, n)), *_drawn(n, design, replicates, seed)])

    def means(self, *tables: Records) -> list[dict[str, Floats]]:
        """For each table, each column's mean: first over the records, then over each replicate.

        Only records that have a column count for it; NaN where a replicate holds none.
        """
        arrays = [_array(table) for table in tables]
        values = np.hstack([values for _, values in arrays])
        known = np.isfinite(values)
        counts = self.weights @ known.astype(float)
        found = _ratio(self.weights @ np.where(known, values, 0.0), counts)
        ends = np.cumsum([len(names) for names, _ in arrays])
        parts = np.split(found, ends[:-1], axis=1)
        return [
            dict(zip(names, part.T, strict=True))
            for (names, _), part in zip(arrays, parts, strict=True)
        ]

    def summary(
        self, records: Records, combine: Combine = plain, *, share: bool = False
    ) -> Summary | None:
        """What `combine` makes of the records; None where it makes nothing of them.

        Args:
            share: whether values are shares, so that all zeros or all ones get Wilson's interval
                (replicates of equal values are all equal and would claim certainty).
        """
        wanted = column(records, "value") if combine is plain else records
        [means] = self.means(wanted)
        return summary_of(combined(means, combine), wanted, share=share)


def _drawn(n: int, design: Design, replicates: int, seed: int) -> Iterator[Floats]:
    """How often each record is in each replicate, a chunk of replicates at a time."""
    random = np.random.Generator(np.random.PCG64(seed))
    unit = design.units(n)
    count = int(unit.max()) + 1 if n else 0
    length = design.length(count)
    for start in range(0, replicates if n else 0, CHUNK):
        size = min(CHUNK, replicates - start)
        first = random.integers(0, count, (size, -(-count // length), 1))
        # Blocks run on from the end to the beginning, else the ends would be drawn too seldom.
        picked = ((first + np.arange(length)) % count).reshape(size, -1)[:, :count]
        numbered = picked + count * np.arange(size)[:, None]
        often = np.bincount(numbered.ravel(), minlength=size * count).reshape(size, count)
        yield often[:, unit].astype(float)


def _array(records: Records, names: Sequence[str] | None = None) -> tuple[list[str], Floats]:
    """Columns' names, and records x columns with NaN for what is missing."""
    given = [record or {} for record in records]
    chosen = list(names if names is not None else dict.fromkeys(c for r in given for c in r))
    values = [[record.get(name, math.nan) for name in chosen] for record in given]
    return chosen, np.array(values, dtype=float).reshape(len(given), len(chosen))


def _ratio(sums: Floats, counts: Floats) -> Floats:
    nothing = np.full_like(sums, math.nan)
    return np.divide(sums, counts, out=nothing, where=counts > 0)


def combined(means: Mapping[str, Floats], combine: Combine) -> Floats:
    """`combine` of every line of the columns' means; NaN where it gives nothing."""
    if not means:
        return np.array([math.nan])
    if combine is plain:
        found = means.get("value")
        return np.full_like(next(iter(means.values())), math.nan) if found is None else found
    names, columns = list(means), np.column_stack(list(means.values())).tolist()
    return np.array([_one(dict(zip(names, line, strict=True)), combine) for line in columns])


def _one(means: dict[str, float], combine: Combine) -> float:
    try:
        found = combine({name: mean for name, mean in means.items() if mean == mean})
    except ZeroDivisionError:  # a ratio whose denominator happens to be empty in a replicate
        return math.nan
    return math.nan if found is None else found


def having(records: Records) -> int:
    """How many records have the scarcest of the columns."""
    counts = Counter(
        name for record in records for name, value in (record or {}).items() if math.isfinite(value)
    )
    return min(counts.values(), default=0)


def column(records: Records, name: str) -> Records:
    """The records with this column alone; None for those that lack it."""
    return [{name: record[name]} if record and name in record else None for record in records]


def summary_of(curve: Floats, records: Records, *, share: bool = False) -> Summary | None:
    """The estimate and its interval, of a statistic over the records and over the replicates."""
    estimate, n = float(curve[0]), having(records)
    if not math.isfinite(estimate):
        return None
    replicates = curve[1:][np.isfinite(curve[1:])]
    if share and estimate in (0.0, 1.0) and (replicates == estimate).all():
        return Summary(estimate, *wilson(n if estimate else 0, n), n)
    if n < 2 or not len(replicates):
        return Summary(estimate, None, None, n)
    low, high = np.percentile(replicates, [2.5, 97.5])
    return Summary(estimate, float(low), float(high), n)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share, square = successes / n, Z95 * Z95 / n
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(share * (1 - share) * square + square * square / 4) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(
    records: Records,
    combine: Combine = plain,
    *,
    share: bool = False,
    design: Design = RECORDS,
    replicates: int = REPLICATES,
    seed: int = SEED,
) -> Summary | None:
    """The mean of the records and its interval; see Resamples.summary."""
    resamples = Resamples(len(records), design, replicates=replicates, seed=seed)
    return resamples.summary(records, combine, share=share)


def paired(
    a: Records, b: Records, combine: Combine = plain, *, design: Design = RECORDS, seed: int = SEED
) -> Paired | None:
    """`a` minus `b`, records in the same order; None where no record has both."""
    return paired_all([(a, b, combine)], design=design, seed=seed)[0]


def paired_all(
    pairs: Sequence[tuple[Records, Records, Combine]],
    *,
    design: Design = RECORDS,
    seed: int = SEED,
) -> list[Paired | None]:
    """Several comparisons over the same records, with the same replicates and flips."""
    if not pairs or not len(pairs[0][0]):
        return [None for _ in pairs]
    both = [(*_both(a, b), combine) for a, b, combine in pairs]
    resamples = Resamples(len(both[0][0]), design, seed=seed)
    means = resamples.means(*(side for a, b, _ in both for side in (a, b)))
    curves = [
        combined(means[2 * i], combine) - combined(means[2 * i + 1], combine)
        for i, (_, _, combine) in enumerate(both)
    ]
    flipped = _flipped(both, design, seed)
    found: list[Paired | None] = []
    for curve, others, (a, _, _) in zip(curves, flipped, both, strict=True):
        summary = summary_of(curve, a)
        found.append(None if summary is None else Paired(summary, _p(summary.mean, others)))
    return found


def _both(a: Records, b: Records) -> tuple[Records, Records]:
    """The same records, with None where either has nothing."""
    pairs = [(x, y) if x and y else (None, None) for x, y in zip(a, b, strict=True)]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _p(difference: float, flipped: Floats) -> float:
    """The share of flips that differ at least as much; the observed one is one of them."""
    near = 1e-12 * max(1.0, abs(difference))
    reached = ~(np.abs(flipped) < abs(difference) - near)  # NaN counts as reached
    return float((1 + reached.sum()) / (1 + len(flipped)))


def _flipped(
    pairs: Sequence[tuple[Records, Records, Combine]], design: Design, seed: int
) -> list[Floats]:
    """The differences when each record's (or block's) two values are swapped by a coin."""
    sides = [_sides(a, b) for a, b, _ in pairs]
    change = np.hstack([b - a for _, a, b in sides])
    moved = _coins(len(change), design, seed, change)
    found, at = [], 0
    for (names, a, b), (_, _, combine) in zip(sides, pairs, strict=True):
        mine = moved[:, at : at + a.shape[1]]
        at += a.shape[1]
        swapped = []
        for sums in (a.sum(axis=0) + mine, b.sum(axis=0) - mine):
            means = _ratio(sums[:, : len(names)], np.rint(sums[:, len(names) :]))
            swapped.append(combined(dict(zip(names, means.T, strict=True)), combine))
        found.append(swapped[0] - swapped[1])
    return found


def _sides(a: Records, b: Records) -> tuple[list[str], Floats, Floats]:
    """Both sides' values (0 for missing) and, in further columns, whether they are there."""
    names = list(dict.fromkeys(name for record in (*a, *b) for name in record or ()))
    arrays = [_array(side, names)[1] for side in (a, b)]
    known = [np.isfinite(array) for array in arrays]
    first, second = (
        np.hstack([np.where(there, array, 0.0), there])
        for array, there in zip(arrays, known, strict=True)
    )
    return names, first, second


def _coins(n: int, design: Design, seed: int, change: Floats) -> Floats:
    """For each of the flips, the sum of the changes of those records whose coin says to swap."""
    random = np.random.Generator(np.random.PCG64(seed))
    unit = design.units(n)
    unit = unit // design.length(int(unit.max()) + 1)
    count = int(unit.max()) + 1
    found = []
    for start in range(0, FLIPS, CHUNK):
        size = min(CHUNK, FLIPS - start)
        drawn = np.frombuffer(random.bytes(-(-size * count // 8)), dtype=np.uint8)
        bits = np.unpackbits(drawn)[: size * count].reshape(size, count)
        found.append(bits[:, unit].astype(float) @ change)
    return np.vstack(found)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's correction of the p values of several comparisons, in their order."""
    adjusted, least = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        least = max(least, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = least
    return adjusted


def records_needed(half_width: float, rate: float = 0.5) -> int:
    """How many records give a share near `rate` an interval of plus or minus `half_width`."""
    return math.ceil(1.96**2 * rate * (1 - rate) / half_width**2)
