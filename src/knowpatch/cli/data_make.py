"""`knowpatch data make`: a file of cases about countries and cities, as many as are wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from knowpatch.cli import screen
from knowpatch.cli.options import Device, Dtype, Json, Model


def run(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write (.jsonl).")],
    count: Annotated[int, typer.Option(min=1, help="How many cases.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the choice of targets and questions.")] = 0,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    any_: Annotated[
        bool, typer.Option("--any", help="Any facts; by default those that the model knows.")
    ] = False,
    relations: Annotated[
        list[str] | None,
        typer.Option("--relation", metavar="NAME", help="Only facts of this kind; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make cases to order: facts about countries and cities, with another answer each."""
    from knowpatch.data.jsonl import write_cases
    from knowpatch.data.make import make
    from knowpatch.editing import load
    from knowpatch.errors import OptionError

    if out.suffix != ".jsonl":
        raise OptionError(f"{out}: a file of cases ends in .jsonl")
    with screen.reporting() as report:
        edited = None if any_ else load(model, device=device, dtype=dtype, progress=report)
        made = make(count, seed=seed, model=edited, relations=relations, progress=report)
    write_cases(made.cases, out)
    facts: dict[str, Any] = {
        "file": str(out),
        "cases": len(made.cases),
        "relations": made.by_relation,
        "seed": seed,
        "model": edited.view.source if edited else None,
        "asked": made.asked,
        "known": made.kept,
    }
    if as_json:
        screen.print_json(facts)
    else:
        _draw(facts)


def _draw(facts: dict[str, Any]) -> None:
    console = screen.out()
    console.print(f"[bold]{facts['cases']} cases[/] in {escape(facts['file'])}")
    for name, count in facts["relations"].items():
        console.print(f"  {name}: {count}")
    if facts["model"] is not None:
        known = f"{facts['known']} of the {facts['asked']} facts that it was asked"
        console.print(f"{escape(facts['model'])} knows {known}")
