"""Ask: the planner through which every question goes to a model.

Requests to score a forced answer or to generate one come in, futures go out. Nothing runs until a
result is wanted; then equal requests run once, and those that begin alike read their beginning
once, in batches of about one length and a bounded number of tokens, in an order that does not
depend on the order of asking. Each may carry patches of its own beside the model. What an unedited
model answered before is not asked again (answers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Generic, Protocol, TypeVar

from knowpatch.answers import Answers, key_of
from knowpatch.errors import RequestError
from knowpatch.held import Carried
from knowpatch.models import shared, trials
from knowpatch.models.passes import Scored
from knowpatch.models.view import ModelView
from knowpatch.parts.spans import Encoded, continuation
from knowpatch.patch import Patch
from knowpatch.progress import Progress, silent

T = TypeVar("T")
BATCH_TOKENS = 1024
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

    def encode(
        self, prompt: str, *, chat: bool = False, patches: Sequence[Patch] | None = None
    ) -> Encoded: ...


@dataclass(frozen=True)
class Generated:
    """A greedy answer: its ids (with the one that ended it) and its text."""

    ids: tuple[int, ...]
    text: str


class Future(Generic[T]):
    """A result to come; asking for it runs what is waiting."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run
        self._found: list[T] = []

    def result(self) -> T:
        if not self._found:
            self._run()
        return self._found[0]

    @property
    def done(self) -> bool:
        return bool(self._found)

    def set(self, value: T) -> None:
        self._found = [value]


Ids = tuple[int, ...]


@dataclass(frozen=True)
class _Score:
    """Force `answer` behind `prompt`, with `patches` beside."""

    prompt: Ids
    answer: Ids
    patches: tuple[Patch, ...]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def kind(self) -> tuple[str, int]:
        """Questions of one kind can run together."""
        return "score", 0

    @property
    def key(self) -> str:
        return key_of([*self.kind, self.prompt, self.answer])

    def __lt__(self, other: _Score) -> bool:
        return (self.prompt, self.answer) < (other.prompt, other.answer)


@dataclass(frozen=True)
class _Text:
    """Continue `prompt` by up to `tokens`, with `patches` beside."""

    prompt: Ids
    tokens: int
    patches: tuple[Patch, ...]

    @property
    def length(self) -> int:
        return len(self.prompt) + self.tokens

    @property
    def kind(self) -> tuple[str, int]:
        return "generate", self.tokens

    @property
    def key(self) -> str:
        return key_of([*self.kind, self.prompt])

    def __lt__(self, other: _Text) -> bool:
        return self.prompt < other.prompt


_Question = _Score | _Text


