"""`knowpatch gc`: sweep away what no event of the history names."""

from __future__ import annotations

from typing import Annotated

import typer

from knowpatch.cli import screen
from knowpatch.cli.options import Json


def run(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go, and do nothing.")
    ] = False,
    now: Annotated[
        bool,
        typer.Option("--now", help="Also what is younger than a day; only while no one edits."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove files that stopped writers left; what the history names stays, reverted edits too."""
    from knowpatch.ledger import Workspace
    from knowpatch.ledger.blobs import DAY

    workspace = Workspace.here()
    gone = workspace.sweep(age=0.0 if now else DAY, remove=not dry_run)
    size = sum(size for _, size in gone)
    if as_json:
        files = [str(path.relative_to(workspace.folder)) for path, _ in gone]
        screen.print_json({"files": files, "bytes": size, "removed": not dry_run})
        return
    for path, _ in gone:
        screen.say(f"{'would remove' if dry_run else 'removed'}  {path}")
    what = screen.human_bytes(size) if gone else "nothing to remove"
    screen.say(f"{what}; what the history names stays")
