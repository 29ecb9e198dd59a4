"""What `locate trace` and `locate attribute` found, as text, JSON, a picture, and rows."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from knowpatch.cli import screen

if TYPE_CHECKING:
    from knowpatch.bench.statistics import Summary
    from knowpatch.locate.averages import Curve
    from knowpatch.locate.rows import Row
    from knowpatch.locate.studies import Found, Study

BARS, DIGITS = " ▁▂▃▄▅▆▇█", " 123456789"
"""From nothing to the largest value; the second where the terminal has no bars."""


@dataclass(frozen=True)
class Wanted:
    """What is to become of the results.

    Attributes:
        model: where it came from; study: what was asked of it.
        what: what was restored, in words; unit: of the effects.
        out: a picture; rows: a file of rows; as_json: whether JSON is printed.
    """

    model: str
    study: Study
    what: str
    unit: str
    out: Path | None
    rows: Path | None
    as_json: bool

    def heading(self, row: Row) -> str:
        """The title of one prompt's picture."""
        return f"{self.what}: {row['prompt']!r}, {row['answer'].strip()!r} ({self.model})"

    def heading_of(self, found: Found) -> str:
        """The title of an average's picture."""
        return f"{self.what}: {len(found.rows)} facts ({self.model})"


def tell_one(wanted: Wanted, row: Row) -> None:
    """One prompt's map."""
    from knowpatch.locate.canvas import saved
    from knowpatch.locate.trace_picture import map_picture

    if wanted.out is not None:
        saved(map_picture(row, wanted.heading(row), wanted.unit), wanted.out)
    if wanted.as_json:
        screen.print_json({"model": wanted.model, **wanted.study.settings, **row})
        return
    console = screen.out()
    show_prompt(console, wanted, row)
    console.print(map_table(row, wanted.unit))
    show_files(console, wanted)


def tell_many(
    wanted: Wanted, found: Found, more: Mapping[str, Summary | None] | None = None
) -> None:
    """Averages by token role; `more` are other means over the facts, by name."""
    from knowpatch.locate.averages import role_curves
    from knowpatch.locate.canvas import saved
    from knowpatch.locate.trace_picture import average_picture

    roles = role_curves(found.rows)
    if wanted.out is not None:
        saved(average_picture(roles, wanted.heading_of(found), wanted.unit), wanted.out)
    plain = {name: summary_facts(summary) for name, summary in (more or {}).items()}
    if finish(wanted, found, {"roles": {r: c.facts() for r, c in roles.items()}, **plain}):
        return
    console = screen.out()
    show_found(console, wanted, found)
    console.print(curve_table(roles, "tokens", wanted.unit))
    for name, summary in (more or {}).items():
        console.print(f"{name}: {interval(summary)}")
    show_files(console, wanted)


def finish(wanted: Wanted, found: Found, averages: Mapping[str, Any]) -> bool:
    """Write the rows, and print JSON if that is wanted; whether it was."""
    from knowpatch.locate.averages import means
    from knowpatch.locate.rows import write_rows

    settings = {"model": wanted.model, **wanted.study.settings}
    if wanted.rows is not None:
        write_rows(wanted.rows, settings, [*found.rows, *found.dropped])
    if wanted.as_json:
        over_facts = {name: summary_facts(summary) for name, summary in means(found.rows).items()}
        screen.print_json({**settings, **counts(found), **over_facts, **averages})
    return wanted.as_json


def counts(found: Found) -> dict[str, int]:
    """How many facts there were."""
    return {
        "asked": found.asked,
        "known": found.known,
        "dropped": len(found.dropped),
        "facts": len(found.rows),
    }


def summary_facts(summary: Summary | None) -> dict[str, Any] | None:
    if summary is None:
        return None
    return {"mean": summary.mean, "low": summary.low, "high": summary.high, "n": summary.n}


