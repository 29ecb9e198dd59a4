"""Parity: whether an artefact, loaded back, answers as the model that it was made from.

Both are asked the edited prompts, answers forced, and some control prompts; compared are the logits
over the whole vocabulary at every place where something is predicted. Axes: M places, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from knowpatch.errors import ModelError
from knowpatch.models.view import ModelView
from knowpatch.parts.spans import continuation
from knowpatch.patch import Patch
from knowpatch.probes import controls
from knowpatch.progress import Progress, silent

EDITS, CONTROLS = 40, 20
"""Edited prompts (the newest) and control prompts that are asked at most."""
ROWS = 8
"""Questions of a batch."""


@dataclass(frozen=True)
class Question:
    """A prompt with the answer that an edit promised, or a control prompt without one.

    Attributes:
        before: text that stands in front of the prompt.
    """

    prompt: str
    answer: str | None = None
    chat: bool = False
    before: str = ""


@dataclass(frozen=True, eq=False)
class Observed:
    """What a model says to questions.

    Attributes:
        logits_MV: for each question, at its last prompt token and at the forced answer's.
        answered: for each, whether every token of the promised answer is the most likely one.
        rows: the ids of each, without what stands before.
    """

    logits_MV: tuple[Tensor, ...]
    answered: tuple[bool, ...]
    rows: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Parity:
    """How an artefact compares with the model that it was made from.

    Attributes:
        edits: edited prompts that were asked.
        before, after: how many of them each answers as promised.
        lost: prompts that the artefact no longer answers so.
        edits_difference, controls_difference: largest differences of a logit.
        controls: control prompts that were asked; moved: how many go on with another token.
        form: the numbers in which the artefact computed.
    """

    edits: int
    before: int
    after: int
    lost: tuple[str, ...]
    edits_difference: float
    controls: int
    moved: int
    controls_difference: float
    form: str

    @property
    def exact(self) -> bool:
        """Whether every logit is the same, bit for bit."""
        return self.edits_difference == self.controls_difference == 0.0


def questions_for(patches: Sequence[Patch]) -> list[Question]:
    """The edits of `patches`, of one prompt the newest, and control prompts."""
    asked: dict[tuple[str, bool], Question] = {}
    for patch in patches:
        chat = bool(patch.provenance.config.get("chat", False))
        for request in patch.provenance.requests:
            asked.pop((request.prompt, chat), None)
            asked[request.prompt, chat] = Question(request.prompt, request.target, chat)
    edits = list(asked.values())[-EDITS:]
    others = [text for text in controls() if (text, False) not in asked]
    return [*edits, *map(Question, others[:CONTROLS])]


def observe(
    view: ModelView, questions: Sequence[Question], *, progress: Progress = silent
) -> Observed:
    """Ask a model all questions, as it stands."""
    logits: list[Tensor] = []
    answered: list[bool] = []
    rows: list[tuple[int, ...]] = []
    for start in range(0, len(questions), ROWS):
        batch = questions[start : start + ROWS]
        progress("asking", len(rows), len(questions))
        for logits_MV, bare, answer in _asked(view, batch):
            logits.append(logits_MV)
            rows.append((*bare, *answer))
            answered.append(bool(answer) and logits_MV.argmax(-1).tolist() == list(answer))
    progress("asking", len(questions), len(questions))
    return Observed(tuple(logits), tuple(answered), tuple(rows))


def _asked(
    view: ModelView, questions: Sequence[Question]
) -> list[tuple[Tensor, tuple[int, ...], tuple[int, ...]]]:
    """For each question its logits, and the ids of its bare prompt and of its answer."""
    rows, places, found = [], [], []
    for number, question in enumerate(questions):
        prompt = view.encode(question.prompt, chat=question.chat, before=question.before)
        bare = view.encode(question.prompt, chat=question.chat)
        answer: tuple[int, ...] = ()
        if question.answer is not None:
            answer = continuation(view.tokenizer, prompt, question.answer)
        rows.append([*prompt.ids, *answer[:-1]])
        places += [(number, place) for place in range(len(prompt.ids) - 1, len(rows[-1]))]
        found.append((bare.ids, answer))
    logits_MV = view.run(rows, logits_at=places).logits_MV.cpu()
    ends = torch.tensor([0, *(max(1, len(answer)) for _, answer in found)]).cumsum(0).tolist()
    parts = [logits_MV[start:stop] for start, stop in pairwise(ends)]
    return [(part, *ids) for part, ids in zip(parts, found, strict=True)]


def compare(
    questions: Sequence[Question], expected: Observed, found: Observed, *, form: str, all_: bool
) -> Parity:
    """Two models' answers to the same questions.

    Args:
        questions: what was asked.
        expected: of the model that the artefact was made from; found: of the artefact.
        form: the numbers in which the artefact computed.
        all_: whether each edit must be answered, not only those that were `expected` to be.

    Raises:
        ModelError: the artefact reads the questions as other tokens, or gives no finite numbers.
    """
    if expected.rows != found.rows:
        raise ModelError("loaded back, the artefact reads prompts as other tokens: do not use it")
    differences = {True: [0.0], False: [0.0]}
    for question, one, other in zip(questions, expected.logits_MV, found.logits_MV, strict=True):
        apart = float((one - other).abs().max())
        if not math.isfinite(apart):
            raise ModelError("loaded back, the artefact gives no finite numbers: do not use it")
        differences[question.answer is not None].append(apart)
    edits = [i for i, question in enumerate(questions) if question.answer is not None]
    others = [i for i, question in enumerate(questions) if question.answer is None]
    lost = [i for i in edits if (all_ or expected.answered[i]) and not found.answered[i]]
    return Parity(
        edits=len(edits),
        before=sum(expected.answered),
        after=sum(found.answered),
        lost=tuple(questions[i].prompt for i in lost),
        edits_difference=max(differences[True]),
        controls=len(others),
        moved=sum(
            int(expected.logits_MV[i].argmax()) != int(found.logits_MV[i].argmax()) for i in others
        ),
        controls_difference=max(differences[False]),
        form=form,
    )
