"""Worked examples before a question, facts for its parts, and notes of what was done.

What procedures share that let a model take questions apart.

The examples ship with the library, in its own words; where a model's context is short, those
furthest from the question are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from knowpatch.models.view import ModelView
from knowpatch.parts.encoders import encoder_of
from knowpatch.parts.factbook import Fact, Factbook, Least, holds_book, joined, kept, statement
from knowpatch.parts.procedures import Answered, Step
from knowpatch.patch import Procedure


@cache
def examples(name: str) -> tuple[str, ...]:
    """The worked examples of the asset `name`."""
    file = resources.files("knowpatch").joinpath("assets", f"{name}.txt")
    return tuple(file.read_text(encoding="utf-8").strip().split("\n\n"))


def fitted(name: str, rest: str, view: ModelView, tokens: int) -> str | None:
    """`rest` behind as many examples as leave room for it and for `tokens` more.

    None where the model's context has no room even without any.
    """
    shown, room = examples(name), view.limits.positions
    while True:
        text = "\n\n".join((*shown, rest))
        if room is None or len(view.encode(text).ids) + tokens <= room:
            return text
        if not shown:
            return None
        shown = shown[1:]


def labelled(line: str, label: str) -> str | None:
    """What stands behind "label:" in a line that begins with it; None for other lines."""
    head, colon, rest = line.strip().partition(":")
    return rest.strip() if colon and head.strip().casefold() == label.casefold() else None


def bare(text: str) -> str:
    """A short answer: the first line without blanks and the stop at its end."""
    return text.strip().partition("\n")[0].strip().rstrip(".").strip()


@dataclass
class Notes:
    """What a procedure did so far."""

    steps: list[Step] = field(default_factory=list)
    chain: list[str] = field(default_factory=list)

    def add(self, kind: str, text: str, patch: int | None = None) -> None:
        self.steps.append(Step(kind, text, patch))

    def answered(self, text: str) -> Answered:
        """The end: an answer."""
        self.add("answer", text)
        return Answered(text, tuple(self.steps), tuple(self.chain))

    def failed(self, why: str) -> Answered:
        """The end: no answer, which is told apart from a wrong one."""
        self.add("failed", why)
        return Answered(None, tuple(self.steps), tuple(self.chain))


@dataclass(frozen=True)
class Found:
    """A fact that was found for a question.

    Attributes:
        owner: which of the joined patches it is of.
        near: whether the gate takes the question to be about it; told: how near, for people.
    """

    fact: Fact
    owner: int
    near: bool
    told: str


@dataclass(frozen=True)
class Lookup:
    """A book behind a gate, to be asked sub-questions.

    Attributes:
        encoder: the name of what its keys were made with.
    """

    book: Factbook
    encoder: str
    least: Least

    @staticmethod
    def data(book: Factbook, encoder: str, least: Least) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a procedure keeps of it: data and tensors."""
        data, tensors = kept(book, encoder)
        return {**data, **vars(least)}, tensors

    @staticmethod
    def whole(procedure: Procedure, *more: str) -> bool:
        """Whether a procedure has just that data, a number of hops, and `more`."""
        data = procedure.data
        return (
            set(data) == {"facts", "encoder", "named", "unnamed", "hops", *more}
            and holds_book(procedure)
            and all(isinstance(data[name], int | float) for name in ("named", "unnamed"))
            and type(data["hops"]) is int
            and data["hops"] > 0
        )

    @classmethod
    def of(cls, procedures: Sequence[Procedure]) -> Lookup:
        """All facts behind the newest procedure's gate."""
        book, encoder = joined(procedures)
        last = procedures[-1].data
        return cls(book, encoder, Least(last["named"], last["unnamed"]))

    def found(self, question: str, view: ModelView, count: int = 1) -> list[Found]:
        """The `count` nearest facts, nearest first; none of an empty book."""
        if not self.book.facts:
            return []
        nearest = self.book.nearest(question, encoder_of(self.encoder, view), count)
        return [self._found(question, number, cosine) for number, cosine in nearest]

    def _found(self, question: str, number: int, cosine: float) -> Found:
        fact = self.book.facts[number]
        least = self.least.of(fact, question)
        told = f"{statement(fact)} (similarity {cosine:.3g}, threshold {least:.3g})"
        return Found(fact, self.book.owner_F[number], cosine >= least, told)
