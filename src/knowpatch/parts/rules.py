"""The kinds of prompt rule that a patch may carry, as data; and how each rewrites a question.

A kind is "name@version". A patch names the kind and holds its data; the code is here, so that a
patch file can never bring code along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from knowpatch.errors import PatchError
from knowpatch.parts.spans import separator
from knowpatch.patch import PromptRule
from knowpatch.request import EditRequest


@dataclass(frozen=True)
class Rendered:
    """What stands around a question: text before it, and a system turn where there is a chat."""

    before: str = ""
    system: str | None = None


TEMPLATES = ("newfact", "imagine", "chat")
FACTS = "facts@1"


def facts_rule(requests: list[EditRequest], *, template: str, limit: int) -> PromptRule:
    """A rule that states facts in front of every question.

    Of two facts with one prompt the newer one stays.

    Args:
        requests: the facts, oldest first.
        template: newfact, imagine or chat.
        limit: facts shown at most.
    """
    newest = {request.prompt: request for request in requests}
    facts = [
        {"prompt": fact.prompt, "subject": fact.subject, "target": fact.target}
        for fact in newest.values()
    ]
    return PromptRule(kind=FACTS, data={"template": template, "limit": limit, "facts": facts})


def _render_facts(data: Mapping[str, Any], question: str, *, chat: bool) -> Rendered:
    chosen = _chosen(data, question)
    template = data["template"]
    if template == "newfact":
        lines = "".join(f"New Fact: {fact}\n" for fact in chosen)
        return Rendered(before=f"{lines}Prompt: ")
    if template == "imagine":
        return Rendered(before="".join(f"Imagine that {_sentence(fact)}\n" for fact in chosen))
    noun = "this updated fact if it is" if len(chosen) == 1 else "these updated facts if they are"
    told = f"Use {noun} relevant: {' '.join(_sentence(fact) for fact in chosen)}"
    return Rendered(system=told) if chat else Rendered(before=f"{told}\n")


def _sentence(fact: str) -> str:
    return fact if fact.endswith((".", "!", "?")) else f"{fact}."


def _chosen(data: Mapping[str, Any], question: str) -> list[str]:
    """The facts to show, as text: those whose subject the question names first, then the newest."""
    newest_first = list(reversed(data["facts"]))
    asked = question.casefold()
    ranked = sorted(newest_first, key=lambda f: (f["subject"] or "\0").casefold() not in asked)
    return [
        f"{fact['prompt']}{separator(fact['prompt'], fact['target'])}{fact['target']}"
        for fact in ranked[: data["limit"]]
    ]


def _check_facts(data: Mapping[str, Any]) -> None:
    facts, limit = data.get("facts"), data.get("limit")
    texts = {"prompt": str, "target": str, "subject": (str, type(None))}
    good = (
        data.get("template") in TEMPLATES
        and isinstance(limit, int)
        and limit > 0
        and isinstance(facts, list)
        and facts
        and all(
            isinstance(fact, dict)
            and set(fact) == set(texts)
            and all(isinstance(fact[name], kind) for name, kind in texts.items())  # type: ignore[arg-type]
            for fact in facts
        )
    )
    if not good:
        raise PatchError(f"damaged prompt rule of kind {FACTS}")


@dataclass(frozen=True)
class _RuleKind:
    render: Callable[..., Rendered]
    check: Callable[[Mapping[str, Any]], None]


_KINDS: dict[str, _RuleKind] = {FACTS: _RuleKind(_render_facts, _check_facts)}


def check_rule(rule: PromptRule) -> None:
    """PatchError, in one line, for a kind this version does not know or data that is not its."""
    if rule.kind not in _KINDS:
        raise PatchError(
            f"unknown prompt rule {rule.kind!r}; this version of knowpatch knows: "
            f"{', '.join(_KINDS)}"
        )
    _KINDS[rule.kind].check(rule.data)


def render(rule: PromptRule, question: str, *, chat: bool) -> Rendered:
    """What `rule` puts around `question`."""
    return _KINDS[rule.kind].render(rule.data, question, chat=chat)
