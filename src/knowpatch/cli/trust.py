"""`knowpatch trust`: let a workspace demand signatures."""

from __future__ import annotations

from typing import Annotated

import typer

from knowpatch.cli import screen
from knowpatch.cli.options import Author, Json, Reason, note_of


def run(
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY", help="Public key files, or 64 hexadecimal digits."),
    ] = None,
    nobody: Annotated[bool, typer.Option("--nobody", help="Demand no signature any more.")] = False,
    reason: Reason = None,
    author: Author = None,
    as_json: Json = False,
) -> None:
    """Demand that each edit is signed by one of these keys; without a key, list those trusted."""
    from knowpatch.errors import OptionError
    from knowpatch.ledger import Workspace
    from knowpatch.ledger.signing import public_key

    if nobody and keys:
        raise OptionError("give either keys or --nobody")
    workspace = Workspace.here()
    if nobody or keys:
        named = dict.fromkeys(public_key(key) for key in keys or ())
        workspace.trust(list(named), note=note_of(author, reason))
    trusted = workspace.history.trusted
    if as_json:
        screen.print_json({"trusted": list(trusted)})
        return
    for key in trusted:
        screen.say(key)
    screen.say("unsigned edits are refused" if trusted else "no signature is demanded")
