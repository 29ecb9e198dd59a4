"""What came of a suite, for a person and as plain data; `check` and `edit --guard` tell it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from knowpatch.cli.screen import one_line

if TYPE_CHECKING:
    from knowpatch.checks.examine import Finding, Group, Verdict

MOST_SHOWN = 12
"""Questions of a list that are shown; those that do not hold first."""
NAMES = {
    "change": "must change",
    "keep": "must not change",
    "perplexity": "perplexity",
    "multiple_choice": "multiple choice",
}


def facts(verdict: Verdict) -> dict[str, Any]:
    """A verdict as plain data."""
    return {
        "passed": verdict.passed,
        "groups": [
            {
                "name": group.name,
                "passed": group.passed,
                "held": group.held,
                "asked": len(group.findings),
                "least": group.least,
                "findings": [asdict(one) for one in group.findings],
            }
            for group in verdict.groups
        ],
    }


def show(console: Console, verdict: Verdict) -> None:
    """The table, and a line for each part of the suite."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "asked", "wanted", "before", "after"):
        table.add_column(name, no_wrap=True)
    left_out = 0
    for group in verdict.groups:
        shown = _shown(group)
        left_out += len(group.findings) - len(shown)
        for one in shown:
            table.add_row(*_row(one))
    console.print(table)
    if left_out:
        console.print(f"... and {left_out} more that hold (--json has all)", style="dim")
    console.print()
    for group in verdict.groups:
        console.print(_line(group))
    failed = [NAMES[group.name] for group in verdict.groups if not group.passed]
    told = "[green]passed[/]" if not failed else f"[red]failed[/]: {', '.join(failed)}"
    console.print(f"[bold]{told}[/]")


def _shown(group: Group) -> Sequence[Finding]:
    """All that do not hold, and some that do, in the suite's order."""
    failing = [one for one in group.findings if not one.holds]
    holding = [one for one in group.findings if one.holds]
    chosen = {id(one) for one in [*failing, *holding[: max(0, MOST_SHOWN - len(failing))]]}
    return [one for one in group.findings if id(one) in chosen]


def _row(one: Finding) -> tuple[str, ...]:
    mark = "[green]ok[/]" if one.holds else "[red]not[/]"
    asked = one_line(one.asked, 40) + (", chat" if one.chat else "")
    return mark, asked, *(one_line(text, 22) for text in (one.wanted, one.before, one.after))


def _line(group: Group) -> str:
    if group.name not in ("change", "keep"):
        (one,) = group.findings
        said = f"{one_line(one.before)} → {one_line(one.after)}; {one_line(one.wanted)}"
    else:
        least = f"at least {100 * group.least:.4g} %"
        said = f"{group.held} of {len(group.findings)} hold; {least}"
    return f"{NAMES[group.name]:<16} {said}: {'passed' if group.passed else '[red]failed[/]'}"