def show_prompt(console: Console, wanted: Wanted, row: Row) -> None:
    """A prompt, what the model says, and what noise does to that."""
    noise = wanted.study.settings["noise"]
    console.print(f"[dim]{escape(wanted.model)}[/]")
    console.print(f"prompt  {escape(row['prompt'])}", soft_wrap=True)
    console.print(
        f"answer  {escape(repr(row['answer'].strip()))}: p {row['high']:.3f}, with noise on the "
        f"subject {row['low']:.3f} ({noise['draws']} draws, {noise['scale']:g} x "
        f"{noise['sigma']:.3f})",
        soft_wrap=True,
    )
    console.print(f"\n{wanted.what}\n", markup=False)


def show_found(console: Console, wanted: Wanted, found: Found) -> None:
    """How many facts there were, and what noise does to their answers."""
    from knowpatch.locate.averages import means

    console.print(f"[dim]{escape(wanted.model)}[/]")
    console.print(
        f"facts   {found.asked} asked, {found.known} known, {len(found.dropped)} left out (noise "
        "takes too little of the answer)",
        soft_wrap=True,
    )
    said = {name: interval(summary) for name, summary in means(found.rows).items()}
    console.print(
        f"answer  p {said['high']}, with noise on the subject {said['low']}; means with 95 % "
        "intervals",
        soft_wrap=True,
    )
    console.print(f"\n{wanted.what}\n", markup=False)


def show_files(console: Console, wanted: Wanted) -> None:
    for name, path in (("picture", wanted.out), ("rows", wanted.rows)):
        if path is not None:
            console.print(f"{name:<7} {escape(str(path))}", soft_wrap=True)


def map_table(row: Row, unit: str) -> Table:
    """A map: tokens down, layers across; the subject's tokens with a star."""
    effects = row["effects"]
    layers, top = len(effects[0]), max(map(max, effects))
    table = _table("token", layers, unit)
    first, stop = row["subject_tokens"]
    for number, (token, values) in enumerate(zip(row["tokens"], effects, strict=True)):
        name = screen.one_line(token, 24) + ("*" if first <= number < stop else "")
        best = max(range(layers), key=lambda i: values[i])
        told = (f"{values[best]:.3f}", str(best)) if number >= first else ("", "")
        table.add_row(name, bars(values, top), *told)
    return table


def curve_table(curves: Mapping[str, Curve], head: str, unit: str) -> Table:
    """Mean curves: a name, a bar for each layer, the peak with its intervals."""
    top = max(float(curve.mean_L.max()) for curve in curves.values())
    table = _table(head, len(next(iter(curves.values())).mean_L), unit)
    table.add_column("facts", justify="right")
    for name, curve in curves.items():
        where = str(curve.peak)
        if curve.peak_low != curve.peak_high:
            where += f" ({curve.peak_low} to {curve.peak_high})"
        letters = bars(map(float, curve.mean_L), top)
        table.add_row(name, letters, interval(curve.at_peak()), where, str(curve.n))
    return table


def _table(head: str, layers: int, unit: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(head)
    table.add_column(f"layers 0 to {layers - 1}", no_wrap=True, min_width=layers)
    table.add_column(f"most, {unit}", justify="right")
    table.add_column("at layer", justify="right")
    return table


def bars(values: Iterable[float], top: float) -> str:
    """A letter for each value, from nothing to `top`; what is below zero is nothing."""
    letters = BARS if (sys.stdout.encoding or "utf-8").lower().startswith("utf") else DIGITS
    steps = len(letters) - 1
    shares = (max(0.0, value) / top if top > 0 else 0.0 for value in values)
    return "".join(letters[min(steps, round(share * steps))] for share in shares)


def interval(summary: Summary | None) -> str:
    """A mean with its interval."""
    if summary is None:
        return "none"
    if summary.low is None or summary.high is None:
        return f"{summary.mean:.3f}"
    return f"{summary.mean:.3f} ({summary.low:.3f} to {summary.high:.3f})"
