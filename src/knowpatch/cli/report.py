"""The tables of `knowpatch edit`: the fix, and what else moved."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from knowpatch.cli.screen import one_line, percent
from knowpatch.data.case import NEIGHBOUR, REWRITE
from knowpatch.effects import Effect, moved_by_kind
from knowpatch.probes import CONTROL, OUGHT_TO_STAY, SUBJECT

MOST_FIXES, MOST_MOVED, MOST_SIZES = 12, 8, 3
NAMES = {
    SUBJECT: "the same subject, asked otherwise",
    NEIGHBOUR: "the same prompt, other subjects",
    CONTROL: "control prompts",
}


SHORT = {SUBJECT: "subject", NEIGHBOUR: "other", CONTROL: "control"}


def show_effects(console: Console, result: dict[str, Any], effects: list[Effect]) -> None:
    """Print the fix and what else moved."""
    taken = result["took_each"]
    verdict = "[green]the edit took[/]" if result["took"] else "[red]the edit did not take[/]"
    if len(taken) > 1:
        verdict += f" ({sum(taken)} of {len(taken)})"
    console.print(f"\n[bold]{escape(result['model'])}[/], {result['method']}: {verdict}\n")
    fixes = [e for e in effects if e.probe.kind not in OUGHT_TO_STAY]
    _fixes(console, fixes, forgets=result["forgets"])
    _moved(console, effects)


def _fixes(console: Console, effects: list[Effect], *, forgets: bool) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    numbers = ("tokens right", "probability")
    for name in ("", "asked", "before", "after", *numbers):
        table.add_column(name, justify="right" if name in numbers else "left", no_wrap=True)
    for effect in effects[:MOST_FIXES]:
        probe, before, after = effect.probe, effect.before, effect.after
        table.add_row(
            ("prompt" if probe.kind == REWRITE else probe.kind) + (", chat" if probe.chat else ""),
            one_line(probe.prompt, 32),
            one_line(before.text, 18),
            one_line(after.text, 18),
            f"{_share(before.accuracy)} → {_share(after.accuracy)}",
            f"{_chance(before.probability)} → {_chance(after.probability)}",
        )
    console.print(table)
    wanted = list(dict.fromkeys(effect.expected for effect in effects))
    if len(wanted) == 1:
        of = "old answer, to be forgotten" if forgets else "wanted answer"
        console.print(
            f"tokens right and probability: of the {of}, {one_line(wanted[0])!r}, forced",
            style="dim",
        )
    ways = {e.probe.chat: e.after.accuracy for e in effects if e.probe.kind == REWRITE}
    if ways.get(False) == 1 and ways.get(True) not in (None, 1):
        console.print("the chat template leads past this edit: --chat edits there", style="dim")
    if len(effects) > MOST_FIXES:
        console.print(f"... and {len(effects) - MOST_FIXES} more (--json has all)", style="dim")


def _share(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{accuracy:.2f}"


def _chance(probability: float | None) -> str:
    return "<.01" if probability is not None and probability < 0.005 else _share(probability)


def _moved(console: Console, effects: list[Effect]) -> None:
    console.print("\n[bold]What else moved[/] (answers that are not the same text any more)")
    for kind, (moved, total) in moved_by_kind(effects).items():
        if total:
            console.print(f"  {NAMES[kind]:<36} {moved:>3} of {total}")
    found = [e for e in effects if e.probe.kind in OUGHT_TO_STAY and e.moved]
    others = list({effect.probe.prompt: effect for effect in found}.values())
    if others:
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 2))
        # The least certain first: where the old answer lost most.
        for effect in sorted(others, key=lambda e: e.after.accuracy or 0.0)[:MOST_MOVED]:
            table.add_row(
                SHORT[effect.probe.kind],
                one_line(effect.probe.prompt, 44),
                one_line(effect.before.text, 28),
                "→",
                one_line(effect.after.text, 28),
            )
        console.print(table, style="dim")
    if len(others) > MOST_MOVED:
        console.print(f"    ... and {len(others) - MOST_MOVED} more (--json has all)", style="dim")
    console.print()


def show_foresight(console: Console, told: dict[str, Any]) -> None:
    """Print what a change of weights may disturb besides, and how large it is."""
    near = [("control", "", one) for one in told["controls"]]
    near += [("edit", one["edit"][:12], one) for one in told["earlier"]]
    if near:
        console.print(
            "[bold]What it may disturb[/] (how strongly the change acts at other keys; at its own: "
            "1)"
        )
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 2))
        for kind, name, one in near:
            reach = f"{one['reach']:.2f}"
            table.add_row(kind, reach, name, one_line(one["prompt"], 60))
        console.print(table)
        console.print()
    sizes = sorted(told["sizes"], key=lambda one: -one["share"])
    for one in sizes[:MOST_SIZES]:
        total = f" (with earlier edits {percent(one['total'])})"
        total = total if abs(one["total"] - one["share"]) > 1e-6 * one["share"] else ""
        share = f"{percent(one['share'])} of the norm of {escape(one['parameter'])}"
        console.print(f"size    {share}{total}", soft_wrap=True)
    if len(sizes) > MOST_SIZES:
        console.print(f"        and of {len(sizes) - MOST_SIZES} more (--json has all)")
