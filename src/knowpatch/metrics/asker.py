"""Asker: one of the two models a metric asks, before or after; questions in, futures out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from knowpatch.ask import Ask, Future, Generated
from knowpatch.models.passes import Distributions, Scored, Spread
from knowpatch.patch import Patch

ANSWER_TOKENS = 32
"""Length to which free answers are let go on."""


@dataclass(frozen=True)
class Asker:
    """Asks one model, with certain patches beside it.

    Attributes:
        ask: the planner that collects questions.
        patches: carried by every question; None for those of the context.
        chat: whether questions go through the chat template.
    """

    ask: Ask
    patches: Sequence[Patch] | None = None
    chat: bool = False

    def force(self, prompt: str, answer: str) -> Future[Scored]:
        """Force `answer` behind `prompt`: for each token, did it lead, and its log-probability."""
        return self.ask.forced(prompt, answer, Scored, chat=self.chat, patches=self.patches)

    def spread(self, prompt: str, answer: str) -> Future[Spread]:
        """As `force`, with the likeliest tokens at each of the answer's places."""
        return self.ask.forced(prompt, answer, Spread, chat=self.chat, patches=self.patches)

    def distributions(self, prompt: str, answer: str) -> Future[Distributions]:
        """As `force`, with the log-probabilities of the whole vocabulary at each place.

        They are large and never kept: for the edited model, to be held against a `spread`.
        """
        return self.ask.forced(prompt, answer, Distributions, chat=self.chat, patches=self.patches)

    def say(self, prompt: str, tokens: int = ANSWER_TOKENS) -> Future[Generated]:
        """Let the model answer greedily, until it ends its answer or for `tokens` tokens."""
        return self.ask.generate(
            prompt, max_new_tokens=tokens, chat=self.chat, patches=self.patches
        )

    def go_on(self, prompt: str, tokens: int, *, top_k: int | None = None) -> Future[Generated]:
        """Just `tokens` tokens, endings ignored; greedily, or sampled from the `top_k` likeliest.

        What is sampled depends on the prompt alone, not on the order of asking.
        """
        draw = 0 if top_k is None else int(hashlib.sha256(prompt.encode()).hexdigest()[:15], 16)
        return self.ask.generate(
            prompt,
            max_new_tokens=tokens,
            chat=self.chat,
            patches=self.patches,
            whole=True,
            top_k=top_k,
            draw=draw,
        )
