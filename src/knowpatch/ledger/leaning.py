"""Which edits were computed from which others, and which of them no longer stand on those.

An edit leans on an earlier one if that was live beneath it when it was computed, and changed what
it was computed from: the weights, or the running state of its method. A table of facts (a prompt
rule, a procedure, wraps of a method without running state) is leant on by none: taking it back is
exact. So is taking back weights that nothing was computed on. What leans on an edit that is not
there any more is stale: it still acts, and its answers may have flipped; replaying computes it
anew on what is beneath it now.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date

from knowpatch.errors import DataError
from knowpatch.ledger import blobs
from knowpatch.ledger.history import Edit, History
from knowpatch.ledger.workspace import Workspace


def leans(edit: Edit, below: Edit) -> bool:
    """Whether `edit` depends on `below`, if that was live beneath it when it was computed."""
    if below.recorded["weights"]:
        return True
    same = edit.recorded["method"] == below.recorded["method"]
    return bool(same and below.recorded["folds"])


def stale(history: History, among: Iterable[Edit] | None = None) -> list[Edit]:
    """The live edits that lean on one that has come or gone beneath them since, in order.

    Args:
        among: only on these; by default on any.
    """
    others = list(history.edits.values() if among is None else among)
    unsteady = [edit for edit in others if _moved(edit)]
    return [
        edit
        for edit in history.live()
        if edit.recorded["over"] is not None
        and any(
            leans(edit, other) and history.stood(other, edit) != _stands(other, edit)
            for other in (*unsteady, *_meanwhile(edit, others))
            if other is not edit
        )
    ]


def _meanwhile(edit: Edit, others: Iterable[Edit]) -> list[Edit]:
    """Those that others recorded while `edit` was computed."""
    first, last = int(edit.recorded["over"]) + 1, edit.event.number - 1
    return [o for o in others if first <= o.event.number <= last] if first <= last else []


def _stands(other: Edit, edit: Edit) -> bool:
    """Whether `other` is live now in a place before `edit`, on the day that it was computed for."""
    day = edit.recorded["on"]
    in_time = day is None or other.valid_on(date.fromisoformat(day))
    return other.live and in_time and other.place < edit.place


def _moved(edit: Edit) -> bool:
    """Whether anything but the usual ever happened to an edit: live from its recording on."""
    usual = edit.spans == [(edit.event.number, None)] and not edit.rescheduled
    return not usual or edit.recorded["instead_of"] is not None


def to_replay(workspace: Workspace, chosen: Sequence[Edit] | None) -> list[Edit]:
    """The edits to compute anew, in order: those chosen, else what is stale or damaged."""
    history = workspace.history
    wanted = set(stale(history) if chosen is None else chosen)
    if chosen is None:
        wanted |= {edit for edit in history.live() if _broken(workspace, edit)}
    return sorted(wanted, key=lambda edit: edit.place)


def _broken(workspace: Workspace, edit: Edit) -> bool:
    try:
        blobs.content_of(blobs.patch_path(workspace.folder, edit.id), edit.recorded["sha256"])
    except DataError:
        return True
    return False
