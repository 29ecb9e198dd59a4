"""Mediation: one affine map from what a text says of an entity to a direction for the entity.

REMEDI (arXiv 2304.00740): with h the mean state of an attribute's tokens behind a block, read in a
sentence that states it, d = W h + b is added at the entity's last token in that block, so that the
model goes on as if the entity had the attribute. W and b are trained once, on facts that the model
does not hold, with the mean over facts of

    - log p(new answer) - unlearn log(1 - p(old answer)) + keep KL(before || with d),

the first a mean over the answer's tokens, the second of the old answer's first token where it is
another one, the third a mean over the places from the entity's last token up to the one before the
prompt's last. The published program keeps the KL of the last fact of a batch only, and restores the
last weights for the best. A tenth of the facts is held out; the weights that did best on these are
kept. Axes: N facts, D hidden size, M places, V vocabulary, B rows, T columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowpatch.models.above import Above
from knowpatch.models.passes import Act, Tap
from knowpatch.models.view import ModelView
from knowpatch.parts.descent import Pace, descend
from knowpatch.parts.spans import continuation, subject_position
from knowpatch.progress import Progress, silent
from knowpatch.request import EditRequest

TOGETHER = 32
"""Sentences that are read in one pass."""
HELD_OUT = 0.1
"""Share of the facts that are not trained on."""


@dataclass(frozen=True, eq=False)
class Mediator:
    """The trained map.

    Attributes:
        weight_DD, bias_D: W and b, float32.
        facts, held: how many it was trained on, and how many were held out.
        before, after: the mean NLL of the held-out facts' answers without and with it.
    """

    weight_DD: Tensor
    bias_D: Tensor
    facts: int
    held: int
    before: float
    after: float

    def directions(self, attributes_ND: Tensor) -> Tensor:
        return attributes_ND @ self.weight_DD.T + self.bias_D


@dataclass(frozen=True)
class Weights:
    """Weights of the loss's second and third term."""

    unlearn: float
    keep: float


@dataclass(frozen=True)
class Lesson:
    """A fact: prompt and answer, where the entity ends, the old answer's first token if another."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    entity: int
    old: int | None

    @classmethod
    def of(cls, view: ModelView, request: EditRequest, *, chat: bool) -> Lesson:
        prompt = view.encode(request.prompt, chat=chat)
        answer = continuation(view.tokenizer, prompt, request.target)
        entity = subject_position(prompt, request.subject or "")
        if request.old is not None:
            old = continuation(view.tokenizer, prompt, request.old)[0]
        else:
            ends = [(0, len(prompt.ids) - 1)]
            old = int(view.run([prompt.ids], logits_at=ends).logits_MV.argmax())
        return cls(prompt.ids, answer, entity, None if old == answer[0] else old)


def attributes(
    view: ModelView, layer: int, rows: Sequence[tuple[int, ...]], starts: Sequence[int]
) -> Tensor:
    """The mean state behind a block of each row's tokens from a start on: (N, D), float32."""
    tap, found = Tap(view.roles.blocks[layer].module, "output"), []
    for first in range(0, len(rows), TOGETHER):
        some, begins = rows[first : first + TOGETHER], starts[first : first + TOGETHER]
        run = view.run(some, taps=[tap], prompts=[len(row) for row in some])
        for number, (row, begin) in enumerate(zip(some, begins, strict=True)):
            places = [(number, at) for at in range(begin, len(row))]
            found.append(run.at(tap, places).mean(0).cpu())
    return torch.stack(found)


def by_fact(each_M: Tensor, owners_M: Tensor, facts: int) -> Tensor:
    """The mean over each fact's places, and then over all facts; one without places counts 0."""
    total_N = each_M.new_zeros(facts).index_add(0, owners_M, each_M)
    count_N = each_M.new_zeros(facts).index_add(0, owners_M, torch.ones_like(each_M))
    return (total_N / count_N.clamp(min=1)).mean()


