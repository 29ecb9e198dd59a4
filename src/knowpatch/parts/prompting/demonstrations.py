"""Facts that stand behind worked examples (IKE, arXiv 2305.12740).

Before a question stand the fact's demonstrations, the fact's own (its prompt, answered as wanted),
and the fact. A single fact is always shown, as published; of several, the nearest to a question,
and only where the question is found to be about it. What does not fit is left out from the far
end, a demonstration at a time; the question never.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from knowpatch.errors import PatchError
from knowpatch.models.view import ModelView
from knowpatch.parts.demonstrations import block
from knowpatch.parts.encoders import encoder_of
from knowpatch.parts.factbook import Factbook, Least, holds_book, joined, kept, parted, statement
from knowpatch.parts.prompting.facts import stated
from knowpatch.parts.rules import Decided, Rendered, RuleKind, register
from knowpatch.patch import PromptRule

log = logging.getLogger(__name__)

DEMONSTRATIONS = "demonstrations@1"
INDEX = "block.index"
ROOM, MOST_ROOM = 4, 256
"""Of a model's positions, what is left to answers: a quarter, and at most so many tokens."""


@dataclass(frozen=True)
class Showing:
    """How facts are shown.

    Attributes:
        own: whether the fact's own demonstration is the last.
        always: whether the nearest of several facts is shown, however far it is.
        tokens: of the whole prompt at most; None for what the model has positions for.
        named, unnamed: cosines from which one of several facts is shown.
    """

    own: bool
    always: bool
    tokens: int | None
    named: float
    unnamed: float


FIELDS = tuple(Showing.__dataclass_fields__)


def demonstrations_rule(
    book: Factbook, encoder: str, demonstrations: Sequence[Sequence[str]], showing: Showing
) -> PromptRule:
    """A rule that shows a fact behind its demonstrations.

    Args:
        book: the facts.
        encoder: what their keys were made with.
        demonstrations: of each fact, the most similar last.
        showing: how.
    """
    data, tensors = kept(book, encoder)
    blocks, index_FK = _indexed(demonstrations)
    return PromptRule(
        DEMONSTRATIONS, {**data, **vars(showing), "blocks": blocks}, {**tensors, INDEX: index_FK}
    )


