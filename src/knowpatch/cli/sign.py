"""`knowpatch sign`: vouch for edits with a key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from knowpatch.cli import screen
from knowpatch.cli.options import Json


def run(
    edit_ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID", help="By default all live edits.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A private key of ed25519.")
    ] = None,
    new_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Make a key: FILE, and FILE.pub for others. Signs none."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Sign edits with a key; the signatures lie beside their patches."""
    from knowpatch.errors import OptionError
    from knowpatch.ledger import Workspace
    from knowpatch.ledger.signing import Signer, make_key

    if (key is None) == (new_key is None):
        raise OptionError("give either --key FILE or --new-key FILE")
    if new_key is not None and edit_ids:
        raise OptionError("--new-key signs none: make the key, then sign with --key FILE")
    if new_key is not None:
        made = make_key(new_key)
        if as_json:
            screen.print_json({"key": made.key, "file": str(new_key)})
        else:
            screen.say(f"{new_key}: a new key, keep it to yourself; {new_key}.pub: for others")
        return
    assert key is not None
    signer, workspace = Signer.load(key), Workspace.here()
    history = workspace.history
    edits = [history.edit(name) for name in edit_ids] if edit_ids else history.live()
    for edit in edits:
        workspace.patch(edit, signed=False)  # nothing is signed unseen that is not what it was
        signer.sign(workspace.folder, edit.id, edit.recorded["sha256"])
    if as_json:
        screen.print_json({"key": signer.key, "signed": [edit.id for edit in edits]})
        return
    for edit in edits:
        screen.say(f"signed  {edit.short}  {edit.says}")
    screen.say(f"by {signer.key[:16]}" if edits else "no edit is live: nothing to sign")
