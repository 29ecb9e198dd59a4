"""`knowpatch replay`: compute edits anew on what is beneath them now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from knowpatch.cli import screen
from knowpatch.cli.options import (
    Author,
    Device,
    DryRun,
    Dtype,
    Json,
    Reason,
    Sign,
    note_of,
    signer_of,
)

if TYPE_CHECKING:
    from knowpatch.ledger.replaying import Replayed


def run(
    edit_ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID", help="By default all that are stale.")
    ] = None,
    dry_run: DryRun = False,
    sign: Sign = None,
    reason: Reason = None,
    author: Author = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Compute edits anew whose ground was taken away, and those whose patch file is damaged."""
    from knowpatch.ledger import Workspace
    from knowpatch.ledger.leaning import to_replay

    workspace = Workspace.here()
    note, signer = note_of(author, reason), signer_of(sign)
    chosen = [workspace.history.edit(name) for name in edit_ids] if edit_ids else None
    waiting = to_replay(workspace, chosen)
    if dry_run or not waiting:
        if as_json:
            screen.print_json({"stale": [edit.id for edit in waiting], "replayed": []})
            return
        for edit in waiting:
            screen.say(f"would be replayed  {edit.short}  {edit.says}")
        if not waiting:
            screen.say("nothing to replay: every live edit stands on what it was computed on")
        return
    from knowpatch.editing import load
    from knowpatch.ledger.replaying import replay

    workspace.check_signer(signer)
    workspace.check_open()
    done: list[Replayed] = []
    with screen.reporting() as report:
        made = {edit.recorded["dtype"] for edit in waiting}
        kind = next(iter(made)) if dtype == "auto" and len(made) == 1 else dtype
        edited = load(workspace.model, device=device, dtype=kind or dtype, progress=report)
        workspace.check_model(edited.view.fingerprint)
        for item in replay(workspace, edited, chosen, note=note, signer=signer, progress=report):
            done.append(item)
            if not as_json:
                screen.say(_line(item))
    if as_json:
        screen.print_json({"stale": [e.id for e in waiting], "replayed": [_facts(i) for i in done]})
    raise typer.Exit(0 if all(all(item.took) for item in done) else 1)


def _line(item: Replayed) -> str:
    took = "took" if all(item.took) else f"took {sum(item.took)} of {len(item.took)}"
    if item.new is item.old:
        return f"the same  {item.old.short}  ({took})  {item.old.says}"
    return f"replayed  {item.old.short} as {item.new.short}  ({took})  {item.new.says}"


def _facts(item: Replayed) -> dict[str, Any]:
    return {
        "edit": item.old.id,
        "new": None if item.new is item.old else item.new.id,
        "took": list(item.took),
    }
