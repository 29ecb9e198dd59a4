"""`knowpatch verify`: whether everything of a workspace is still what was recorded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knowpatch.cli import screen
from knowpatch.cli.options import Json

if TYPE_CHECKING:
    from knowpatch.ledger.verify import Findings


def run(
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend the history from whichever copy holds it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check the history's chain and every file of the workspace; exit code 1 if one is broken."""
    from knowpatch.ledger.verify import repair as mend
    from knowpatch.ledger.verify import verify
    from knowpatch.ledger.workspace import folder_here

    folder = folder_here()
    aside: Path | None = None
    with screen.reporting() as report:
        if repair:
            _, aside = mend(folder)
        found = verify(folder, progress=report)
    if as_json:
        _print_json(folder, found, aside)
    else:
        _show(folder, found, aside)
    raise typer.Exit(1 if found.faults else 0)


def _print_json(folder: Path, found: Findings, aside: Path | None) -> None:
    screen.print_json(
        {
            "folder": str(folder),
            "sound": not found.faults,
            "faults": [{"file": fault.file, "what": fault.what} for fault in found.faults],
            "notes": list(found.notes),
            "events": found.history.number,
            "edits": len(found.history.edits),
            "head": found.history.head,
            "moved_aside": None if aside is None else str(aside),
        }
    )


def _show(folder: Path, found: Findings, aside: Path | None) -> None:
    history = found.history
    if aside is not None:
        screen.say(f"mended: both copies of the history are written anew; the old ones: {aside}")
    for fault in found.faults:
        screen.say(f"broken  {fault.file}: {fault.what}")
    for note in found.notes:
        screen.say(f"note    {note}")
    live = len(history.live())
    verdict = f"{len(found.faults)} broken" if found.faults else "all as recorded"
    screen.say(
        f"{folder}: {verdict}; {history.number} events, {len(history.edits)} edits ({live} live), "
        f"head {history.head[:16]}"
    )
