"""Conflicts: edits that say something of what another edit speaks of already, told by their words.

Two facts speak of the same if their prompts have the same words, in any order and without those
that every question has; or if they are about the same subject, and what is left of their prompts
without it differs in at most a quarter of its letters; unless one asks where and the other when.
They need not contradict each other: the
second would be made on top of the first, and one of the two is not needed. Facts on different days
do not meet. What edits do to each other inside the model is `ledger/collisions.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from knowpatch.ledger.history import Edit
from knowpatch.parts.words import distance, stripped

ALIKE = 0.25
"""Letters, as a share of the longer text, that two wordings of one question differ in at most."""
ASKS = {"who": "who", "whom": "who", "whose": "who"}
ASKS |= {word: word for word in ("when", "where", "why", "how")}
"""Words that every question has, and that tell two questions apart all the same."""
Fact = Mapping[str, Any]
Period = tuple[str | None, str | None]


@dataclass(frozen=True)
class Conflict:
    """A new fact and the live edit that it meets.

    Attributes:
        edit: the live one.
        prompt: of the new fact.
        why: in words.
    """

    edit: Edit
    prompt: str
    why: str

    def __str__(self) -> str:
        return f"{self.prompt!r} {self.why} edit {self.edit.short} ({self.edit.says})"


def conflicts(
    facts: Iterable[Fact], live: Sequence[Edit], *, chat: bool, period: Period
) -> list[Conflict]:
    """The live edits that new facts meet; each edit once.

    Args:
        facts: requests as plain data.
        live: the edits to compare with.
        chat: whether the new facts are edited through the chat template. The same fact the other
            way is none that they meet.
        period: first and last day of the new facts; None for no limit.
    """
    by_words: dict[frozenset[str], list[tuple[Edit, Fact]]] = {}
    by_subject: dict[str, list[tuple[Edit, Fact]]] = {}
    for edit in live:
        if not _meet(period, (edit.first_day, edit.last_day)):
            continue
        for fact in edit.requests:
            by_words.setdefault(_words(fact["prompt"]), []).append((edit, fact))
            if subject := _subject(fact):
                by_subject.setdefault(subject, []).append((edit, fact))
    found: dict[str, Conflict] = {}
    for new in facts:
        near = [("has the words of", *item) for item in by_words.get(_words(new["prompt"]), ())]
        about = by_subject.get(_subject(new), ())
        near += [("asks the same as", edit, fact) for edit, fact in about if _alike(new, fact)]
        for why, edit, fact in near:
            if _same_question(new, fact) and not _other_way(new, fact, chat, edit):
                found.setdefault(edit.id, Conflict(edit, new["prompt"], why))
    return list(found.values())


def _meet(one: Period, other: Period) -> bool:
    """Whether there is a day in both periods."""
    start = max(one[0] or "", other[0] or "")
    return all(end is None or start <= end for end in (one[1], other[1]))


def _words(prompt: str) -> frozenset[str]:
    return frozenset(stripped(re.sub("['’]s\\b", " ", prompt)).split())


def _subject(fact: Fact) -> str:
    return (fact.get("subject") or "").casefold().removeprefix("the ").strip()


def _alike(new: Fact, old: Fact) -> bool:
    """Whether two prompts about one subject ask the same, but for a few letters."""
    one, other = (stripped(_without_subject(fact)) for fact in (new, old))
    return distance(one, other) <= ALIKE * max(len(one), len(other))


def _without_subject(fact: Fact) -> str:
    return re.sub("['’]s\\b", " ", fact["prompt"].replace(fact["subject"], " "))


def _same_question(new: Fact, old: Fact) -> bool:
    """Whether two prompts may ask the same: not where and when."""
    one, other = (_asks(fact["prompt"]) for fact in (new, old))
    return not one or not other or bool(one & other)


def _asks(prompt: str) -> set[str]:
    return {ASKS[word] for word in re.findall(r"\w+", prompt.casefold()) if word in ASKS}


def _other_way(new: Fact, old: Fact, chat: bool, edit: Edit) -> bool:
    """Whether the same fact is edited in a chat and as a text, which is one fact, twice of use."""
    other = bool(edit.recorded["config"].get("chat", False))
    return chat != other and new["target"].strip() == old["target"].strip()