@register("demonstrations")
@dataclass(frozen=True, eq=False)
class Demonstrations(RuleKind):
    """Facts, each behind its own.

    Attributes:
        demonstrations: of each fact of the book.
        told: facts of which it has been said that some do not fit.
    """

    book: Factbook
    encoder: str
    demonstrations: tuple[tuple[str, ...], ...]
    showing: Showing
    told: set[int] = field(default_factory=set)

    kind = DEMONSTRATIONS

    @classmethod
    def check(cls, rule: PromptRule) -> None:
        data, tensors = rule.data, dict(rule.tensors)
        index_FK = tensors.pop(INDEX, None)
        good = (
            set(data) == {"facts", "encoder", "blocks", *FIELDS}
            and holds_book(PromptRule(rule.kind, data, tensors))
            and _shows(data)
            and index_FK is not None
            and index_FK.ndim == 2
            and len(index_FK) == len(data["facts"])
            and bool(((index_FK >= -1) & (index_FK < len(data["blocks"]))).all())
        )
        if not good:
            raise PatchError(f"damaged prompt rule of kind {DEMONSTRATIONS}")

    @classmethod
    def join(cls, rules: Sequence[PromptRule]) -> Demonstrations:
        """All facts, shown as the newest rule says; of one prompt the newest."""
        book, encoder = joined(rules)
        by_prompt = [
            dict(zip([f["prompt"] for f in rule.data["facts"]], _blocks(rule), strict=True))
            for rule in rules
        ]
        pairs = zip(book.facts, book.owner_F, strict=True)
        found = tuple(by_prompt[owner][fact["prompt"]] for fact, owner in pairs)
        return cls(book, encoder, found, Showing(**{n: rules[-1].data[n] for n in FIELDS}))

    @classmethod
    def without(cls, rule: PromptRule, prompts: Collection[str]) -> PromptRule:
        data, tensors = parted(rule, prompts)
        pairs = zip(rule.data["facts"], _blocks(rule), strict=True)
        blocks, index_FK = _indexed([some for fact, some in pairs if fact["prompt"] not in prompts])
        return PromptRule(rule.kind, {**data, "blocks": blocks}, {**tensors, INDEX: index_FK})

    def render(self, question: str, view: ModelView, *, chat: bool) -> Rendered:
        number, score, least = self._nearest(question, view)
        fired = least is None or (score is not None and score >= least)
        owner, what = self.book.owner_F[number], statement(self.book.facts[number])
        before = ""
        if fired:
            before, told = self._context(number, question, view, chat=chat)
            what += told
        decided = Decided(owner, fired, what, "similarity", score if least else None, least)
        return Rendered(before, decided=(decided,))

    def _nearest(self, question: str, view: ModelView) -> tuple[int, float | None, float | None]:
        """The fact that is nearest to a question, its cosine, and the least one to be shown; None
        where it is shown anyway."""
        if len(self.book.facts) == 1:
            return 0, None, None
        ((number, cosine),) = self.book.nearest(question, encoder_of(self.encoder, view), 1)
        least = Least(self.showing.named, self.showing.unnamed)
        fact = self.book.facts[number]
        return number, cosine, None if self.showing.always else least.of(fact, question)

    def _context(
        self, number: int, question: str, view: ModelView, *, chat: bool
    ) -> tuple[str, str]:
        """What stands before a question, as much of it as fits; and what is to be said of that."""
        fact = statement(self.book.facts[number])
        blocks = [*self.demonstrations[number], *([block(fact, fact)] if self.showing.own else [])]
        end = stated([fact], "newfact", chat=chat).before
        limit = self._limit(view)

        def text(dropped: int) -> str:
            return "".join(blocks[dropped:]) + end

        def fits(dropped: int) -> bool:
            encoded = view.encode(question, chat=chat, before=text(dropped))
            return limit is None or len(encoded.ids) <= limit

        if not blocks or fits(0):
            return text(0), ""
        dropped = bisect_left(range(len(blocks)), True, key=fits)
        told = f"{len(blocks) - dropped} of {len(blocks)} demonstrations fit into {limit} tokens"
        if number not in self.told:
            log.warning("%r: %s", fact, told)
            self.told.add(number)
        return text(dropped), f"; {told}"

    def _limit(self, view: ModelView) -> int | None:
        """Tokens of a prompt at most."""
        positions = view.limits.positions
        if self.showing.tokens is not None or positions is None:
            return self.showing.tokens
        return positions - min(positions // ROOM, MOST_ROOM)


def _indexed(some: Sequence[Sequence[str]]) -> tuple[list[str], Tensor]:
    """Texts, each once, and for each fact the numbers of its own (F, K), -1 in front of fewer."""
    blocks = list(dict.fromkeys(text for texts in some for text in texts))
    number = {text: n for n, text in enumerate(blocks)}
    most = max(map(len, some))
    rows = [[-1] * (most - len(texts)) + [number[text] for text in texts] for texts in some]
    return blocks, torch.tensor(rows, dtype=torch.int64).reshape(len(some), most)


def _blocks(rule: PromptRule) -> list[tuple[str, ...]]:
    """The texts of each fact."""
    blocks = rule.data["blocks"]
    return [tuple(blocks[n] for n in row if n >= 0) for row in rule.tensors[INDEX].tolist()]


def _shows(data: Any) -> bool:
    blocks, tokens = data["blocks"], data["tokens"]
    return (
        isinstance(blocks, list)
        and all(isinstance(text, str) for text in blocks)
        and all(isinstance(data[name], bool) for name in ("own", "always"))
        and (tokens is None or (isinstance(tokens, int) and tokens > 0))
        and all(isinstance(data[name], int | float) for name in ("named", "unnamed"))
    )
