"""`knowpatch apply`: make an edit live again, or take in a patch file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knowpatch.cli import screen
from knowpatch.cli.options import Author, Json, Reason, Sign, note_of, signer_of
from knowpatch.errors import InputError, OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from knowpatch.ledger import Edit, History, Note, Workspace
    from knowpatch.ledger.signing import Signer

ENDING = ".safetensors"


def run(
    names: Annotated[
        list[str],
        typer.Argument(metavar="ID", help="Beginnings of edits' ids, or patch files."),
    ],
    replace: Annotated[
        bool, typer.Option("--replace", help="Take back live edits that say the same otherwise.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Keep live edits that say the same otherwise.")
    ] = False,
    sign: Sign = None,
    reason: Reason = None,
    author: Author = None,
    as_json: Json = False,
) -> None:
    """Make edits live again, in their old places; or record the patch of a file, on top."""
    from knowpatch.ledger import Workspace

    if replace and force:
        raise OptionError("give either --replace or --force")
    workspace, note = Workspace.here(), note_of(author, reason)
    files = [Path(name) for name in names if name.endswith(ENDING) or Path(name).is_file()]
    edits = [workspace.history.edit(name) for name in names if Path(name) not in files]
    edits = list(dict.fromkeys(edits))
    gone: list[Edit] = []

    def also(history: History) -> list[Edit]:
        for edit in edits:
            gone.extend(_met(history, edit.requests, edit, replace=replace, force=force))
        return gone

    if edits:
        workspace.move(applies=edits, note=note, also=also)
    signer = signer_of(sign)
    taken = [_take_in(workspace, file, note, signer, gone, replace, force) for file in files]
    _tell(workspace, [*edits, *taken], gone, as_json=as_json)


def _met(
    history: History,
    facts: Sequence[Any],
    edit: Edit | None,
    *,
    replace: bool,
    force: bool,
    chat: bool = False,
) -> list[Edit]:
    """The live edits that are taken back for one that says the same otherwise; or a refusal."""
    from knowpatch.cli.recording import ADVICE
    from knowpatch.ledger.conflicts import conflicts

    chat = bool(edit.recorded["config"].get("chat", False)) if edit else chat
    period = (edit.first_day, edit.last_day) if edit else (None, None)
    met = conflicts(facts, [e for e in history.live() if e is not edit], chat=chat, period=period)
    if force or not met:
        return []
    if not replace:
        more = f" (and {len(met) - 1} more)" if len(met) > 1 else ""
        raise InputError(f"{met[0]}{more}; {ADVICE}; nothing was changed")
    return [conflict.edit for conflict in met]


def _take_in(
    workspace: Workspace,
    file: Path,
    note: Note,
    signer: Signer | None,
    gone: list[Edit],
    replace: bool,
    force: bool,
) -> Edit:
    """Record the patch of a file as the next edit."""
    from knowpatch.ledger import Circumstances
    from knowpatch.patch import Patch

    patch = Patch.load(file)
    workspace.check_model(patch.provenance.fingerprint)
    facts = [request.model_dump(mode="json") for request in patch.provenance.requests]
    chat = bool(patch.provenance.config.get("chat", False))
    met = _met(workspace.history, facts, None, replace=replace, force=force, chat=chat)
    met = [edit for edit in met if edit.id != patch.id]
    circumstances = Circumstances(over=None, source=file.name)
    (edit,) = workspace.record([(patch, circumstances)], note=note, reverts=met, signer=signer)
    gone += met
    return edit


def _tell(workspace: Workspace, edits: list[Edit], gone: list[Edit], *, as_json: bool) -> None:
    from knowpatch.ledger.leaning import stale

    live, leaners = workspace.live(), stale(workspace.history, [*edits, *gone])
    if as_json:
        facts = {"applied": edits, "reverted": gone, "live": live, "stale": leaners}
        screen.print_json({name: [edit.id for edit in found] for name, found in facts.items()})
        return
    for what, found in (("reverted", gone), ("applied", edits)):
        for edit in found:
            screen.say(f"{what}  {edit.short}  {edit.says}")
    screen.say(f"{len(live)} live in {workspace.folder}")
    if leaners:
        screen.say(f"{len(leaners)} later edit(s) were computed without it; see knowpatch replay")