class Training:
    """Passes over facts with the map as trained so far.

    Args:
        view: the model.
        module, layer: the map whose output the direction is added to, and its block.
        lessons: the facts.
        weights: of the loss's terms.
    """

    def __init__(
        self, view: ModelView, module: str, layer: int, lessons: Sequence[Lesson], weights: Weights
    ) -> None:
        self._lessons, self._weights, self._module = lessons, weights, module
        rows = [(*lesson.prompt, *lesson.answer) for lesson in lessons]
        starts = [len(lesson.prompt) for lesson in lessons]
        self._attributes_ND = attributes(view, layer, rows, starts).to(view.device)
        self._above = Above(view, layer, [row[:-1] for row in rows], prompts=starts)
        size = view.roles.hidden_size
        weight_DD = torch.zeros(size, size, device=view.device)
        bias_D = torch.zeros(size, device=view.device)
        weight_DD.requires_grad_()
        bias_D.requires_grad_()
        self.leaves = (weight_DD, bias_D)

    def answers(self, numbers: Sequence[int]) -> float:
        """The mean NLL of the answers, without a graph."""
        with torch.no_grad():
            return float(self._learned(self._logits(numbers, self._asked(numbers)), numbers))

    def loss(self, numbers: Sequence[int]) -> Tensor:
        asked, kept = self._asked(numbers), self._kept(numbers)
        logits_MV = self._logits(numbers, [*asked, *kept])
        answers_MV, now_MV = logits_MV[: len(asked)], logits_MV[len(asked) :]
        loss = self._learned(answers_MV, numbers)
        loss = loss + self._weights.unlearn * self._unlearned(answers_MV, asked, numbers)
        if self._weights.keep and kept:
            with torch.no_grad():
                before_MV = self._logits(numbers, kept, plain=True).log_softmax(-1)
            apart_M = (before_MV.exp() * (before_MV - now_MV.log_softmax(-1))).sum(-1)
            loss = loss + self._weights.keep * by_fact(apart_M, self._owners(kept), len(numbers))
        return loss

    def _asked(self, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """Where the answers are predicted."""
        return [
            (row, len(self._lessons[number].prompt) - 1 + i)
            for row, number in enumerate(numbers)
            for i in range(len(self._lessons[number].answer))
        ]

    def _kept(self, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """Where the prompt should go on as before."""
        return [
            (row, at)
            for row, number in enumerate(numbers)
            for at in range(self._lessons[number].entity, len(self._lessons[number].prompt) - 1)
        ]

    def _owners(self, places: Sequence[tuple[int, int]]) -> Tensor:
        return torch.tensor([row for row, _ in places], device=self._attributes_ND.device)

    def _learned(self, logits_MV: Tensor, numbers: Sequence[int]) -> Tensor:
        labels = [token for number in numbers for token in self._lessons[number].answer]
        labels_M1 = torch.tensor(labels, device=logits_MV.device)[:, None]
        found_M = logits_MV.log_softmax(-1).gather(1, labels_M1)[:, 0]
        return -by_fact(found_M, self._owners(self._asked(numbers)), len(numbers))

    def _unlearned(
        self, logits_MV: Tensor, asked: Sequence[tuple[int, int]], numbers: Sequence[int]
    ) -> Tensor:
        rows, old = [], []
        for index, (row, at) in enumerate(asked):
            lesson = self._lessons[numbers[row]]
            if at == len(lesson.prompt) - 1 and lesson.old is not None:
                rows.append(index)
                old.append(lesson.old)
        each = logits_MV[rows].softmax(-1)[range(len(rows)), old]
        return -torch.log1p(-each.clamp(max=1 - 1e-6)).sum() / len(numbers)

    def _logits(
        self, numbers: Sequence[int], places: Sequence[tuple[int, int]], *, plain: bool = False
    ) -> Tensor:
        acts = [] if plain else [Act(self._module, self._moved)]
        return self._above.run(numbers, logits_at=places, acts=acts).logits_MV

    def _moved(self, inputs: Tensor, outputs_BTD: Tensor, numbers: Sequence[int]) -> Tensor:
        weight_DD, bias_D = self.leaves
        added_BD = self._attributes_ND[list(numbers)] @ weight_DD.T + bias_D
        places = torch.tensor([self._lessons[number].entity for number in numbers])
        rows = torch.arange(len(places), device=outputs_BTD.device)
        where = (rows, places.to(outputs_BTD.device))
        return outputs_BTD.index_put(where, added_BD.to(outputs_BTD), accumulate=True)


def train(
    view: ModelView,
    module: str,
    layer: int,
    lessons: Sequence[Lesson],
    weights: Weights,
    pace: Pace,
    *,
    patience: int,
    progress: Progress = silent,
) -> Mediator:
    """The map, trained until `patience` passes have brought nothing for the facts held out."""
    held = int(HELD_OUT * len(lessons))
    training = Training(view, module, layer, lessons, weights)
    out = range(len(lessons) - held, len(lessons))
    before = best = training.answers(out) if held else float("nan")
    kept, since = [leaf.detach().clone() for leaf in training.leaves], 0

    def judge() -> bool:
        nonlocal best, kept, since
        found = training.answers(out) if held else float("nan")
        since += 1
        if not held or found < best:
            best, since = found, 0
            kept = [leaf.detach().clone() for leaf in training.leaves]
        return since >= patience

    descend(
        training.leaves, len(lessons) - held, training.loss, pace, judge=judge, progress=progress
    )
    weight_DD, bias_D = (each.cpu() for each in kept)
    return Mediator(weight_DD, bias_D, len(lessons) - held, held, before, best)
