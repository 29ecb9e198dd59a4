"""Facts stated before every question, whatever it asks (ICE, arXiv 2307.12976)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from knowpatch.errors import PatchError
from knowpatch.models.view import ModelView
from knowpatch.parts.factbook import Fact, are_facts, fact_of, newest, statement
from knowpatch.parts.rules import Decided, Rendered, RuleKind, register
from knowpatch.patch import PromptRule
from knowpatch.request import EditRequest

BARE = "bare"
TEMPLATES = ("newfact", "imagine", "chat", BARE)
FACTS = "facts@1"


def facts_rule(requests: Sequence[EditRequest], *, template: str, limit: int) -> PromptRule:
    """A rule that states facts in front of every question.

    Of two facts with one prompt the newer one stays.

    Args:
        requests: the facts, oldest first.
        template: newfact, imagine, chat or bare.
        limit: facts shown at most.
    """
    facts = [fact_of(request) for request in newest(requests)]
    return PromptRule(kind=FACTS, data={"template": template, "limit": limit, "facts": facts})


def sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def stated(facts: Sequence[str], template: str, *, chat: bool) -> Rendered:
    """Facts around a question, by one of the TEMPLATES."""
    if template == "newfact":
        lines = "".join(f"New Fact: {fact}\n" for fact in facts)
        return Rendered(before=f"{lines}Prompt: ")
    if template == "imagine":
        return Rendered(before="".join(f"Imagine that {sentence(fact)}\n" for fact in facts))
    if template == BARE:
        told = "\n".join(map(sentence, facts))
        return Rendered(system=told) if chat else Rendered(before=f"{told}\n")
    noun = "this updated fact if it is" if len(facts) == 1 else "these updated facts if they are"
    told = f"Use {noun} relevant: {' '.join(sentence(fact) for fact in facts)}"
    return Rendered(system=told) if chat else Rendered(before=f"{told}\n")


@register("facts")
@dataclass(frozen=True)
class Facts(RuleKind):
    """Facts, oldest first, with the number of the rule that each is of."""

    facts: tuple[tuple[int, Fact], ...]
    template: str
    limit: int

    kind = FACTS

    @classmethod
    def check(cls, rule: PromptRule) -> None:
        data, limit = rule.data, rule.data.get("limit")
        good = (
            not rule.tensors
            and data.get("template") in TEMPLATES
            and isinstance(limit, int)
            and limit > 0
            and are_facts(data.get("facts"))
        )
        if not good:
            raise PatchError(f"damaged prompt rule of kind {FACTS}")

    @classmethod
    def join(cls, rules: Sequence[PromptRule]) -> Facts:
        """All facts by the newest rule's template; of one prompt the newest."""
        found = {f["prompt"]: (n, f) for n, rule in enumerate(rules) for f in rule.data["facts"]}
        last = rules[-1].data
        return cls(tuple(found.values()), last["template"], last["limit"])

    @classmethod
    def without(cls, rule: PromptRule, prompts: Collection[str]) -> PromptRule:
        left = [fact for fact in rule.data["facts"] if fact["prompt"] not in prompts]
        return PromptRule(rule.kind, {**rule.data, "facts": left}, rule.tensors)

    def render(self, question: str, view: ModelView, *, chat: bool) -> Rendered:
        """Those whose subject the question names first, then the newest."""
        newest_first, asked = self.facts[::-1], question.casefold()
        ranked = sorted(
            newest_first, key=lambda one: (one[1]["subject"] or "\0").casefold() not in asked
        )
        chosen = [(owner, statement(fact)) for owner, fact in ranked[: self.limit]]
        around = stated([text for _, text in chosen], self.template, chat=chat)
        decided = tuple(Decided(owner, fired=True, what=text) for owner, text in chosen)
        return Rendered(around.before, around.system, decided)
