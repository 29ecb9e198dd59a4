"""`knowpatch tag`: name a state, or list the names."""

from __future__ import annotations

from typing import Annotated

import typer

from knowpatch.cli import screen
from knowpatch.cli.columns import columns
from knowpatch.cli.options import Author, Json, Reason, note_of


def run(
    name: Annotated[str | None, typer.Argument(help="Letters, digits and . _ -")] = None,
    state: Annotated[str, typer.Argument(help="An edit's id, another tag, base or now.")] = "now",
    reason: Reason = None,
    author: Author = None,
    as_json: Json = False,
) -> None:
    """Name what is live now (or in a state), to come back to it; without a name, list the tags."""
    from knowpatch.ledger import Workspace

    workspace = Workspace.here()
    history = workspace.history
    if name is not None:
        workspace.tag(name, history.state(state), note=note_of(author, reason))
    names = history.tags if name is None else [name]
    tags = {tag: [edit.id for edit in history.live(at=history.tags[tag])] for tag in names}
    if as_json:
        screen.print_json(tags)
        return
    if not tags:
        screen.say("no tag yet; knowpatch tag NAME names what is live now")
    rows = [
        (tag, f"{len(live)} live", " ".join(item[:12] for item in live[-4:]))
        for tag, live in tags.items()
    ]
    for line in columns(rows, (40, 0, 0)):
        screen.say(line)
