"""`knowpatch locate change`: what patches do to the weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from knowpatch.cli import screen
from knowpatch.cli.options import Device, Json, Model, read_patches

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from knowpatch.bench.statistics import Summary
    from knowpatch.locate.portrait import Portrait

MOST = 12
"""Matrices that are listed one by one."""


def run(
    patch: Annotated[
        list[Path], typer.Argument(help="A patch, or a folder of them; of several, the means.")
    ],
    model: Model = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it: a .png or .svg file.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """What patches change: which matrices, how sparsely, and which words are written there.

    A change is a patch's own, over the model as it came; the model is left as it is.
    """
    from knowpatch.cli.options import check_writable
    from knowpatch.editing import load
    from knowpatch.errors import InputError
    from knowpatch.locate.canvas import check_picture, saved
    from knowpatch.locate.change_picture import change_picture, shown
    from knowpatch.locate.portrait import portrait

    check_writable(out)
    check_picture(out)
    patches = read_patches(patch)
    with screen.reporting() as report:
        edited = load(model, device=device, progress=report)
        for one in patches:
            edited.hold(one)
        found = []
        for number, one in enumerate(patches):
            report("measuring changes", number, len(patches))
            found.append(portrait(edited.view, one))
        report("measuring changes", len(patches), len(patches))
    drawn = [one for one in found if one.matrices]
    if out is not None:
        if not drawn:
            raise InputError("nothing to draw: no patch changes a weight; leave out --out")
        saved(change_picture(drawn, _title(drawn, edited.view.source)), out)
    if as_json:
        screen.print_json(_facts(edited.view.source, found, shown(drawn), out))
    else:
        _show(found, out)


def _title(found: Sequence[Portrait], source: str) -> str:
    methods = ", ".join(dict.fromkeys(one.patch.provenance.method for one in found))
    facts = sum(len(one.patch.provenance.requests) for one in found)
    patches = "" if len(found) == 1 else f", mean of {len(found)} patches"
    return f"{methods}: {facts} fact{'s' * (facts != 1)}{patches}, in {source}"


def _facts(
    source: str, found: Sequence[Portrait], maps: Sequence[str], out: Path | None
) -> dict[str, Any]:
    from knowpatch.locate.portrait import WAYS, averages, hits

    return {
        "model": source,
        "patches": [one.plain(maps) for one in found],
        "means": {name: asdict(summary) for name, summary in averages(found).items()},
        "hits": {
            answer: {
                way: {
                    str(k): {name: asdict(one) for name, one in at.items()}
                    for k, at in hits(found, way, answer).items()
                }
                for way in WAYS
            }
            for answer in ("new", "old")
        },
        "picture": None if out is None else str(out),
    }


def _show(found: Sequence[Portrait], out: Path | None) -> None:
    from knowpatch.locate.portrait import averages

    console = screen.out()
    for one in found:
        name = f"{one.patch.id[:12]} ({one.patch.provenance.method})"
        console.print(f"[bold]{escape(name)}[/]", soft_wrap=True)
        for line in one.besides:
            console.print(f"  {escape(line)}", soft_wrap=True)
        if not one.matrices:
            console.print("  changes no weight")
    if len(found) == 1 and found[0].matrices:
        _show_matrices(console, found[0])
    elif means := averages(found):
        _show_means(console, means)
    _show_words(console, found)
    if out is not None:
        console.print(f"picture {escape(str(out))}", soft_wrap=True)


COLUMNS = {
    "relative": "change / matrix",
    "top_columns": "mass in 5 columns",
    "percent_columns": "in 1 % of columns",
    "top_rows": "in 5 rows",
    "hoyer_columns": "Hoyer, columns",
    "stable_rank": "stable rank",
}


def _show_matrices(console: Console, one: Portrait) -> None:
    table = Table("matrix", *COLUMNS.values())
    largest = sorted(one.matrices, key=lambda matrix: -matrix.mass)[:MOST]
    for matrix in (matrix for matrix in one.matrices if matrix in largest):
        values = vars(matrix.sparsity)
        table.add_row(escape(matrix.label), *(_told(name, values[name]) for name in COLUMNS))
    if len(one.matrices) > MOST:
        console.print(f"{len(one.matrices)} matrices; the {MOST} that change most:")
    console.print(table)


def _told(name: str, value: float) -> str:
    percent = name in ("relative", "top_columns", "percent_columns", "top_rows")
    return f"{100 * value:.2g} %" if percent else f"{value:.3g}"


def _show_means(console: Console, means: Mapping[str, Summary]) -> None:
    table = Table("mean over patches", "", "95 % interval")
    for name, words in COLUMNS.items():
        one = means[name]
        between = "" if one.low is None or one.high is None else _between(name, one.low, one.high)
        table.add_row(words, _told(name, one.mean), between)
    console.print(table)


def _between(name: str, low: float, high: float) -> str:
    return f"{_told(name, low)} to {_told(name, high)}"


def _show_words(console: Console, found: Sequence[Portrait]) -> None:
    from knowpatch.locate.portrait import WAYS, hits

    table = Table("new answer in the 5 changed columns", "k", "before", "after", "random columns")
    for way in WAYS:
        for k, at in hits(found, way).items():
            table.add_row(
                way, str(k), *(_share(at[name]) for name in ("before", "after", "random"))
            )
    if table.row_count:
        console.print(table)


def _share(one: Summary) -> str:
    between = "" if one.low is None else f" ({100 * one.low:.0f} to {100 * (one.high or 0):.0f})"
    return f"{100 * one.mean:.0f} %{between}"
