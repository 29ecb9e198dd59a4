"""`knowpatch locate compare`: is what is located the fact, or its subject?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from knowpatch.cli import screen
from knowpatch.cli.data import Data
from knowpatch.cli.options import Device, Json, Model, Seed, check_writable

if TYPE_CHECKING:
    from knowpatch.bench.statistics import Summary
    from knowpatch.locate.compare import Comparison

SHOWN = (5, 10)
"""Numbers of blocks whose RSim the table shows."""


def run(
    file: Annotated[
        str,
        typer.Argument(
            help="Facts with subjects (.json, .jsonl), or a dataset: NAME or NAME:SPLIT."
        ),
    ],
    by: Annotated[
        str, typer.Option(help="The locator: attribution, tracing or neurons.")
    ] = "attribution",
    limit: Annotated[int, typer.Option(min=1, help="Facts at most, from the beginning.")] = 40,
    all_: Annotated[
        bool, typer.Option("--all", help="Also facts that the model does not know.")
    ] = False,
    data: Data = None,
    model: Model = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it: a .png or .svg file.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Are related prompts located in the same blocks, and unrelated ones elsewhere?

    What was located is kept: a run that was stopped goes on where it was.
    """
    from knowpatch.editing import load
    from knowpatch.locate.canvas import check_picture, saved
    from knowpatch.locate.compare import compared
    from knowpatch.locate.compare_picture import compare_picture
    from knowpatch.locate.facts import known, read_facts
    from knowpatch.locate.locators import locator

    check_writable(out)
    check_picture(out)
    how = locator(by)
    facts = read_facts(file, data=data)
    with screen.reporting(remaining=True) as report:
        edited = load(model, device=device, progress=report)
        chosen, asked = facts[:limit], len(facts[:limit])
        if not all_:
            chosen, asked = known(edited, facts, most=limit, progress=report)
        found = compared(edited.view, how, chosen, seed=seed, progress=report)
    if out is not None:
        title = f"{found.facts} facts by {how.name}, in {edited.view.source}"
        saved(compare_picture(found, title), out)
    if as_json:
        screen.print_json(_facts(edited.view.source, file, how.name, asked, found, out))
    else:
        _show(how.about, asked, found, out)


def _facts(
    source: str, file: str, by: str, asked: int, found: Comparison, out: Path | None
) -> dict[str, Any]:
    peak, centre, curve = found.own
    return {
        "model": source,
        "facts_from": file,
        "asked": asked,
        "locator": by,
        **{name: value for name, value in asdict(found).items() if name != "own"},
        "own": {"peak": asdict(peak), "centre": asdict(centre), "curve": curve},
        "verdict": found.verdict,
        "picture": None if out is None else str(out),
    }


def _show(about: str, asked: int, found: Comparison, out: Path | None) -> None:
    console = screen.out()
    console.print(f"{found.facts} facts of {asked} asked, by {escape(about)}", soft_wrap=True)
    if found.left_out:
        console.print(f"{found.left_out} prompts left out: too little to do with their answers")
    counts = [n for n in SHOWN if n <= min(len(one.rsim) for one in found.kinds.values())]
    table = Table(
        "beside its own prompt",
        "prompts",
        *(f"RSim, {n} blocks" for n in counts),
        "Pearson's r",
        "peak",
    )
    peak = found.own[0]
    table.add_row("(its own)", str(found.facts), *("" for _ in counts), "", _told(peak, 1))
    for kind, one in found.kinds.items():
        rsims = [_told(one.rsim[n - 1]) for n in counts]
        table.add_row(kind, str(one.prompts), *rsims, _told(one.correlation), _told(one.peak, 1))
    console.print(table)
    console.print(found.verdict, soft_wrap=True)
    if out is not None:
        console.print(f"picture {escape(str(out))}", soft_wrap=True)


def _told(one: Summary, digits: int = 2) -> str:
    between = "" if one.low is None else f" ({one.low:.{digits}f} to {one.high:.{digits}f})"
    return f"{one.mean:.{digits}f}{between}"
