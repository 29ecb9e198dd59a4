"""Facts that are put before the questions they are about, and before no others.

SCR (arXiv 2503.05212) in its strong form: facts are searched by meaning, and what is found has to
be confirmed before the model sees it. Here the confirmation is a rule: the question names the
fact's subject and is near enough to its prompt, or it is so near that no name is needed; optionally
the model itself confirms, by the odds of yes over no. Where nothing is accepted the question goes
to the model as it came.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from knowpatch.errors import PatchError
from knowpatch.models.passes import Scored
from knowpatch.models.view import ModelView
from knowpatch.parts.encoders import encoder_of
from knowpatch.parts.factbook import (
    Fact,
    Factbook,
    holds_book,
    joined,
    kept,
    names,
    parted,
    statement,
)
from knowpatch.parts.prompting.facts import TEMPLATES, stated
from knowpatch.parts.rules import Decided, Rendered, RuleKind, register
from knowpatch.parts.spans import continuation
from knowpatch.patch import PromptRule

RETRIEVED = "retrieved@1"
YES, NO = " yes", " no"
CONFIRM = "Fact: {}\nQuestion: {}\nDoes the fact help to answer the question, yes or no? Answer:"


@dataclass(frozen=True)
class Gate:
    """When a fact may be put before a question.

    Attributes:
        template: how it is stated; limit: facts at most.
        named: least cosine where the question names the fact's subject; unnamed: where not.
        odds: least log-odds of yes over no where the model confirms; None where it is not asked.
    """

    template: str
    limit: int
    named: float
    unnamed: float
    odds: float | None = None


def retrieved_rule(book: Factbook, encoder: str, gate: Gate) -> PromptRule:
    """A rule that states what is found and confirmed.

    Args:
        book: the facts.
        encoder: what their keys were made with.
        gate: when one may be stated.
    """
    data, tensors = kept(book, encoder)
    return PromptRule(RETRIEVED, {**data, **vars(gate)}, tensors)


@register("retrieved")
@dataclass(frozen=True)
class Retrieved(RuleKind):
    """A book of facts behind a gate."""

    book: Factbook
    encoder: str
    gate: Gate

    kind = RETRIEVED

    @classmethod
    def check(cls, rule: PromptRule) -> None:
        fields = {"facts", "encoder", *Gate.__dataclass_fields__}
        if not (set(rule.data) == fields and holds_book(rule) and _numbers(rule)):
            raise PatchError(f"damaged prompt rule of kind {RETRIEVED}")

    @classmethod
    def join(cls, rules: Sequence[PromptRule]) -> Retrieved:
        """All facts behind the newest rule's gate."""
        book, encoder = joined(rules)
        last = rules[-1].data
        return cls(book, encoder, Gate(**{name: last[name] for name in Gate.__dataclass_fields__}))

    @classmethod
    def without(cls, rule: PromptRule, prompts: Collection[str]) -> PromptRule:
        return PromptRule(rule.kind, *parted(rule, prompts))

    def render(self, question: str, view: ModelView, *, chat: bool) -> Rendered:
        encoder = encoder_of(self.encoder, view)
        found = self.book.nearest(question, encoder, self.gate.limit)
        seen = [(n, self.book.facts[n], cosine) for n, cosine in found]
        limits = [self._limit(fact, question) for _, fact, _ in seen]
        fires = [cosine >= limit for (_, _, cosine), limit in zip(seen, limits, strict=True)]
        if self.gate.odds is not None and any(fires):
            fires = self._confirmed(view, question, [fact for _, fact, _ in seen], fires)
        decided = tuple(
            Decided(self.book.owner_F[n], fired, statement(fact), "similarity", cosine, limit)
            for (n, fact, cosine), limit, fired in zip(seen, limits, fires, strict=True)
        )
        told = [one.what for one in decided if one.fired]
        around = stated(told, self.gate.template, chat=chat) if told else Rendered()
        return Rendered(around.before, around.system, decided)

    def _limit(self, fact: Fact, question: str) -> float:
        return self.gate.named if names(question, fact["subject"]) else self.gate.unnamed

    def _confirmed(
        self, view: ModelView, question: str, facts: Sequence[Fact], fires: Sequence[bool]
    ) -> list[bool]:
        """Which of the accepted facts the model itself finds helpful."""
        odds = confirmations(view, [(statement(fact), question) for fact in facts])
        least = self.gate.odds or 0.0
        return [fired and odd > least for fired, odd in zip(fires, odds, strict=True)]


def confirmations(view: ModelView, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """log P(yes) - log P(no) for whether each fact helps with its question, in one batch."""
    prompts = [view.encode(CONFIRM.format(fact, question)) for fact, question in pairs]
    asked = [
        (prompt.ids, continuation(view.tokenizer, prompt, word)[:1])
        for prompt in prompts
        for word in (YES, NO)
    ]
    scores: list[Scored] = view.score(asked)
    said = [scored.logprobs[0] for scored in scores]
    return [yes - no for yes, no in zip(said[::2], said[1::2], strict=True)]


def _numbers(rule: PromptRule) -> bool:
    data = rule.data
    return (
        data["template"] in TEMPLATES
        and isinstance(data["limit"], int)
        and data["limit"] > 0
        and all(isinstance(data[name], int | float) for name in ("named", "unnamed"))
        and isinstance(data["odds"], int | float | None)
    )
