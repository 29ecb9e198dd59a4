"""`knowpatch verify`: whether everything of a workspace is still what was recorded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knowpatch.cli import screen
from knowpatch.cli.options import Json

if TYPE_CHECKING:
    from knowpatch.ledger.verify import Findings
    from knowpatch.progress import Progress


def run(
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend the history from whichever copy holds it.")
    ] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Load the model, too, and hold the live patches to it.")
    ] = False,
    signed_by: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Demand a signature of one of these public keys."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check the history's chain and every file of the workspace; exit code 1 if one is broken."""
    from knowpatch.ledger.copies import repair as mend
    from knowpatch.ledger.place import folder_here
    from knowpatch.ledger.signing import public_key
    from knowpatch.ledger.verify import verify

    folder = folder_here()
    keys = [public_key(key) for key in signed_by or ()]
    aside: Path | None = None
    with screen.reporting() as report:
        if repair:
            _, aside = mend(folder)
        found = verify(folder, signed_by=keys, progress=report)
        if deep and not found.faults:
            found = _deeper(folder, found, report)
    if as_json:
        _print_json(folder, found, aside)
    else:
        _show(folder, found, aside)
    raise typer.Exit(1 if found.faults else 0)


def _deeper(folder: Path, found: Findings, report: Progress) -> Findings:
    """With what is wrong between the live patches and the model, whose tensors are hashed anew."""
    from dataclasses import replace

    from knowpatch.editing import load
    from knowpatch.ledger import Workspace
    from knowpatch.ledger.standing import misfits

    workspace = Workspace(folder)
    model = load(workspace.model, dtype="stored", progress=report)
    return replace(found, faults=tuple(misfits(workspace, model, progress=report)))


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
        f"{folder}: {verdict}; {screen.counted(history.number, 'event')}, "
        f"{screen.counted(len(history.edits), 'edit')} ({live} live), "
        f"head {history.head[:16] or 'none'}"
    )
