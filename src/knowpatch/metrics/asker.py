"""Asker: one of the two models a metric asks, before or after; questions in, futures out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from knowpatch.ask import Ask
from knowpatch.future import Future
from knowpatch.models.passes import Distributions, Scored, Spread
from knowpatch.models.view import S
from knowpatch.patch import Patch
from knowpatch.stepping import Generated

ANSWER_TOKENS = 32
"""Length to which free answers are let go on."""


@dataclass
class Asker:
    """Asks one model, with certain patches beside it. A question asked again is the same future.

    Attributes:
        ask: the planner that collects questions.
        patches: carried by every question; None for those of the context.
        chat: whether questions go through the chat template.
    """

    ask: Ask
    patches: Sequence[Patch] | None = None
    chat: bool = False
    _asked: dict[Hashable, Future[Any]] = field(default_factory=dict, repr=False)

    def force(self, prompt: str, answer: str) -> Future[Scored]:
        """Force `answer` behind `prompt`: for each token, did it lead, and its log-probability."""
        return self._forced(prompt, answer, Scored)

    def spread(self, prompt: str, answer: str) -> Future[Spread]:
        """As `force`, with the likeliest tokens at each of the answer's places."""
        return self._forced(prompt, answer, Spread)

    def distributions(self, prompt: str, answer: str) -> Future[Distributions]:
        """As `force`, with the log-probabilities of the whole vocabulary at each place.

        They are large and never kept: take what you need as they come, with `read`. For the
        edited model, to be held against a `spread` of the unedited one, which has answered before.
        """
        return self._forced(prompt, answer, Distributions)

    def say(self, prompt: str, tokens: int = ANSWER_TOKENS) -> Future[Generated]:
        """Let the model answer greedily, until it ends its answer or for `tokens` tokens."""
        return self._said(prompt, tokens, whole=False, top_k=None)

    def go_on(self, prompt: str, tokens: int, *, top_k: int | None = None) -> Future[Generated]:
        """Just `tokens` tokens, endings ignored; greedily, or sampled from the `top_k` likeliest.

        What is sampled depends on the prompt alone, not on the order of asking.
        """
        return self._said(prompt, tokens, whole=True, top_k=top_k)

    def answered(self) -> Asker:
        """This asker with the answers that it has, and without new questions."""
        return Answered(self.ask, self.patches, self.chat, self._asked)

    def _forced(self, prompt: str, answer: str, give: type[S]) -> Future[S]:
        return self._once(
            (prompt, answer, give),
            lambda: self.ask.forced(prompt, answer, give, chat=self.chat, patches=self.patches),
        )

    def _said(
        self, prompt: str, tokens: int, *, whole: bool, top_k: int | None
    ) -> Future[Generated]:
        draw = 0 if top_k is None else int(hashlib.sha256(prompt.encode()).hexdigest()[:15], 16)
        return self._once(
            (prompt, tokens, whole, top_k),
            lambda: self.ask.generate(
                prompt,
                max_new_tokens=tokens,
                chat=self.chat,
                patches=self.patches,
                whole=whole,
                top_k=top_k,
                draw=draw,
            ),
        )

    def _once(self, question: Hashable, ask: Callable[[], Future[Any]]) -> Future[Any]:
        if question not in self._asked:
            self._asked[question] = ask()
        return self._asked[question]


class Nobody(Asker):
    """Takes questions and never answers: for hearing what a metric asks the other model."""

    def _once(self, question: Hashable, ask: Callable[[], Future[Any]]) -> Future[Any]:
        return Future(_unanswered)


class Answered(Asker):
    """An asker whose questions were all asked before; a new one is a metric's fault."""

    def _once(self, question: Hashable, ask: Callable[[], Future[Any]]) -> Future[Any]:
        assert question in self._asked, f"asked only at the second time: {question!r}"
        return self._asked[question]


def _unanswered() -> None:
    raise AssertionError("nobody was asked")
