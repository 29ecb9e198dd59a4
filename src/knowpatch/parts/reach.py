"""Reach: how strongly a patch's weight changes act where other questions are recalled.

A fact is recalled at a key: what enters a changed map at the last token of its subject; where no
subject is known, at that token of its prompt at which the changes add most, since not every change
acts at a prompt's end (parts/sparing.py). Of a change DW, |DW k| over all changed maps says how
much it adds there; divided by the same at the keys that it was made for, 1 means: as much as at its
own. Two edits whose keys collide write over each other. Axes: P questions, N their tokens, I a
map's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowpatch.deltas import WeightDelta
from knowpatch.models.passes import Tap
from knowpatch.models.roles import LinearRole
from knowpatch.models.view import ModelView
from knowpatch.parts.spans import subject_position
from knowpatch.patch import Patch


@dataclass(frozen=True)
class Question:
    """A prompt, what it is about (a part of it) if known, and whether it is asked in a chat."""

    prompt: str
    subject: str | None = None
    chat: bool = False


def own_questions(patch: Patch) -> list[Question]:
    """Those that a patch was made for."""
    chat = bool(patch.provenance.config.get("chat", False))
    return [Question(r.prompt, r.subject, chat) for r in patch.provenance.requests]


def reach(view: ModelView, patch: Patch, questions: Sequence[Question]) -> Tensor:
    """How strongly the patch acts at each question's key, as a share of that at its own (P).

    The keys are those of the model as it stands. A patch that changes no linear map of a block
    reaches nothing.
    """
    roles = {
        role.address.parameter: role
        for block in view.roles.blocks
        for role in block.linears.values()
    }
    changes = [
        (delta, role) for delta in patch.deltas if (role := roles.get(delta.address.parameter))
    ]
    own = own_questions(patch)
    if not changes or not questions:
        return torch.zeros(len(questions), dtype=torch.float64)
    added_P = _added(view, changes, [*own, *questions])
    mine, others = added_P[: len(own)], added_P[len(own) :]
    return others / mine.median().clamp(min=torch.finfo(torch.float32).tiny)


def _added(
    view: ModelView,
    changes: Sequence[tuple[WeightDelta, LinearRole]],
    questions: Sequence[Question],
) -> Tensor:
    """The norm of what the changes add at the questions' keys, over all changed maps (P)."""
    rows = [view.encode(q.prompt, chat=q.chat) for q in questions]
    tokens = [
        [subject_position(row, q.subject)] if q.subject else range(len(row.ids))
        for q, row in zip(questions, rows, strict=True)
    ]
    places = [(i, token) for i, some in enumerate(tokens) for token in some]
    taps = {role.module: Tap(role.module, "input") for _, role in changes}
    run = view.run([row.ids for row in rows], taps=list(taps.values()))
    squares_N = torch.zeros(len(places), dtype=torch.float64)  # a square may be beyond float32
    for delta, role in changes:
        keys_NI = run.at(taps[role.module], places).float()
        shape = view.parameter(delta.address.parameter).shape
        outputs = int(shape[1] if role.stored_in_out else shape[0])
        added_ND = delta.through(keys_NI, outputs, role.stored_in_out)
        squares_N += added_ND.double().square().sum(-1).cpu()
    each = squares_N.sqrt().split([len(some) for some in tokens])
    return torch.stack([some_N.amax() for some_N in each])
