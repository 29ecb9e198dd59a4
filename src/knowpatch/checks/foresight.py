"""Foresight: what an edit may disturb, told before it is kept.

How strongly its weight changes act at the keys of control prompts and of earlier edits
(parts/reach.py), beside how strongly at its own: an answer recalled at a key that is reached may
change, though it did not among the questions that were asked. And how large the change is, beside
the matrix. What changes no weight reaches nothing here: memories have gates (`ask --why`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from knowpatch.edited import EditedModel
from knowpatch.method import propose_subject
from knowpatch.models.view import ModelView
from knowpatch.parts.reach import Question, own_questions, reach
from knowpatch.patch import Patch
from knowpatch.probes import controls

NEAREST = 3
"""Control prompts, and earlier edits, that are named."""
LOOKED_AT = 8
"""Of a sequence, the patches whose keys are compared: the last ones."""


@dataclass(frozen=True)
class Size:
    """How large the change of one parameter is.

    Attributes:
        share: its norm over that of the parameter as it came.
        total: the same of all changes, those of the live patches included.
    """

    parameter: str
    share: float
    total: float


@dataclass(frozen=True)
class Near:
    """A prompt at whose key a change acts.

    Attributes:
        reach: how strongly, beside 1 at the keys that it was made for.
        edit: id of the earlier patch whose prompt it is; None of a control prompt.
    """

    prompt: str
    reach: float
    edit: str | None = None


@dataclass(frozen=True)
class Foresight:
    """What patches may disturb: the nearest first; empty where they change no weight."""

    sizes: tuple[Size, ...]
    controls: tuple[Near, ...]
    earlier: tuple[Near, ...]

    def facts(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def foresee(model: EditedModel, patches: Sequence[Patch]) -> Foresight:
    """What patches may disturb, on the model as it stands: without them, with the earlier ones."""
    sizes = tuple(_sizes(model.view, patches))
    edited = {request.prompt for patch in patches for request in patch.provenance.requests}
    fixed = [(None, _question(prompt)) for prompt in controls() if prompt not in edited]
    earlier = [
        (patch.id, question)
        for patch in model.live
        for question in own_questions(patch)
        if question.prompt not in edited
    ]
    near = list(_near(model.view, patches[-LOOKED_AT:] if sizes else (), [*fixed, *earlier]))
    near.sort(key=lambda one: -one.reach)
    return Foresight(
        sizes,
        tuple(one for one in near if one.edit is None)[:NEAREST],
        tuple(one for one in near if one.edit is not None)[:NEAREST],
    )


def _question(prompt: str) -> Question:
    """A control prompt, which is about what it seems to be about."""
    guess = propose_subject(prompt)
    return Question(prompt, guess if guess and guess in prompt else None)


def _near(
    view: ModelView, patches: Sequence[Patch], asked: Sequence[tuple[str | None, Question]]
) -> Iterator[Near]:
    """Each question with the strongest reach of any of the patches."""
    if not patches:
        return
    questions = [question for _, question in asked]
    reaches_NP = torch.stack([reach(view, patch, questions) for patch in patches])
    for (edit, question), strongest in zip(asked, reaches_NP.amax(0).tolist(), strict=True):
        yield Near(question.prompt, strongest, edit)


def _sizes(view: ModelView, patches: Sequence[Patch]) -> Iterator[Size]:
    deltas = [delta for patch in patches for delta in patch.deltas]
    for name in dict.fromkeys(delta.address.parameter for delta in deltas):
        now = view.values(name).float()
        base = view.originals.get(name, now).float()
        changed = now
        for delta in deltas:
            if delta.address.parameter == name:
                changed = delta.added_to(changed)
        norm = float(base.norm())
        if norm > 0:
            mine, all_ = (float((changed - other).double().norm()) for other in (now, base))
            yield Size(name, mine / norm, all_ / norm)
