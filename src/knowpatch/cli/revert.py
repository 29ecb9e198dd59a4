"""`knowpatch revert`: take edits back, in any order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from knowpatch.cli import screen
from knowpatch.cli.columns import columns
from knowpatch.cli.options import Author, Device, Dtype, Json, Reason, note_of
from knowpatch.errors import KnowpatchError, OptionError

if TYPE_CHECKING:
    from knowpatch.ledger import Edit, Workspace

MOST_SHOWN = 12


def run(
    edit_ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID", help="The beginnings of edits' ids.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(metavar="STATE", help="Back to a state: an edit's id, a tag, or base."),
    ] = None,
    ask: Annotated[
        bool,
        typer.Option(help="Where later edits lean on it, load the model and ask what flipped."),
    ] = True,
    reason: Reason = None,
    author: Author = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Take edits back: exact for tables of facts, and for weights that no later edit leans on.

    Where later edits were computed on top of it, those whose answers flipped are listed; knowpatch
    replay computes them anew.
    """
    from knowpatch.ledger import Workspace
    from knowpatch.ledger.leaning import stale

    workspace = Workspace.here()
    gone, back = _wanted(workspace, edit_ids or [], to)
    before = workspace.live()
    workspace.move(applies=back, reverts=gone, note=note_of(author, reason))
    leaners = stale(workspace.history, [*gone, *back])
    flipped, unasked = None, None
    if leaners and ask:
        try:
            flipped = _flipped(workspace, leaners, before, device=device, dtype=dtype)
        except KnowpatchError as error:  # what is taken back is taken back
            unasked = str(error)
    facts = {
        "reverted": [edit.id for edit in gone],
        "applied": [edit.id for edit in back],
        "live": [edit.id for edit in workspace.live()],
        "exact": not leaners,
        "leaning": [edit.id for edit in leaners],
        "flipped": flipped,
        "unasked": unasked,
    }
    if as_json:
        screen.print_json(facts)
    else:
        _show(workspace, gone, back, leaners, flipped, unasked)


def _wanted(
    workspace: Workspace, names: list[str], to: str | None
) -> tuple[list[Edit], list[Edit]]:
    """What is to be taken back, and what to be applied again to come back to a state."""
    history = workspace.history
    if bool(names) == (to is not None):
        raise OptionError("give either edits' ids, or --to STATE; see knowpatch log")
    if to is None:
        edits = list(dict.fromkeys(history.edit(name) for name in names))
        return edits, []
    then = history.live(at=history.state(to))
    gone = [edit for edit in history.live() if edit not in then]
    back = [edit for edit in then if not edit.live]
    if not gone and not back:
        raise OptionError(f"{to} is what is live already; nothing was changed")
    return gone, back


def _flipped(
    workspace: Workspace, leaners: list[Edit], before: list[Edit], *, device: str, dtype: str
) -> list[dict[str, Any]]:
    """The answers of leaning edits that are others now: those that are right no more, and again."""
    from knowpatch.editing import load
    from knowpatch.ledger.standing import asked_in, flips, questions

    probes, owners = [], []
    for edit in leaners:
        own = questions(edit)
        probes += own
        owners += [edit] * len(own)
    with screen.reporting() as report:
        edited = load(workspace.model, device=device, dtype=dtype, progress=report)
        workspace.check_model(edited.view.fingerprint)
        states = [workspace.patches(edits) for edits in (before, workspace.live())]
        effects = asked_in(edited, probes, *states, progress=report)
    return [
        {
            "edit": edit.id,
            "prompt": effect.probe.prompt,
            "target": effect.expected,
            "before": effect.before.text,
            "after": effect.after.text,
            "right": right,
        }
        for edit, effect in zip(owners, effects, strict=True)
        if (right := flips(effect)) is not None
    ]


def _show(
    workspace: Workspace,
    gone: list[Edit],
    back: list[Edit],
    leaners: list[Edit],
    flipped: list[dict[str, Any]] | None,
    unasked: str | None,
) -> None:
    for what, edits in (("reverted", gone), ("applied", back)):
        for edit in edits:
            screen.say(f"{what}  {edit.short}  {edit.says}")
    live = f"{len(workspace.live())} live in {workspace.folder}"
    if not leaners:
        screen.say(f"exact: no later edit was computed on top of it; {live}")
        return
    screen.say(f"{len(leaners)} later edit(s) were computed on top of it; {live}")
    if flipped is None:
        why = f" ({unasked})" if unasked else ""
        screen.say(f"whether they flipped was not asked{why}; knowpatch replay recomputes them")
        return
    lost = [item for item in flipped if not item["right"]]
    if not lost:
        screen.say("they all answer as before; knowpatch replay would recompute them")
    rows = [
        (item["edit"][:12], item["prompt"], item["before"], "→", item["after"])
        for item in flipped[:MOST_SHOWN]
    ]
    for line in columns(rows, (12, 44, 24, 1, 24)):
        screen.say(f"  {line}")
    if len(flipped) > MOST_SHOWN:
        screen.say(f"  ... and {len(flipped) - MOST_SHOWN} more (--json has all)")
    if lost:
        screen.say(f"{len(lost)} answer(s) flipped; knowpatch replay recomputes the later edits")
