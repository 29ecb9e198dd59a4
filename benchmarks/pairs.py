"""Measure two ways of doing the same thing, in turn and in one process."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any


@dataclass(frozen=True)
class Pair:
    """One measured pair; ratio is plain / ours, low and high the spread over the rounds."""

    name: str
    ratio: float
    low: float
    high: float
    ours: float
    plain: float
    unit: str
    n: int
    settings: dict[str, Any]


def arguments(about: str) -> argparse.Namespace:
    """--json, --quick, and the names of pairs to run (all by default)."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("pairs", nargs="*", help="names of pairs; all by default")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON value")
    parser.add_argument("--quick", action="store_true", help="ends within 60 seconds on 2 cores")
    return parser.parse_args()


def measure(
    name: str,
    ours: Callable[[], Any],
    plain: Callable[[], Any],
    *,
    n: int,
    unit: str,
    settings: dict[str, Any],
    per: tuple[float, float] = (1, 1),
) -> Pair:
    """Run both sides in turn, n times after nothing else.

    Args:
        name: of the pair.
        ours, plain: the two sides.
        n: rounds.
        unit: of the figures, for example "s per request".
        settings: what was measured.
        per: what the seconds of ours and of plain are divided by.
    """
    times: list[tuple[float, float]] = []
    for number in range(n):
        print(f"{name}: round {number + 1} of {n}", file=sys.stderr, flush=True)
        times.append((_seconds(ours) / per[0], _seconds(plain) / per[1]))
    ratios = [slow / fast for fast, slow in times]
    return Pair(
        name,
        round(statistics.median(ratios), 3),
        round(min(ratios), 3),
        round(max(ratios), 3),
        round(statistics.median(fast for fast, _ in times), 4),
        round(statistics.median(slow for _, slow in times), 4),
        unit,
        n,
        settings,
    )


def _seconds(work: Callable[[], Any]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


def report(pairs: Sequence[Pair], *, as_json: bool) -> None:
    """Print the pairs, for a person or as one line of JSON."""
    if as_json:
        print(json.dumps([asdict(pair) for pair in pairs]))
        return
    for pair in pairs:
        print(f"{pair.name}: {pair.ratio}x ({pair.low} to {pair.high}, n = {pair.n})")
        print(f"  ours {pair.ours} {pair.unit}, plain {pair.plain} {pair.unit}")
        for key, value in pair.settings.items():
            print(f"  {key}: {value}")
