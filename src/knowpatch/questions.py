"""What a model can be asked, as the planner keeps it: equal questions are equal values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from knowpatch.answers import key_of
from knowpatch.models.passes import Ids, Scored, Second
from knowpatch.patch import Patch


@dataclass(frozen=True)
class Scoring:
    """Force `answer` behind `prompt`, with `patches` beside; `give` says what is wanted of it."""

    prompt: Ids
    answer: Ids
    patches: tuple[Patch, ...]
    give: type[Scored]
    second: Second | None = None

    @property
    def length(self) -> int:
        return _longest(self.prompt, self.second) + len(self.answer)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Questions of one kind can run together."""
        return "score", self.give.__name__, *_mixing(self.second)

    @property
    def key(self) -> str:
        return key_of([*self.kind, self.prompt, self.answer])

    def __lt__(self, other: Scoring) -> bool:
        return (self.prompt, self.answer) < (other.prompt, other.answer)


@dataclass(frozen=True)
class Saying:
    """Continue `prompt`, with `patches` beside; see Ask.generate."""

    prompt: Ids
    tokens: int
    patches: tuple[Patch, ...]
    whole: bool
    top_k: int
    draw: int
    second: Second | None = None
    until: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        return _longest(self.prompt, self.second) + self.tokens

    @property
    def kind(self) -> tuple[Any, ...]:
        return "generate", self.tokens, self.whole, self.top_k, self.until, *_mixing(self.second)

    @property
    def key(self) -> str:
        return key_of([*self.kind, self.draw, self.prompt])

    def __lt__(self, other: Saying) -> bool:
        return (self.prompt, self.draw) < (other.prompt, other.draw)


def _longest(prompt: Ids, second: Second | None) -> int:
    """Tokens of the longer reading."""
    return len(prompt) if second is None else max(len(prompt), len(second.prompt))


def _mixing(second: Second | None) -> tuple[str, ...]:
    """What tells questions that are read in two ways from others."""
    return () if second is None else ("mixed",)


Question = Scoring | Saying
Questions = Sequence[Question]