class Ask:
    """Collects questions to one model and answers them together."""

    def __init__(self, model: Speaker, *, progress: Progress = silent) -> None:
        self.model = model
        self.progress = progress
        self._waiting: dict[_Question, Future[Any]] = {}

    def score(
        self,
        prompt: str,
        answer: str | Sequence[int],
        *,
        chat: bool = False,
        patches: Sequence[Patch] | None = None,
    ) -> Future[Scored]:
        """Force `answer` (a text, or ids) behind `prompt`.

        `patches` are carried beside the model; by default those of this context's session. Patches
        that are live act if they are when the question is run: read results within `applied`.

        Raises:
            RequestError: an empty prompt, which nothing can follow.
        """
        carried = self.model.carried() if patches is None else self.model.carry(patches)
        encoded = self._encode(prompt, carried, chat=chat)
        if isinstance(answer, str):
            ids = continuation(self.model.view.tokenizer, encoded, answer)
        else:
            ids = tuple(answer)
        return self._waiting.setdefault(_Score(encoded.ids, ids, carried), Future(self.run))

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int,
        chat: bool = False,
        patches: Sequence[Patch] | None = None,
    ) -> Future[Generated]:
        """Let the model answer `prompt` greedily; `patches` as in `score`."""
        carried = self.model.carried() if patches is None else self.model.carry(patches)
        encoded = self._encode(prompt, carried, chat=chat)
        question = _Text(encoded.ids, max_new_tokens, carried)
        return self._waiting.setdefault(question, Future(self.run))

    def _encode(self, prompt: str, carried: tuple[Patch, ...], *, chat: bool) -> Encoded:
        encoded = self.model.encode(prompt, chat=chat, patches=carried)
        if not encoded.ids:
            raise RequestError("an empty prompt was given; give a question, or the start of a text")
        return encoded

    def run(self) -> None:
        """Answer everything asked so far."""
        waiting, self._waiting = self._waiting, {}
        try:
            self._run(waiting)
        finally:  # what an error or an interrupt left open can be asked again
            self._waiting |= {q: future for q, future in waiting.items() if not future.done}

    def _run(self, waiting: Mapping[_Question, Future[Any]]) -> None:
        self._recall(waiting)
        open_ = [question for question, future in waiting.items() if not future.done]
        done = len(waiting) - len(open_)
        for batch in self._batches(open_):
            self.progress("asking", done, len(waiting))
            for question, answer in zip(batch, self._answer(batch), strict=True):
                waiting[question].set(answer)
            self._remember({question: waiting[question].result() for question in batch})
            done += len(batch)
        if waiting:
            self.progress("asking", len(waiting), len(waiting))

    def _answer(self, batch: Sequence[_Question]) -> Sequence[Scored | Generated]:
        """Answer questions of one kind."""
        view, rows = self.model.view, tuple(question.patches for question in batch)
        pairs = [(q.prompt, q.answer) for q in batch if isinstance(q, _Score)]
        if pairs:
            return shared.score(view, pairs, rows)
        prompts, (_, tokens) = [question.prompt for question in batch], batch[0].kind
        said = shared.generate(view, prompts, rows, max_new_tokens=tokens)
        return [Generated(ids, view.decode(ids)) for ids in said]

    def _batches(self, questions: Sequence[_Question]) -> Iterator[list[_Question]]:
        """Questions of one kind, those that begin alike together, of about one length, and at most
        BATCH_TOKENS with padding; in an order that does not depend on the order of asking."""
        ordered: list[tuple[Any, ...]] = []
        for kind in sorted({question.kind for question in questions}):
            mine = [question for question in questions if question.kind == kind]
            begun = shared.heads(
                self.model.view,
                [question.prompt for question in mine],
                tuple(question.patches for question in mine),
                max(question.length for question in mine),
            )
            ids = (tuple(patch.id for patch in question.patches) for question in mine)
            rest = (q.length - len(head) for q, head in zip(mine, begun, strict=True))
            ordered += sorted(zip(repeat(kind), begun, rest, ids, mine, strict=False))
        batch: list[_Question] = []
        before: Any = None
        for kind, head, size, _, question in ordered:
            count = len(batch) + 1
            full = size * count > BATCH_TOKENS or (len(head) + size) * count > HELD_TOKENS
            if batch and (full or (kind, head) != before):
                yield batch
                batch = []
            batch.append(question)
            before = kind, head
        if batch:
            yield batch

    def _kept(self) -> Answers | None:
        """Where answers are kept: only those of an unedited model that came from files."""
        view = self.model.view
        plain = view.identity.folder is not None and not self.model.live and not trials.of(view)
        return Answers(view) if plain else None

    def _recall(self, waiting: Mapping[_Question, Future[Any]]) -> None:
        """Set what is kept."""
        store = self._kept()
        if store is None:
            return
        keys = {question.key: question for question in waiting if not question.patches}
        for key, found in store.get(list(keys)).items():
            question = keys[key]
            plain = [tuple(part) if isinstance(part, list) else part for part in found]
            answer: type[Any] = Scored if isinstance(question, _Score) else Generated
            waiting[question].set(answer(*plain))

    def _remember(self, answers: Mapping[_Question, Scored | Generated]) -> None:
        store = self._kept()
        if store is not None:
            plain = {q.key: list(vars(a).values()) for q, a in answers.items() if not q.patches}
            if plain:
                store.put(plain)
