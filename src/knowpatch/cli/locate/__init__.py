"""`knowpatch locate`: where a model keeps what it knows; one verb a file."""

from __future__ import annotations

import typer

from knowpatch.cli.locate import (
    attribute,
    change,
    compare,
    lens,
    neurons,
    roundtrip,
    suggest,
    trace,
)

app = typer.Typer(no_args_is_help=True, help="Where a model keeps what it knows.")


@app.callback()
def _about() -> None:
    """Where a model keeps what it knows."""


for verb in (trace, attribute, change, compare, lens, neurons, roundtrip, suggest):
    app.command(verb.__name__.rpartition(".")[2])(verb.run)
