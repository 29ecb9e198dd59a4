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

    made = Workspace.create(folder, model=_named(model, folder), note=note_of(author, None))
    facts = {"workspace": str(made.folder), "model": model, "head": made.history.head}
    if as_json:
        screen.print_json(facts)
        return
    what = "the bundled model" if model is None else escape(model)
    console = screen.out()
    console.print(f"{escape(str(made.folder))}: a workspace for {what}", soft_wrap=True)
    console.print(
        "next    knowpatch edit PROMPT --subject S --target T -m REASON; knowpatch log", style="dim"
    )


def _named(model: str | None, folder: Path) -> str | None:
    """A model as the workspace names it: a path from its own folder if it is below, else whole.

    Raises:
        InputError: a path that leads nowhere.
    """
    from knowpatch.models.origin import resolve

    if model is None:
        return None
    origin = resolve(model)
    if origin.kind not in ("folder", "gguf"):
        return model
    path = origin.path.absolute().resolve()
    root = folder.absolute().resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
