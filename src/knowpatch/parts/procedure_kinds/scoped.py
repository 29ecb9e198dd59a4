"""A question taken apart by the model, each sub-question tested for whether a fact answers it.

PokeMQA (arXiv 2312.15194): the model only takes apart and answers; a scope test says which
sub-questions a fact answers, and then the fact stands as the answer. A line names the question's
entity, so that the first sub-question asks about it. Here the test is the calibrated gate, among
the nearest few facts; the published one is a trained detector in two stages, which this is not yet.
Not as published either: on a hit the fact's own target is the intermediate answer, and a question
that the model does not take apart at all is tested as it stands.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass

from knowpatch.errors import PatchError
from knowpatch.models.view import ModelView
from knowpatch.parts.factbook import Factbook, Least, names, parted, statement
from knowpatch.parts.procedures import ProcedureKind, Running, Say, register
from knowpatch.parts.prompting.facts import sentence
from knowpatch.parts.worked import Found, Lookup, Notes, bare, fitted, labelled
from knowpatch.patch import Procedure

SCOPED = "scoped@1"
CANDIDATES = 5
"""Facts that the test looks at."""
TOKENS = 40
"""Of one reply: a sub-question, or its answer."""
ASKED = ("Generated answer:", "\n\n", "\nQuestion:")
ANSWERED = ("Subquestion:", "Final answer:", "\n\n", "\nQuestion:")


def scoped(book: Factbook, encoder: str, least: Least, hops: int) -> Procedure:
    """The procedure as data: facts, what read them, the gate, and sub-questions at most."""
    data, tensors = Lookup.data(book, encoder, least)
    return Procedure(SCOPED, {**data, "hops": hops}, tensors)


@register("scoped")
@dataclass(frozen=True)
class Scoped(ProcedureKind):
    """A book, and the loop."""

    lookup: Lookup
    hops: int

    kind = SCOPED

    @property
    def calls(self) -> int:  # type: ignore[override]
        return 2 * self.hops + 1

    @property
    def tokens(self) -> int:  # type: ignore[override]
        return self.calls * TOKENS

    @classmethod
    def check(cls, procedure: Procedure) -> None:
        if not Lookup.whole(procedure):
            raise PatchError(f"damaged procedure of kind {SCOPED}")

    @classmethod
    def join(cls, procedures: Sequence[Procedure]) -> Scoped:
        """All facts by the newest one's settings."""
        return cls(Lookup.of(procedures), procedures[-1].data["hops"])

    @classmethod
    def without(cls, procedure: Procedure, prompts: Collection[str]) -> Procedure:
        return Procedure(procedure.kind, *parted(procedure, prompts))

    def answer(self, question: str, view: ModelView) -> Running:
        text, notes = self._opening(question), Notes()
        for number in range(self.hops + 1):
            prompt = fitted("scoped", text, view, TOKENS)
            if prompt is None:
                return notes.failed("the text has outgrown the model's context")
            lines = (yield Say(prompt, TOKENS, ASKED)).strip().splitlines()
            final, asked = _read(lines)
            if final:
                return notes.answered(final)
            if asked is None:
                if number == 0 and (found := self._hit(question, view)):
                    return notes.answered(self._taken(found, notes))
                return notes.failed("the model wrote neither a sub-question nor a final answer")
            notes.add("asked", asked)
            text += f"Subquestion: {asked}\n" + (
                yield from self._answered(text, asked, view, notes)
            )
        return notes.failed(f"no final answer within {self.hops} sub-questions")

    def _answered(
        self, text: str, asked: str, view: ModelView, notes: Notes
    ) -> Generator[Say, str, str]:
        """How the text goes on: a fact as the answer, or what the model says by itself."""
        if found := self._hit(asked, view):
            told = sentence(statement(found.fact))
            return f"Generated answer: {told}\nIntermediate answer: {self._taken(found, notes)}\n"
        prompt = fitted("scoped", f"{text}Generated answer:", view, TOKENS)
        if prompt is None:  # the loop finds so too, and ends
            return ""
        said = yield Say(prompt, TOKENS, ANSWERED)
        short = _intermediate(said)
        notes.add("model", short)
        notes.chain.append(short)
        return f"Generated answer: {bare(said)}.\nIntermediate answer: {short}\n"

    def _hit(self, asked: str, view: ModelView) -> Found | None:
        """The nearest fact that the test takes the question to be about."""
        found = self.lookup.found(asked, view, CANDIDATES)
        return next((one for one in found if one.near), None)

    @staticmethod
    def _taken(found: Found, notes: Notes) -> str:
        target = str(found.fact["target"])
        notes.add("found", found.told, found.owner)
        notes.add("edit", target, found.owner)
        notes.chain.append(target)
        return target

    def _opening(self, question: str) -> str:
        """The question, with a line for the longest name in it that the facts know."""
        facts = self.lookup.book.facts
        for part in ("subject", "target"):
            known = [fact[part] for fact in facts if names(question, fact[part])]
            if known:
                return f"Question: {question}\nEntity of Question: {max(known, key=len)}\n"
        return f"Question: {question}\n"


def _read(lines: Sequence[str]) -> tuple[str | None, str | None]:
    """A final answer or a sub-question, whichever comes first."""
    for line in lines:
        if (final := labelled(line, "Final answer")) is not None:
            return bare(final), None
        if asked := labelled(line, "Subquestion"):
            return None, asked
    return None, None


def _intermediate(said: str) -> str:
    """The short answer that the model names, else what it said."""
    found = (labelled(line, "Intermediate answer") for line in said.splitlines())
    return next((bare(text) for text in found if text), bare(said))
