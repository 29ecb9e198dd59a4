"""`knowpatch scan`: what was done to a model, read off its weights beside those of its base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from knowpatch.cli import screen
from knowpatch.cli.options import Device, Json, check_writable
from knowpatch.files import write_atomically

if TYPE_CHECKING:
    from knowpatch.locate.scan import Scanned

MOST = 24
"""Tensors that are listed: those that changed most."""


def run(
    model: Annotated[
        str, typer.Argument(help="A folder with safetensors weights, or a GGUF file.")
    ],
    base: Annotated[
        str | None,
        typer.Option(help="What it was made from; by default the bundled SmolLM2-135M-Instruct."),
    ] = None,
    subjects: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Subjects to look for, one a line; else about 120."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all of it there as JSON, too.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Tell which matrices of a model differ from its base's, by which rank, and whom they point at.

    The model is never run, and nothing is ever unpickled.
    """
    from knowpatch.locate.scan import names, scan
    from knowpatch.models.compare import check_alike, checkpoint, tokenizers_differ

    check_writable(out)
    asked = names(subjects)
    with screen.reporting() as report:
        mine, theirs = (checkpoint(name, report) for name in (model, base))
        check_alike(mine, theirs)
        from knowpatch.editing import load

        view = load(base, device=device, dtype="float32", progress=report).view
        found = scan(view, mine, theirs, asked, progress=report)
    told = {
        "model": model,
        "base": view.source,
        "subjects": len(asked),
        "tokenizer_differs": tokenizers_differ(mine, theirs),
        "tensors": [_facts(one) for one in found],
    }
    if out is not None:
        content = json.dumps(told, ensure_ascii=False, allow_nan=False, indent=2)
        write_atomically(out, f"{content}\n".encode())
    if as_json:
        screen.print_json(told)
    else:
        _show(screen.out(), told, found)


def _facts(one: Scanned) -> dict[str, Any]:
    pointed = [{**asdict(each), "stands_out": each.stands_out} for each in one.subjects]
    return {**asdict(one), "subjects": pointed}


def _show(console: Console, told: Mapping[str, Any], found: Sequence[Scanned]) -> None:
    names = f"{escape(told['model'])} beside {escape(told['base'])}"
    console.print(f"[bold]{names}[/]: {_counted(found)}", soft_wrap=True)
    if told["tokenizer_differs"]:
        console.print("the tokenizers differ: the same text is read as other tokens")
    largest = sorted(found, key=lambda one: -one.share)[:MOST]
    table = Table("tensor", "shape", "rank", "change / tensor")
    for one in (one for one in found if one in largest):
        shape = " x ".join(map(str, one.shape))
        table.add_row(escape(one.name), shape, _rank(one), screen.percent(one.share))
    if found:
        console.print(table)
    if len(found) > MOST:
        console.print(f"the {MOST} that changed most; --json has all {len(found)}")
    for one in largest:
        _show_pointed(console, one)


def _counted(found: Sequence[Scanned]) -> str:
    return "1 tensor differs" if len(found) == 1 else f"{len(found)} tensors differ"


def _rank(one: Scanned) -> str:
    if one.rank is None:
        return "-"
    return "full" if one.rank == min(one.shape) else str(one.rank)


def _show_pointed(console: Console, one: Scanned) -> None:
    """Whom a change of few directions points at, and what it writes."""
    if one.typical is not None:
        outstanding = [each for each in one.subjects if each.stands_out]
        typical = screen.percent(one.typical)
        line = f"acts at a typical subject with {typical} of the matrix's output"
        if not outstanding:
            line += f"; none stands out (most: {one.subjects[0].subject})"
        console.print(f"\n[bold]{escape(one.name)}[/] {escape(line)}", soft_wrap=True)
        for each in outstanding:
            said = f"; writes {_quoted(each.words)}" if each.words else ""
            console.print(
                f"  {escape(each.subject)}: {screen.percent(each.response)}, {each.deviations:.0f} "
                f"deviations above that{escape(said)}",
                soft_wrap=True,
            )
    for sign, some in zip("+-", one.words, strict=False):
        told = f"first direction, {sign}: {_quoted(some)}"
        console.print(f"  {escape(one.name)}, {escape(told)}", style="dim", soft_wrap=True)


def _quoted(words: Sequence[str]) -> str:
    return " ".join(repr(word) for word in words)
