"""How the command line draws: progress on stderr, tables and JSON on stdout."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from time import monotonic
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from knowpatch.progress import Progress as Report


def out() -> Console:
    """The console for results; wide enough for a table where there is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def say(line: str) -> None:
    """One line on standard output, as it is; what a terminal would obey is spelled out."""
    plain = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in line)
    sys.stdout.write(f"{plain}\n")


def print_json(value: Any) -> None:
    narrow = (sys.stdout.encoding or "utf-8").lower().replace("-", "") != "utf8"
    sys.stdout.write(json.dumps(value, ensure_ascii=narrow, allow_nan=False, indent=2) + "\n")


@contextlib.contextmanager
def reporting(*, remaining: bool = False) -> Iterator[Report]:
    """A progress reporter that draws one line per stage on stderr.

    Args:
        remaining: for long work: the steps done, and an estimate of the time that is left. Where
            there is no terminal, a line now and then.
    """
    console = Console(file=sys.stderr)
    columns = [TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn()]
    if remaining:
        columns += [MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn()]
    lines = _Lines() if remaining else None
    with Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stderr=False,
        disable=not console.is_terminal,
    ) as bars:
        stages: dict[str, TaskID] = {}
        announced: set[str] = set()

        def report(stage: str, done: int, total: int) -> None:
            if lines is not None and not console.is_terminal:
                lines.tell(stage, done, total)
                return
            if stage not in stages:
                if not console.is_terminal and stage not in announced:
                    sys.stderr.write(f"{stage} ...\n")
                    announced.add(stage)
                stages[stage] = bars.add_task(stage, total=total)
            bars.update(stages[stage], completed=done, total=total)
            if done >= total:
                bars.remove_task(stages.pop(stage))

        yield report


class _Lines:
    """Progress of long work where there is no terminal: a line when a stage begins and ends, and
    one every EVERY seconds with an estimate."""

    EVERY = 20.0

    def __init__(self) -> None:
        self.stage, self.first, self.start, self.last = "", 0, 0.0, 0.0

    def tell(self, stage: str, done: int, total: int) -> None:
        now = monotonic()
        if stage != self.stage:
            self.stage, self.first, self.start, self.last = stage, done, now, 0.0
        if done < total and now - self.last < self.EVERY:
            return
        self.last = now
        new = done - self.first
        left = f", about {(now - self.start) / new * (total - done):.0f} s left" if new > 0 else ""
        sys.stderr.write(f"{stage}: {done} of {total}{left if done < total else ''}\n")
        sys.stderr.flush()


def one_line(text: str, limit: int = 48) -> str:
    """A text for a table cell: one line, cut, with markup escaped."""
    flat = " ".join(text.split())
    return escape(flat if len(flat) <= limit else f"{flat[: limit - 1]}…")


def counted(count: int, noun: str) -> str:
    """How many there are of something, in words."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def percent(share: float, *, sign: str = "") -> str:
    """A share to two figures; whole from a hundred per cent on, and never as 2e+02."""
    value = 100 * share
    return f"{value:{sign}.{'0f' if abs(value) >= 99.5 else '2g'}} %"


def human_bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit in ("bytes", "kB") else f"{count:.1f} {unit}"
