"""Stepping: questions that a procedure answers, side by side, each asking what it needs next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from knowpatch.future import Future
from knowpatch.models.passes import Ids
from knowpatch.models.view import ModelView
from knowpatch.parts.procedures import Answered, Asking, Say, Step
from knowpatch.patch import Patch


@dataclass(frozen=True)
class Generated:
    """A greedy answer: its ids (with the one that ended it) and its text.

    Attributes:
        steps: how a procedure came to it; chain: its answers to the single hops.
    """

    ids: Ids
    text: str
    steps: tuple[Step, ...] = ()
    chain: tuple[str, ...] = ()

    @classmethod
    def of(cls, answered: Answered, view: ModelView) -> Generated:
        """What a procedure came to, as if the model had said it and stopped."""
        text = answered.text or ""
        ids = view.tokenizer.encode(text, add_special_tokens=False) if text else []
        return cls((*ids, *view.stop_ids[:1]), text, answered.steps, answered.chain)


@dataclass
class Stepping:
    """One question in the hands of a procedure, and the future that waits for its answer.

    Attributes:
        patches: that what it asks carries, as `Ask.generate` takes them.
    """

    asking: Asking
    future: Future[Generated]
    patches: Sequence[Patch] | None
    heard: Future[Generated] | None = None

    def ask(self, say: Callable[[Say, Sequence[Patch] | None], Future[Generated]]) -> None:
        """Ask what the procedure wants to know next."""
        assert self.asking.say is not None
        self.heard = say(self.asking.say, self.patches)

    def go_on(self, view: ModelView) -> bool:
        """Tell the procedure what was said; whether it goes on."""
        if self.heard is not None:
            self.asking.hear(self.heard.result().text)
            self.heard = None
        if self.asking.answered is None:
            return True
        self.future.set(Generated.of(self.asking.answered, view))
        return False
