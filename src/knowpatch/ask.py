"""Ask: the planner through which every question goes to a model.

Requests to score a forced answer or to generate one come in, futures go out. Nothing runs until a
result is wanted; then equal requests run once, and those that begin alike read their beginning
once, in batches of about one length and a bounded number of tokens, in an order that does not
depend on the order of asking. Each may carry patches of its own beside the model. What an unedited
model answered before is not asked again (answers.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Protocol

from knowpatch.answers import Answers
from knowpatch.errors import RequestError, Unscored
from knowpatch.future import Future
from knowpatch.held import Carried
from knowpatch.models import mixing, shared, trials
from knowpatch.models.passes import Distributions, Ids, Scored, Second
from knowpatch.models.sampling import Sampled
from knowpatch.models.view import ModelView, S
from knowpatch.parts.procedures import Asking, InForce, Say
from knowpatch.parts.spans import Encoded, continuation
from knowpatch.patch import Patch
from knowpatch.progress import Progress, silent
from knowpatch.questions import Question, Questions, Saying, Scoring
from knowpatch.stepping import Generated, Stepping

BATCH_TOKENS = 2048
"""Tokens that a batch runs at most, padding included."""
HELD_TOKENS = 8 * BATCH_TOKENS
"""Tokens whose keys and values it holds at most, shared beginnings included."""


class Speaker(Protocol):
    """What can be asked: an EditedModel."""

    @property
    def view(self) -> ModelView: ...

    @property
    def live(self) -> tuple[Patch, ...]: ...

    def carried(self) -> tuple[Patch, ...]: ...

    def carry(self, row: Carried) -> tuple[Patch, ...]: ...

    def readings(
        self, prompt: str, *, chat: bool = False, patches: Sequence[Patch] | None = None
    ) -> tuple[Encoded, Second | None]: ...


class Ask:
    """Collects questions to one model and answers them together."""

    def __init__(self, model: Speaker, *, progress: Progress = silent) -> None:
        self.model = model
        self.progress = progress
        self._waiting: dict[Question, Future[Any]] = {}
        self._stepping: list[Stepping] = []

    def score(self, prompt: str, answer: str | Sequence[int], **how: Any) -> Future[Scored]:
        """Force `answer` (a text, or ids) behind `prompt`; keyword arguments as in `forced`."""
        return self.forced(prompt, answer, Scored, **how)

    def forced(
        self,
        prompt: str,
        answer: str | Sequence[int],
        give: type[S],
        *,
        chat: bool = False,
        patches: Sequence[Patch] | None = None,
    ) -> Future[S]:
        """Force `answer` behind `prompt`, and keep of it what `give` says.

        `patches` are carried beside the model; by default those of this context's session. Patches
        that are live act if they are when the question is run: read results within `applied`.

        Raises:
            RequestError: an empty prompt, which nothing can follow.
        """
        if self._procedure(patches) is not None:
            return Future.failed(Unscored("a procedure answers in steps: no answer can be forced"))
        encoded, second, carried = self._encode(prompt, patches, chat=chat)
        if isinstance(answer, str):
            ids = continuation(self.model.view.tokenizer, encoded, answer)
        else:
            ids = tuple(answer)
        question = Scoring(encoded.ids, ids, carried, give, second)
        return self._waiting.setdefault(question, Future(self.run))

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int,
        chat: bool = False,
        patches: Sequence[Patch] | None = None,
        whole: bool = False,
        top_k: int | None = None,
        draw: int = 0,
    ) -> Future[Generated]:
        """Let the model answer `prompt`; `patches` as in `forced`.

        Args:
            prompt: the question.
            max_new_tokens: length of the answer, if it does not end itself before.
            chat: whether it is asked through the chat template.
            patches: carried beside the model.
            whole: ignore endings, so that the answer has just that length.
            top_k: sample from so many likeliest tokens instead of taking the likeliest.
            draw: seed of the sampling.
        """
        if (procedure := self._procedure(patches)) is not None:
            if whole or top_k:
                return Future.failed(Unscored("a procedure's answer has the length that it has"))
            return self._in_steps(prompt, procedure, patches)
        encoded, second, carried = self._encode(prompt, patches, chat=chat)
        question = Saying(encoded.ids, max_new_tokens, carried, whole, top_k or 0, draw, second)
        return self._waiting.setdefault(question, Future(self.run))

    def _procedure(self, patches: Sequence[Patch] | None) -> InForce | None:
        """The procedure that answers a question with these patches."""
        carried = self.model.carried() if patches is None else patches
        return InForce.of((*self.model.live, *carried))

    def _in_steps(
        self, prompt: str, procedure: InForce, patches: Sequence[Patch] | None
    ) -> Future[Generated]:
        """A question that a procedure answers; what it asks goes the ordinary way."""
        asking = Asking.begin(procedure.kind, prompt, self.model.view)
        stepping = Stepping(asking, Future(self.run), patches)
        self._stepping.append(stepping)
        return stepping.future

    def _said(self, say: Say, patches: Sequence[Patch] | None) -> Future[Generated]:
        encoded, second, carried = self._encode(say.prompt, patches, chat=False)
        # What does nothing in a pass is left out, so that questions of different memories run
        # together and read the worked examples before them once.
        acting = tuple(patch for patch in carried if patch.deltas or patch.wraps)
        question = Saying(encoded.ids, say.tokens, acting, False, 0, 0, second, say.stop)
        return self._waiting.setdefault(question, Future(self.run))

    def _encode(
        self, prompt: str, patches: Sequence[Patch] | None, *, chat: bool
    ) -> tuple[Encoded, Second | None, tuple[Patch, ...]]:
        carried = self.model.carried() if patches is None else self.model.carry(patches)
        encoded, second = self.model.readings(prompt, chat=chat, patches=carried)
        if not encoded.ids:
            raise RequestError("an empty prompt was given; give a question, or the start of a text")
        return encoded, second, carried

    def run(self) -> None:
        """Answer everything asked so far."""
        stepping, self._stepping = self._stepping, []
        try:
            while stepping := [one for one in stepping if one.go_on(self.model.view)]:
                for one in stepping:
                    one.ask(self._said)
                self._answer_all()
        finally:  # what an error or an interrupt left open can be asked again
            self._stepping += stepping
        self._answer_all()

    def _answer_all(self) -> None:
        """Answer all questions that the model is asked as they are."""
        waiting, self._waiting = self._waiting, {}
        try:
            self._run(waiting)
        finally:  # what an error or an interrupt left open can be asked again
            self._waiting |= {q: future for q, future in waiting.items() if not future.done}

    def _run(self, waiting: Mapping[Question, Future[Any]]) -> None:
        self._recall(waiting)
        left = [question for question, future in waiting.items() if not future.done]
        richer = _richer(left)
        found: dict[Question, Scored | Generated] = {}
        done = len(waiting) - len(left)
        for batch, begun in self._batches([q for q in left if q not in richer.values()]):
            self.progress("asking", done, len(waiting))
            for question, answer in zip(batch, self._answer(batch, begun), strict=True):
                found |= self._set(waiting, question, answer)
                if (poorer := richer.get(question)) and isinstance(answer, Scored):
                    found |= self._set(waiting, poorer, answer.plain())
            done += len(batch)
        # At the end, all or nothing: what was kept of a broken run would change the batches, and
        # by them the last digits, of the run that takes it up.
        self._remember(found)
        if waiting:
            self.progress("asking", len(waiting), len(waiting))

    @staticmethod
    def _set(
        waiting: Mapping[Question, Future[Any]], question: Question, answer: Scored | Generated
    ) -> dict[Question, Scored | Generated]:
        """Tell the future; returns what there is to be kept."""
        waiting[question].set(answer)
        return {question: answer} if _keeps(question) else {}

    def _answer(self, batch: Questions, begun: Sequence[Ids]) -> Sequence[Scored | Generated]:
        """Answer questions of one kind, each beginning with `begun`."""
        view, rows, first = self.model.view, tuple(q.patches for q in batch), batch[0]
        seconds = [q.second for q in batch if q.second is not None]
        if isinstance(first, Scoring):
            pairs = [(q.prompt, q.answer) for q in batch if isinstance(q, Scoring)]
            if seconds:
                return mixing.score(view, pairs, seconds, rows, first.give)
            return shared.score(view, pairs, rows, begun, first.give)
        draws = tuple(q.draw for q in batch if isinstance(q, Saying))
        prompts, sampled = [q.prompt for q in batch], Sampled(first.top_k, draws)
        how: dict[str, Any] = {
            "max_new_tokens": first.tokens,
            "sampled": sampled if first.top_k else None,
            "whole": first.whole,
            "until": first.until,
        }
        if seconds:
            said = mixing.generate(view, prompts, seconds, rows, **how)
        else:
            said = shared.generate(view, prompts, rows, begun[0], **how)
        return [Generated(ids, view.decode(ids)) for ids in said]

    def _batches(self, questions: Sequence[Question]) -> Iterator[tuple[Questions, list[Ids]]]:
        """Questions of one kind and of about one length, with the beginning of each that is read
        once; at most BATCH_TOKENS with padding, in an order that does not depend on the order of
        asking."""
        for _, some in groupby(self._ordered(questions), key=lambda item: item[0]):
            batch: list[Question] = []
            begun: list[Ids] = []
            width = held = 0
            for _, head, rest, question in some:
                deep, count = max(held, len(head) + rest), len(batch) + 1
                full = rest * count > BATCH_TOKENS or deep * count > HELD_TOKENS
                if batch and (full or (rest - width) * len(batch) > shared.WORTH):
                    yield batch, begun
                    batch, begun, deep = [], [], len(head) + rest
                batch.append(question)
                begun.append(head)
                width, held = rest, deep
            yield batch, begun

    def _ordered(
        self, questions: Sequence[Question]
    ) -> Iterator[tuple[tuple[Any, ...], Ids, int, Question]]:
        """Questions in the order of asking, short ones first: (what they must be alike in to run
        together, the beginning that is shared, tokens of the rest, question)."""
        for kind in sorted({question.kind for question in questions}):
            mine = [question for question in questions if question.kind == kind]
            apart = kind[0] == "generate"
            begun: list[Ids] = [()] * len(mine)
            if mine[0].second is None:  # of two readings the beginnings are not shared
                begun = shared.heads(
                    self.model.view,
                    [question.prompt for question in mine],
                    tuple(question.patches for question in mine),
                    [question.length for question in mine],
                    apart=apart,
                )
            ordered = []
            for head, question in zip(begun, mine, strict=True):
                # A generation goes on from one beginning; to score, all are read in one pass.
                alike = (kind, head if apart else bool(head))
                ids = tuple(patch.id for patch in question.patches)
                ordered.append((alike, question.length - len(head), head, ids, question))
            for alike, rest, head, _, question in sorted(ordered):
                yield alike, head, rest, question

    def _kept(self) -> Answers | None:
        """Where answers are kept: only those of an unedited model that came from files."""
        view = self.model.view
        plain = view.identity.folder is not None and not self.model.live and not trials.of(view)
        return Answers(view) if plain else None

    def _recall(self, waiting: Mapping[Question, Future[Any]]) -> None:
        """Set what is kept."""
        store = self._kept()
        if store is None:
            return
        keys = {question.key: question for question in waiting if _keeps(question)}
        for key, found in store.get(list(keys)).items():
            question = keys[key]
            answer: type[Any] = question.give if isinstance(question, Scoring) else Generated
            waiting[question].set(answer(*map(_tuples, found)))

    def _remember(self, answers: Mapping[Question, Scored | Generated]) -> None:
        store = self._kept()
        if store is not None:
            plain = {q.key: list(vars(a).values()) for q, a in answers.items()}
            if plain:
                store.put(plain)


def _richer(questions: Sequence[Question]) -> dict[Question, Question]:
    """Of forced answers of which more than the plain score is wanted: each to the question for
    that plain score, where it is among `questions`."""
    asked = set(questions)
    plain = {q: replace(q, give=Scored) for q in questions if isinstance(q, Scoring)}
    return {q: p for q, p in plain.items() if q != p and p in asked}


def _keeps(question: Question) -> bool:
    """Whether its answer is worth keeping: of an unedited model, and not a whole vocabulary."""
    return not question.patches and getattr(question, "give", None) is not Distributions


def _tuples(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
