"""Replay: an edit computed anew, with the same method, options, seed and requests, on what is
beneath it now.

If nothing that it depends on has changed, the same patch comes out, to the last bit, and nothing is
recorded; so a lost or damaged patch file comes back. Else the new edit takes the place of the old.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date

from knowpatch.edited import EditedModel
from knowpatch.editing import edit as compute
from knowpatch.effects import Effect, measure, took
from knowpatch.errors import DataError
from knowpatch.ledger import blobs
from knowpatch.ledger.history import Edit
from knowpatch.ledger.leaning import to_replay
from knowpatch.ledger.notes import Circumstances, Note
from knowpatch.ledger.signing import Signer
from knowpatch.ledger.standing import bring, method_of, questions, requests_of
from knowpatch.ledger.workspace import Workspace
from knowpatch.progress import Progress, silent


@dataclass(frozen=True)
class Replayed:
    """What came of one edit: `new` is `old` if the patch is the same as before."""

    old: Edit
    new: Edit
    took: tuple[bool, ...]


def replay(
    workspace: Workspace,
    model: EditedModel,
    chosen: Sequence[Edit] | None,
    *,
    note: Note,
    signer: Signer | None = None,
    progress: Progress = silent,
) -> Iterator[Replayed]:
    """Compute edits anew, one after the other, each recorded as it is done.

    Args:
        chosen: which; None for all that are stale, those that become so on the way included.
        model: the workspace's model, without patches; it is left with those beneath the last.

    Raises:
        OptionError: a method that is not known here; EditError: an edit cannot be computed now.
    """
    done: set[Edit] = set()
    while waiting := [e for e in to_replay(workspace, chosen) if e not in done]:
        done.add(old := waiting[0])
        result = _again(workspace, model, old, note, signer, progress)
        done.add(result.new)
        yield result
        workspace.refresh()


def _again(
    workspace: Workspace,
    model: EditedModel,
    old: Edit,
    note: Note,
    signer: Signer | None,
    progress: Progress,
) -> Replayed:
    over = workspace.history.number
    bring(model, workspace.patches(_beneath(workspace, old)))
    method = method_of(old)
    method.progress = progress
    requests = requests_of(old)
    patch = compute(model, requests, method=method)
    effects = measure(model, [patch], questions(old), progress=progress)
    expected = [method.expected(request) for request in requests]
    taken = tuple(took(effects, requests, expected, chat=method.config.chat))
    if patch.id == old.id:
        blobs.put(blobs.patch_path(workspace.folder, old.id), patch.to_bytes())
        return Replayed(old, old, taken)
    if not old.live:
        raise DataError(
            f"edit {old.short} comes out otherwise here (another machine, or other versions), and "
            "is not live: only its own file brings it back"
        )
    circumstances = _circumstances(old, over, effects, taken)
    (new,) = workspace.record([(patch, circumstances)], note=note, reverts=[old], signer=signer)
    return Replayed(old, new, taken)


def _beneath(workspace: Workspace, edit: Edit) -> list[Edit]:
    """What is beneath an edit now; of one that is not live, what was when it was computed."""
    history, day = workspace.history, edit.recorded["on"]
    if not edit.live:
        return history.beneath(edit)
    live = history.live(day and date.fromisoformat(day))
    return [other for other in live if other.place < edit.place]


def _circumstances(
    old: Edit, over: int, effects: Sequence[Effect], taken: Sequence[bool]
) -> Circumstances:
    """Those of the new edit in the place of the old one, with the old one's facts."""
    made = old.recorded
    days = (made["on"], old.first_day, old.last_day)
    on, start, end = (None if day is None else date.fromisoformat(day) for day in days)
    return Circumstances(
        over=over,
        on=on,
        source=made["source"],
        took=taken,
        report={"probes": [effect.facts() for effect in effects]},
        valid_from=start,
        valid_until=end,
        instead_of=old.id,
        folds=bool(made["folds"]),
        dtype=made["dtype"],
    )
