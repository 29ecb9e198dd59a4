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
    from knowpatch.patch import Patch

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
    workspace, note, signer = Workspace.here(), note_of(author, reason), signer_of(sign)
    files = [Path(name) for name in names if name.endswith(ENDING) or Path(name).is_file()]
    files = list(dict.fromkeys(files))
    edits = [workspace.history.edit(name) for name in names if Path(name) not in files]
    edits = list(dict.fromkeys(edits))
    # Of several, none is applied before all are known to be good.
    patches = [_read(workspace, file, edits, signer, replace, force) for file in files]
    gone: list[Edit] = []

    def also(history: History) -> list[Edit]:
        for number, edit in enumerate(edits):
            first = edits[:number]
            met = _met(history, edit.requests, edit, replace=replace, force=force, beside=first)
            gone.extend(other for other in met if other not in gone)
        return gone

    if edits:
        workspace.move(applies=edits, note=note, also=also)
    taken = [
        _take_in(workspace, patch, file, note, signer, gone, replace, force)
        for patch, file in zip(patches, files, strict=True)
    ]
    _tell(workspace, [*edits, *taken], gone, as_json=as_json)


def _met(
    history: History,
    facts: Sequence[Any],
    edit: Edit | None,
    *,
    replace: bool,
    force: bool,
    chat: bool = False,
    beside: Sequence[Edit] = (),
) -> list[Edit]:
    """The live edits that are taken back for one that says the same otherwise; or a refusal.

    Args:
        beside: edits that become live in the same step, of which none can be taken back in it.
    """
    from knowpatch.cli.recording import ADVICE
    from knowpatch.ledger.conflicts import conflicts

    chat = bool(edit.recorded["config"].get("chat", False)) if edit else chat
    period = (edit.first_day, edit.last_day) if edit else (None, None)
    others = [other for other in (*history.live(), *beside) if not _follows(other, edit)]
    met = conflicts(facts, others, chat=chat, period=period)
    if force or not met:
        return []
    if both := [conflict for conflict in met if conflict.edit in beside]:
        raise InputError(f"{both[0]}, which is named as well; give one, or --force for both")
    if not replace:
        more = f" (and {len(met) - 1} more)" if len(met) > 1 else ""
        raise InputError(f"{met[0]}{more}; {ADVICE}; nothing was changed")
    return [conflict.edit for conflict in met]


def _follows(other: Edit, edit: Edit | None) -> bool:
    """Whether they never meet: they are one, or one is live until the day before the other."""
    return edit is not None and (other is edit or edit in other.ended_by or other in edit.ended_by)


def _read(
    workspace: Workspace,
    file: Path,
    edits: Sequence[Edit],
    signer: Signer | None,
    replace: bool,
    force: bool,
) -> Patch:
    """The patch of a file, if it can be recorded once `edits` are live."""
    from knowpatch.patch import Patch

    patch = Patch.load(file)
    workspace.check_model(patch.provenance.fingerprint)
    workspace.check_signer(signer)
    known = workspace.history.edits.get(patch.id)
    if known is not None and (known.live or known in edits):
        raise OptionError(f"{file}: edit {known.short} is live already: {known.says}")
    _met_by(workspace.history, patch, replace=replace, force=force, beside=edits)
    return patch


def _met_by(
    history: History, patch: Patch, *, replace: bool, force: bool, beside: Sequence[Edit] = ()
) -> list[Edit]:
    """As `_met`, for a patch that is to be recorded."""
    made = patch.provenance
    facts = [request.model_dump(mode="json") for request in made.requests]
    chat = bool(made.config.get("chat", False))
    met = _met(history, facts, None, replace=replace, force=force, chat=chat, beside=beside)
    return [edit for edit in met if edit.id != patch.id]


def _take_in(
    workspace: Workspace,
    patch: Patch,
    file: Path,
    note: Note,
    signer: Signer | None,
    gone: list[Edit],
    replace: bool,
    force: bool,
) -> Edit:
    """Record the patch of a file as the next edit."""
    from knowpatch.ledger import Circumstances

    met = _met_by(workspace.history, patch, replace=replace, force=force)
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
