"""Facts that answer in part: a question read with a fact before it, and as it came, mixed.

Language patches (arXiv 2211.03318) on a language model: a gate g says how likely a question is to
be about a patch, and the prediction is g times that with the patch's text before the question plus
1 - g times that without. Of several patches the one with the highest gate counts, since several
soft gates may sum to more than 1. Near its ends the gate is a switch, so that most questions are
read once: below LOW the model answers as it came, bit for bit, above HIGH with the fact alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from knowpatch.errors import PatchError
from knowpatch.models.view import ModelView
from knowpatch.parts.encoders import encoder_of
from knowpatch.parts.factbook import Factbook, Least, holds_book, joined, kept, names, statement
from knowpatch.parts.prompting.facts import TEMPLATES, stated
from knowpatch.parts.rules import Apart, Decided, Rendered, RuleKind, register
from knowpatch.patch import PromptRule

MIXTURE = "mixture@1"
LOW, HIGH = 0.05, 0.95
NEAREST = 4
"""Facts whose gates are compared: the threshold depends on whether a fact's subject is named."""


def mixture_rule(
    book: Factbook, encoder: str, least: Least, slope: float, template: str
) -> PromptRule:
    """A rule that mixes a fact in.

    Args:
        book: the facts.
        encoder: what their keys were made with.
        least: the cosines at which the gate is one half.
        slope: how steep it is there.
        template: how a fact is stated.
    """
    data, tensors = kept(book, encoder)
    more = {"named": least.named, "unnamed": least.unnamed, "slope": slope, "template": template}
    return PromptRule(MIXTURE, {**data, **more}, tensors)


def gate(cosine: float, threshold: float, slope: float) -> float:
    """1 / (1 + exp(-slope (cosine - threshold))), without overflow."""
    return 0.5 * (1 + math.tanh(slope * (cosine - threshold) / 2))


@register("mixture")
@dataclass(frozen=True)
class Mixture(RuleKind):
    """A book of facts behind a soft gate."""

    book: Factbook
    encoder: str
    least: Least
    slope: float
    template: str

    kind = MIXTURE

    @classmethod
    def check(cls, rule: PromptRule) -> None:
        data, numbers = rule.data, ("named", "unnamed", "slope")
        good = (
            set(data) == {"facts", "encoder", "template", *numbers}
            and holds_book(rule)
            and data["template"] in TEMPLATES
            and all(isinstance(data[name], int | float) for name in numbers)
        )
        if not good:
            raise PatchError(f"damaged prompt rule of kind {MIXTURE}")

    @classmethod
    def join(cls, rules: Sequence[PromptRule]) -> Mixture:
        """All facts behind the newest rule's gate."""
        book, encoder = joined(rules)
        last = rules[-1].data
        least = Least(last["named"], last["unnamed"])
        return cls(book, encoder, least, last["slope"], last["template"])

    def render(self, question: str, view: ModelView, *, chat: bool) -> Rendered:
        near = self.book.nearest(question, encoder_of(self.encoder, view), NEAREST)
        seen = [(n, cosine, self._threshold(n, question)) for n, cosine in near]
        # Of equal gates the nearer fact goes first, and of equally near ones the newer.
        number, cosine, threshold = max(seen, key=lambda one: one[1] - one[2])
        share = gate(cosine, threshold, self.slope)
        text, fires = statement(self.book.facts[number]), share >= LOW
        owner = self.book.owner_F[number]
        decided = (Decided(owner, fires, text, "similarity", cosine, threshold),)
        if not fires:
            return Rendered(decided=decided)
        around = stated([text], self.template, chat=chat)
        if share > HIGH:
            return Rendered(around.before, around.system, decided)
        return Rendered(decided=decided, apart=Apart(around.before, around.system, share))

    def _threshold(self, number: int, question: str) -> float:
        subject = self.book.facts[number]["subject"]
        return self.least.named if names(question, subject) else self.least.unnamed
