"""Collisions: live edits that a new one would write over, inside the model.

An edit is looked at if the new one acts at its key nearly as strongly as at its own
(`parts/reach.py`), or sits, as a table, on the same module. It collides if it answered right before
and does not with the new one on top: keys that are alike do no harm by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from knowpatch.edited import EditedModel
from knowpatch.effects import Effect, compare
from knowpatch.ledger.history import Edit
from knowpatch.ledger.standing import flips, questions
from knowpatch.parts.reach import own_questions, reach
from knowpatch.patch import Patch
from knowpatch.progress import Progress, silent

NEAR = 0.5
"""Reach from which on a live edit is asked whether it still answers."""
MOST_ASKED = 64
"""Live edits that are asked, those most reached first."""


@dataclass(frozen=True)
class Collision:
    """A live edit that would not answer any more, how strongly it is written over, and the answer.

    `reach` is None for tables.
    """

    edit: Edit
    reach: float | None
    effect: Effect

    def __str__(self) -> str:
        how = "sits on the same module" if self.reach is None else f"key reached {self.reach:.2f}"
        said = " ".join(self.effect.after.text.split())
        return f"edit {self.edit.short} ({self.edit.says}; {how}) would answer {said!r}"


def collisions(
    model: EditedModel,
    new: Sequence[Patch],
    live: Sequence[tuple[Edit, Patch]],
    *,
    progress: Progress = silent,
) -> list[Collision]:
    """The live edits that would lose an answer to the new patches.

    Args:
        model: with the live patches on it, and not yet the new ones.
        new: patches that are to come on top.
        live: the live edits with their patches.
    """
    near = _near(model, new, live)
    asked = sorted(near, key=lambda edit: near[edit] or NEAR, reverse=True)[:MOST_ASKED]
    probes = [(edit, probe) for edit in asked for probe in questions(edit)]
    if not probes:
        return []
    effects = compare(model, [probe for _, probe in probes], model.applied(*new), progress=progress)
    found: dict[Edit, Collision] = {}
    for (edit, _), effect in zip(probes, effects, strict=True):
        if flips(effect) is False:
            found.setdefault(edit, Collision(edit, near[edit], effect))
    return list(found.values())


def _near(
    model: EditedModel, new: Sequence[Patch], live: Sequence[tuple[Edit, Patch]]
) -> dict[Edit, float | None]:
    """The live edits that may be written over: by how much, where weights change."""
    found: dict[Edit, float | None] = {}
    for patch in new:
        changed = {delta.address.parameter for delta in patch.deltas}
        modules = {wrap.module for wrap in patch.wraps}
        there = [
            (edit, question)
            for edit, other in live
            if changed & {delta.address.parameter for delta in other.deltas}
            for question in own_questions(other)
        ]
        shares = reach(model.view, patch, [question for _, question in there]).tolist()
        for (edit, _), share in zip(there, shares, strict=True):
            if share >= NEAR:
                found[edit] = max(share, found.get(edit) or 0.0)
        for edit, other in live:
            if modules & {wrap.module for wrap in other.wraps}:
                found.setdefault(edit, None)
    return found
