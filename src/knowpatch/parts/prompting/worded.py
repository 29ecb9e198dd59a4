"""A fact that is put before the question whose words are most like its own (MemPrompt, 2201.06009).

The stored questions are compared by their letters, without the words that all have; the nearest is
shown if its distance is small against the longer of the two; else the question stays as it came.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from knowpatch.errors import PatchError
from knowpatch.models.view import ModelView
from knowpatch.parts.editdistance import letters, shares
from knowpatch.parts.factbook import Fact, are_facts, fact_of, newest, statement
from knowpatch.parts.prompting.facts import TEMPLATES, stated
from knowpatch.parts.rules import Decided, Rendered, RuleKind, register
from knowpatch.parts.words import stripped
from knowpatch.patch import PromptRule
from knowpatch.request import EditRequest

WORDED = "worded@1"


def worded_rule(requests: Sequence[EditRequest], *, template: str, distance: float) -> PromptRule:
    """A rule that states the fact whose question, or a rephrase of it, is nearest.

    Args:
        requests: the facts, oldest first; of two with one prompt the newer one stays.
        template: how it is stated.
        distance: at most, as a share of the longer of the two questions.
    """
    kept = newest(requests)
    facts = [fact_of(request) for request in kept]
    asked = [[request.prompt, *request.rephrases] for request in kept]
    data = {"template": template, "distance": distance, "facts": facts, "questions": asked}
    return PromptRule(kind=WORDED, data=data)


@register("worded")
@dataclass(frozen=True, eq=False)
class Worded(RuleKind):
    """Facts, oldest first, with the number of the rule that each is of.

    Attributes:
        fact_N: which fact each stored question is of; letters_NL, lengths_N: its letters.
    """

    facts: tuple[tuple[int, Fact], ...]
    fact_N: tuple[int, ...]
    letters_NL: Tensor
    lengths_N: Tensor
    template: str
    distance: float

    kind = WORDED

    @classmethod
    def check(cls, rule: PromptRule) -> None:
        data, fields = rule.data, {"template", "distance", "facts", "questions"}
        good = (
            not rule.tensors
            and set(data) == fields
            and data["template"] in TEMPLATES
            and isinstance(data["distance"], int | float)
            and are_facts(data["facts"])
            and _are_questions(data["questions"], len(data["facts"]))
        )
        if not good:
            raise PatchError(f"damaged prompt rule of kind {WORDED}")

    @classmethod
    def join(cls, rules: Sequence[PromptRule]) -> Worded:
        """All facts by the newest rule's distance; of one prompt the newest."""
        found: dict[str, tuple[int, Fact, list[str]]] = {}
        for number, rule in enumerate(rules):
            for fact, asked in _pairs(rule.data):
                found[fact["prompt"]] = number, fact, asked
        owners = [n for n, (_, _, asked) in enumerate(found.values()) for _ in asked]
        texts = [stripped(text) for _, _, asked in found.values() for text in asked]
        facts = tuple((number, fact) for number, fact, _ in found.values())
        last = rules[-1].data
        return cls(facts, tuple(owners), *letters(texts), last["template"], last["distance"])

    @classmethod
    def without(cls, rule: PromptRule, prompts: Collection[str]) -> PromptRule:
        left = [(fact, asked) for fact, asked in _pairs(rule.data) if fact["prompt"] not in prompts]
        parts = {"facts": [fact for fact, _ in left], "questions": [asked for _, asked in left]}
        return PromptRule(rule.kind, {**rule.data, **parts})

    def render(self, question: str, view: ModelView, *, chat: bool) -> Rendered:
        found = shares(stripped(question), self.letters_NL, self.lengths_N)
        # Of equally near ones the newer.
        best = max(range(len(found)), key=lambda n: (-float(found[n]), n))
        owner, fact = self.facts[self.fact_N[best]]
        score, told = float(found[best]), statement(fact)
        fires = score <= self.distance
        decided = Decided(owner, fires, told, "distance of words", score, self.distance)
        around = stated([told], self.template, chat=chat) if fires else Rendered()
        return Rendered(around.before, around.system, (decided,))


def _pairs(data: Mapping[str, Any]) -> list[tuple[Fact, list[str]]]:
    return list(zip(data["facts"], data["questions"], strict=True))


def _are_questions(value: Any, count: int) -> bool:
    """Whether a value from a file is a list of texts for each fact, one at least."""
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(some, list) and some for some in value)
        and all(isinstance(text, str) for some in value for text in some)
    )
