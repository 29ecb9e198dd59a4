"""Ask: the planner through which every question goes to a model.

Requests to score a forced answer or to generate one come in, futures go out. Nothing runs until a
result is wanted; then equal requests run once, in batches of about one length and a bounded number
of tokens, in an order that does not depend on the order of asking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from knowpatch.models.passes import Scored
from knowpatch.models.view import ModelView
from knowpatch.parts.spans import Encoded, continuation
from knowpatch.progress import Progress, silent

T = TypeVar("T")
BATCH_TOKENS = 1024


class Speaker(Protocol):
    """What can be asked: an EditedModel."""

    @property
    def view(self) -> ModelView: ...

    def encode(self, prompt: str, *, chat: bool = False) -> Encoded: ...


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

    def set(self, value: T) -> None:
        self._found = [value]


Ids = tuple[int, ...]
_Key = tuple[Ids, Any]


class Ask:
    """Collects questions to one model and answers them together."""

    def __init__(self, model: Speaker, *, progress: Progress = silent) -> None:
        self.model = model
        self.progress = progress
        self._scores: dict[_Key, Future[Scored]] = {}
        self._texts: dict[_Key, Future[Generated]] = {}

    def score(
        self, prompt: str, answer: str | Sequence[int], *, chat: bool = False
    ) -> Future[Scored]:
        """Force `answer` (a text, or ids) behind `prompt`."""
        encoded = self.model.encode(prompt, chat=chat)
        if isinstance(answer, str):
            ids = continuation(self.model.view.tokenizer, encoded, answer)
        else:
            ids = tuple(answer)
        return self._scores.setdefault((encoded.ids, ids), Future(self.run))

    def generate(
        self, prompt: str, *, max_new_tokens: int, chat: bool = False
    ) -> Future[Generated]:
        """Let the model answer `prompt` greedily."""
        encoded = self.model.encode(prompt, chat=chat)
        return self._texts.setdefault((encoded.ids, max_new_tokens), Future(self.run))

    def run(self) -> None:
        """Answer everything asked so far."""
        scores, self._scores = self._scores, {}
        texts, self._texts = self._texts, {}
        done, total = 0, len(scores) + len(texts)
        view = self.model.view
        for batch in _batches(scores, lambda key: len(key[0]) + len(key[1])):
            self.progress("asking", done, total)
            for key, scored in zip(batch, view.score(batch), strict=True):
                scores[key].set(scored)
            done += len(batch)
        for batch in _batches(texts, lambda key: len(key[0]) + key[1], by=lambda key: key[1]):
            self.progress("asking", done, total)
            rows = [ids for ids, _ in batch]
            answers = view.generate(rows, max_new_tokens=batch[0][1])
            for key, ids in zip(batch, answers, strict=True):
                texts[key].set(Generated(ids, view.decode(ids)))
            done += len(batch)
        if total:
            self.progress("asking", total, total)


def _batches(
    waiting: dict[_Key, Any],
    size: Callable[[_Key], int],
    by: Callable[[_Key], int] = lambda key: 0,
) -> Iterator[list[_Key]]:
    """Keys in batches of one `by`, about one size, and at most BATCH_TOKENS with padding."""
    batch: list[_Key] = []
    for key in sorted(waiting, key=lambda key: (by(key), size(key), key)):
        full = size(key) * (len(batch) + 1) > BATCH_TOKENS
        if batch and (full or by(key) != by(batch[0])):
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch
