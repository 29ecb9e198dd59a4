"""A question taken apart by the model, each sub-answer held against the nearest fact.

MeLLo (arXiv 2305.14795): the model writes a sub-question and its own answer, the nearest fact of
the memory is pasted in, and what the fact says takes the answer's place where the two contradict;
until a final answer is written. Whether they do is said by the model, as published, or by the gate
(`verdict`), since small models cannot tell: then the fact counts where the sub-question is near
enough to it, and a question that the model does not take apart at all is looked up as it stands.
Not as published: the similarity is a cosine, facts have an order, and all is greedy.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from knowpatch.errors import PatchError
from knowpatch.models.view import ModelView
from knowpatch.parts.factbook import Factbook, Least, parted, statement
from knowpatch.parts.procedures import Answered, ProcedureKind, Running, Say, register
from knowpatch.parts.prompting.facts import sentence
from knowpatch.parts.worked import Found, Lookup, Notes, bare, fitted, labelled
from knowpatch.patch import Procedure

SELFCHECK = "selfcheck@1"
VERDICTS = ("model", "gate")
TOKENS = {"model": 72, "gate": 44}
"""Of one reply: a sub-question and its answer, behind a verdict where the model gives it."""
STOPS = ("Retrieved fact:", "\n\n", "\nQuestion:")
INTERMEDIATE = "the intermediate answer is:"
CONTRADICTS = "Retrieved fact contradicts the generated answer, so " + INTERMEDIATE
AGREES = "Retrieved fact does not contradict the generated answer, so " + INTERMEDIATE


def selfcheck(book: Factbook, encoder: str, least: Least, verdict: str, hops: int) -> Procedure:
    """The procedure as data.

    Args:
        book: the facts.
        encoder: what their keys were made with.
        least: the gate.
        verdict: who says whether a fact contradicts: model or gate.
        hops: sub-questions at most.
    """
    data, tensors = Lookup.data(book, encoder, least)
    return Procedure(SELFCHECK, {**data, "verdict": verdict, "hops": hops}, tensors)


@dataclass(frozen=True)
class Reply:
    """What the model wrote, up to the first thing that the loop has to do something about.

    Attributes:
        text: to go on from.
        verdict: the intermediate answer that it begins with, if it does.
        final, asked, said: the final answer; else a sub-question and the model's answer to it.
    """

    text: str
    verdict: str | None = None
    final: str | None = None
    asked: str | None = None
    said: str = ""

    @classmethod
    def read(cls, text: str) -> Reply:
        """What goes on behind a sub-question and its answer, no fact retrieved, is left out."""
        kept: list[str] = []
        verdict = asked = None
        for line in text.strip().splitlines():
            kept.append(line)
            if (final := labelled(line, "Final answer")) is not None:
                return cls("\n".join(kept), verdict, final=bare(final))
            if asked is None:
                asked = labelled(line, "Subquestion")
                if asked is None and INTERMEDIATE in line:
                    verdict = bare(line.partition(INTERMEDIATE)[2])
            elif (said := labelled(line, "Generated answer")) is not None:
                return cls("\n".join(kept) + "\n", verdict, asked=asked, said=bare(said))
        return cls("\n".join(kept) + "\n", verdict, asked=asked)


@register("selfcheck")
@dataclass(frozen=True)
class SelfCheck(ProcedureKind):
    """A book, and the loop."""

    lookup: Lookup
    verdict: str
    hops: int

    kind = SELFCHECK

    @property
    def calls(self) -> int:  # type: ignore[override]
        return self.hops + 1

    @property
    def tokens(self) -> int:  # type: ignore[override]
        return self.calls * TOKENS[self.verdict]

    @classmethod
    def check(cls, procedure: Procedure) -> None:
        verdict = procedure.data.get("verdict")
        if not (Lookup.whole(procedure, "verdict") and verdict in VERDICTS):
            raise PatchError(f"damaged procedure of kind {SELFCHECK}")

    @classmethod
    def join(cls, procedures: Sequence[Procedure]) -> SelfCheck:
        """All facts by the newest one's settings."""
        last = procedures[-1].data
        return cls(Lookup.of(procedures), last["verdict"], last["hops"])

    @classmethod
    def without(cls, procedure: Procedure, prompts: Collection[str]) -> Procedure:
        return Procedure(procedure.kind, *parted(procedure, prompts))

    def answer(self, question: str, view: ModelView) -> Running:
        text, notes, tokens = f"Question: {question}\n", Notes(), TOKENS[self.verdict]
        for number in range(self.calls):
            prompt = fitted("checked", text, view, tokens)
            if prompt is None:
                return notes.failed("the text has outgrown the model's context")
            reply = Reply.read((yield Say(prompt, tokens, STOPS)))
            self._heard(reply, notes)
            if reply.final:
                return notes.answered(reply.final)
            if not reply.asked:
                return self._unasked(question, view, notes, first=number == 0)
            notes.add("asked", reply.asked)
            notes.add("model", reply.said)
            text += reply.text + self._checked(reply, view, notes)
        return notes.failed(f"no final answer within {self.hops} sub-questions")

    def _heard(self, reply: Reply, notes: Notes) -> None:
        """The model's own verdict, where it gives them."""
        if self.verdict == "model" and reply.verdict:
            notes.chain.append(reply.verdict)

    def _unasked(self, question: str, view: ModelView, notes: Notes, *, first: bool) -> Answered:
        """Neither a sub-question nor an answer: the gate may know a fact about all of it."""
        if first and self.verdict == "gate":
            for found in self.lookup.found(question, view):
                if found.near:
                    notes.add("found", found.told, found.owner)
                    notes.chain.append(found.fact["target"])
                    return notes.answered(found.fact["target"])
        return notes.failed("the model wrote neither a sub-question nor a final answer")

    def _checked(self, reply: Reply, view: ModelView, notes: Notes) -> str:
        """The nearest fact, and by the gate the verdict, as the text goes on."""
        assert reply.asked is not None
        found = self.lookup.found(reply.asked, view)
        for one in found:
            notes.add("found", one.told, one.owner)
        told = sentence(statement(found[0].fact)) if found else "none."
        line = f"Retrieved fact: {told}\n"
        return line if self.verdict == "model" else line + self._gate(reply.said, found, notes)

    def _gate(self, said: str, found: Sequence[Found], notes: Notes) -> str:
        """The verdict: what the fact says, where the sub-question is about it."""
        if not (found and found[0].near):
            notes.chain.append(said)
            return f"{AGREES} {said}\n"
        target = found[0].fact["target"]
        notes.add("edit", target, found[0].owner)
        notes.chain.append(target)
        return f"{AGREES if said == target else CONTRADICTS} {target}\n"
