"""`knowpatch init`: make a workspace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from knowpatch.cli import screen
from knowpatch.cli.options import Author, Json, Model, note_of


def run(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where .knowpatch is made.", show_default=".")
    ] = Path(),
    model: Model = None,
    author: Author = None,
    as_json: Json = False,
) -> None:
    """Make a workspace (.knowpatch): edits made below it are recorded and can be taken back."""
    from knowpatch.ledger import Workspace
    from knowpatch.ledger.place import model_named
    from knowpatch.models.origin import resolve

    named, note = model_named(model, folder), note_of(author, None)
    made = Workspace.create(folder, model=named, note=note)
    facts = {"workspace": str(made.folder), "model": model, "head": made.history.head}
    if as_json:
        screen.print_json(facts)
        return
    what = "the bundled model" if model is None else escape(model)
    if model is not None and resolve(model).kind == "hub":  # which a misspelt folder is taken for
        what += " (a hub id: there is no such folder or file here)"
    console = screen.out()
    console.print(f"{escape(str(made.folder))}: a workspace for {what}", soft_wrap=True)
    console.print(
        "next    knowpatch edit PROMPT --subject S --target T -m REASON; knowpatch log", style="dim"
    )
