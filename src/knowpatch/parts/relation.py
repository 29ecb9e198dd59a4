"""A relation between subject and object, both ways, as a term of a value's loss.

BIRD: Ma et al., "Untying the Reversal Curse via Bidirectional LM Editing" (arXiv 2310.10322). As in
TransE, a subject s, a relation r and an object o are vectors with s + r near o, and the inverse
relation i leads back, o + i near s. An edit from the old object o to the new one o' should bring
about, in every context,

    |s + r - o'| + |o' + i - s| - beta (|s + r - o| + |o + i - s|)

small. Each vector is the mean of what enters the head at the tokens of a phrase; of them all only
the state at the subject's last token depends on the value. The subject is read where it stands in
the prompt; the inverse relation, which is one of many pairs, without contexts. Axes: C contexts, D
hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from knowpatch.models.passes import Tap
from knowpatch.models.view import ModelView
from knowpatch.parts.spans import subject_span, tokens_of

READ_ROWS = 64
"""Phrases that are read in one pass."""


@dataclass(frozen=True)
class Phrase:
    """Words, what stands before them, and the part of them that is meant (by default all)."""

    words: str
    before: str = ""
    part: str | None = None


@dataclass(frozen=True, eq=False)
class States:
    """What enters the head at the tokens of phrases: means (M, D), last (M, D), and counts (M)."""

    mean_MD: Tensor
    last_MD: Tensor
    count_M: Tensor

    def split(self, count: int) -> list[States]:
        """In groups of `count` phrases."""
        parts = (self.mean_MD.split(count), self.last_MD.split(count), self.count_M.split(count))
        return [States(*part) for part in zip(*parts, strict=True)]

    @property
    def rest_MD(self) -> Tensor:
        """The share of the mean that the other tokens have."""
        return self.mean_MD - self.last_MD / self.count_M[:, None]


@dataclass(eq=False)
class Relation:
    """The term of one fact.

    Attributes:
        rest_CD, count_C: of the subject, all but what the last token gives; its tokens.
        forward_CD: the relation, behind each context.
        new_CD: the new object.
        inverse_D: the inverse relation; None leaves out the ways back.
        old_CD: the old object, if there is one.
        beta: weight of the old object's part.
        share: of the first NLL that the part of the new object has at first.
        factor: of the whole term, instead of what `share` makes of it.
    """

    rest_CD: Tensor
    count_C: Tensor
    forward_CD: Tensor
    new_CD: Tensor
    inverse_D: Tensor | None
    old_CD: Tensor | None
    beta: float
    share: float
    factor: float | None = None
    _factor: Tensor | None = field(default=None, init=False)

    def __call__(self, nll: Tensor, states_CD: Tensor) -> Tensor:
        # Other wordings follow the contexts; the relation is that which the prompt states.
        subject_CD = self.rest_CD + states_CD[: len(self.rest_CD)] / self.count_C[:, None]
        apart = self._apart(subject_CD, self.new_CD)
        if self._factor is None:
            share = self.share * nll / apart.detach().clamp(min=1e-30)
            self._factor = share if self.factor is None else torch.full_like(nll, self.factor)
        if self.old_CD is not None:
            apart = apart - self.beta * self._apart(subject_CD, self.old_CD)
        return self._factor * apart

    def _apart(self, subject_CD: Tensor, object_CD: Tensor) -> Tensor:
        """How far the relation is from leading there, and back, summed over contexts."""
        found_C: Tensor = (subject_CD + self.forward_CD - object_CD).norm(dim=1)
        if self.inverse_D is not None:
            found_C = found_C + (object_CD + self.inverse_D - subject_CD).norm(dim=1)
        return found_C.sum()


def states_of(view: ModelView, phrases: Sequence[Phrase], *, chat: bool) -> States:
    """What enters the head at the tokens of each phrase, float32."""
    head = Tap(view.roles.head, "input")
    found = []
    for start in range(0, len(phrases), READ_ROWS):
        some = phrases[start : start + READ_ROWS]
        texts = [view.encode(one.words, chat=chat, before=one.before) for one in some]
        spans = [
            tokens_of(text, subject_span(text.text, one.part or one.words.strip(), text.content))
            for text, one in zip(texts, some, strict=True)
        ]
        rows = [text.ids[: span[-1] + 1] for text, span in zip(texts, spans, strict=True)]
        run = view.run(rows, taps=[head])
        for row, span in enumerate(spans):
            states_TD = run.at(head, [(row, i) for i in span])
            found.append((states_TD.mean(0), states_TD[-1], len(span)))
    means, lasts, counts = zip(*found, strict=True)
    mean_MD = torch.stack(means)
    return States(mean_MD, torch.stack(lasts), torch.tensor(counts, device=mean_MD.device))
