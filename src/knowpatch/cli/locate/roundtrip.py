"""`knowpatch locate roundtrip`: edit, edit back, and what does not return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    from knowpatch.locate.journeys import Row
    from knowpatch.method import EditMethod

ERRORS = 3
"""Errors that are shown."""


def run(
    dataset: Annotated[
        str,
        typer.Argument(help="Cases of one edit with its old answer: NAME, NAME:SPLIT or a file."),
    ],
    method: Annotated[
        list[str], typer.Option(help="A method, see: knowpatch methods; repeatable.")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="METHOD.KEY=VALUE", help="An option of one of the methods; repeatable."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Facts at most, from the beginning.")] = 25,
    data: Data = None,
    model: Model = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it: a .png or .svg file.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Edit facts there and back, by editing and by dropping the patches: what is left of it?

    Killed at any moment, the same command goes on where it stopped. Exit code 1: every fact failed.
    """
    from knowpatch.data.source import load as load_cases
    from knowpatch.editing import load
    from knowpatch.locate.canvas import check_picture, saved
    from knowpatch.locate.journeys import means, rows_at
    from knowpatch.locate.journeys import run as travel
    from knowpatch.locate.roundtrip import trips
    from knowpatch.locate.roundtrip_picture import roundtrip_picture

    check_writable(out)
    check_picture(out)
    methods = _methods(method, set_ or [], seed)
    loaded = load_cases(dataset, data=data)
    some = trips(loaded.cases, limit)
    rows: dict[str, list[Row]] = {}
    with screen.reporting(remaining=True) as report:
        edited = load(model, device=device, progress=report)
        for one in methods:
            one.check(edited.view)
        for one in methods:
            path = rows_at(edited, one, f"{loaded.name}:{loaded.split}:{loaded.digest}")
            rows[one.name] = travel(edited, one, some, path, progress=report)
    found = {name: means(mine) for name, mine in rows.items()}
    usable = {name: mine for name, mine in found.items() if mine}
    if out is not None and usable:
        title = f"{len(some)} facts of {loaded.name}:{loaded.split}, in {edited.view.source}"
        saved(roundtrip_picture(usable, title), out)
    if as_json:
        source = edited.view.source
        screen.print_json(_facts(source, dataset, rows, found, out if usable else None))
    else:
        _show(rows, found, out if usable else None)
    raise typer.Exit(0 if usable else 1)


def _methods(names: Sequence[str], settings: Sequence[str], seed: int) -> list[EditMethod]:
    """The methods, each with its own options; a key without a method is for all of them."""
    from knowpatch.editing import choose
    from knowpatch.errors import OptionError
    from knowpatch.method import parse_options

    wanted = list(dict.fromkeys(names))
    options: dict[str, dict[str, Any]] = {name: {} for name in wanted}
    for key, value in parse_options(settings).items():
        name, dot, option = key.partition(".")
        if dot and name not in options:
            raise OptionError(
                f"--set {key}: no --method {name} was given; given: {', '.join(wanted)}"
            )
        for each in [name] if dot else wanted:
            options[each][option if dot else key] = value
    return [choose(name, options[name], seed=seed) for name in wanted]


def _facts(
    source: str,
    dataset: str,
    rows: Mapping[str, Sequence[Row]],
    found: Mapping[str, Mapping[str, Summary]],
    out: Path | None,
) -> dict[str, Any]:
    return {
        "model": source,
        "dataset": dataset,
        "methods": {
            name: {
                "means": {key: asdict(one) for key, one in found[name].items()},
                "rows": list(mine),
            }
            for name, mine in rows.items()
        },
        "picture": None if out is None else str(out),
    }


TOLD = {
    "success": ("both edits took, %", 100.0),
    "weights_left": ("left in the weights, %", 100.0),
    "cosine": ("cosine of the two changes", 1.0),
    "edited_back.distortion": ("distortion of true answers, nats", 1.0),
    "edited_back.failed": ("facts most of whose other answers fell, %", 100.0),
    "kl_there": ("KL on control prompts after the first edit, nats", 1.0),
    "edited_back.kl": ("... after editing back", 1.0),
    "dropped.kl": ("... after dropping both", 1.0),
    "dropped.bytes_same": ("weights byte for byte as they were after dropping, %", 100.0),
}


def _show(
    rows: Mapping[str, Sequence[Row]],
    found: Mapping[str, Mapping[str, Summary]],
    out: Path | None,
) -> None:
    from knowpatch.locate.journeys import ERROR

    console = screen.out()
    table = Table("", *map(escape, rows))
    counted = [sum(ERROR not in row for row in mine) for mine in rows.values()]
    table.add_row("facts", *map(str, counted))
    for name, (words, scale) in TOLD.items():
        cells = [_told(mine.get(name), scale) for mine in found.values()]
        table.add_row(words, *cells)
    console.print(table)
    for name, mine in rows.items():
        failed = [row for row in mine if ERROR in row]
        if failed:
            console.print(f"{len(failed)} facts could not be edited by {escape(name)}:")
        for row in failed[:ERRORS]:
            console.print(f"  {row['case']}: {row[ERROR]}", markup=False, soft_wrap=True)
    if out is not None:
        console.print(f"picture {escape(str(out))}", soft_wrap=True)


def _told(one: Summary | None, scale: float) -> str:
    if one is None:
        return "–"
    low, high = one.low, one.high
    between = "" if low is None or high is None else f" ({scale * low:.3g} to {scale * high:.3g})"
    return f"{scale * one.mean:.3g}{between}"
