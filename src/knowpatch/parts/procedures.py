"""Procedures: how a patch answers a question by asking the model several times, as data.

A patch names the kind of its procedure ("name@version") and holds its data; the code is in the
library (one file of parts/procedure_kinds) or in a package that registers it. A
procedure is a generator: it yields what the model is to continue and is sent what the model said,
so that the planner runs many of them side by side and asks their questions together. It is bounded
in calls and in tokens. There is no probability of a forced answer behind it: such scores are
unscored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from knowpatch.errors import PatchError, not_apart
from knowpatch.patch import Patch, Procedure
from knowpatch.registry import Registry

if TYPE_CHECKING:
    from knowpatch.models.view import ModelView


@dataclass(frozen=True)
class Say:
    """What the model is to continue, greedily.

    Attributes:
        prompt: the text; tokens: at most.
        stop: texts that end it; neither they nor what follows is part of the answer.
    """

    prompt: str
    tokens: int
    stop: tuple[str, ...] = ()

    def cut(self, text: str) -> str:
        """The text up to the first stop."""
        ends = [at for word in self.stop if (at := text.find(word)) >= 0]
        return text[: min(ends)] if ends else text


@dataclass(frozen=True)
class Step:
    """One step of a procedure, for people.

    Attributes:
        kind: what it is: asked, found, edit, model, answer, or failed.
        text: in words.
        patch: number of the joined procedure whose fact it used; None for none.
    """

    kind: str
    text: str
    patch: int | None = None


@dataclass(frozen=True)
class Answered:
    """What a procedure came to: an answer (None where it came to none), and how.

    Attributes:
        chain: the answers of the single hops, where there are any.
    """

    text: str | None
    steps: tuple[Step, ...] = ()
    chain: tuple[str, ...] = ()


Running = Generator[Say, str, Answered]
"""Yields what is to be said, is sent what was."""


class ProcedureKind(ABC):
    """Procedures of one kind, as one.

    Class attributes:
        kind: "name@version"; the file's stem is the name.

    Attributes:
        calls, tokens: of one question, at most.
    """

    kind: ClassVar[str]
    calls: int
    tokens: int

    @classmethod
    @abstractmethod
    def check(cls, procedure: Procedure) -> None:
        """PatchError if the procedure is not whole."""

    @classmethod
    @abstractmethod
    def join(cls, procedures: Sequence[Procedure]) -> Self:
        """Procedures of this kind, in patch order, as one."""

    @classmethod
    def without(cls, procedure: Procedure, prompts: Collection[str]) -> Procedure:
        """The procedure without the facts of these prompts; the rest stays, bit for bit.

        Raises:
            PatchError: its facts cannot be taken out one by one.
        """
        raise not_apart(cls.kind)

    @abstractmethod
    def answer(self, question: str, view: ModelView) -> Running:
        """Answer a question."""


PROCEDURES: Registry[type[ProcedureKind]] = Registry(
    "procedure",
    package="knowpatch.parts.procedure_kinds",
    group="knowpatch.procedures",
    variable="KNOWPATCH_PROCEDURES",
)
register = PROCEDURES.register
"""Decorator that enters a kind under its file's stem."""


def kind_of(procedure: Procedure) -> type[ProcedureKind]:
    """The kind of a procedure; PatchError, in one line, for one that is not known."""
    return PROCEDURES.versioned(procedure.kind)


def check_procedure(procedure: Procedure) -> None:
    """PatchError, in one line, for a kind this version does not know or data that is not its."""
    kind_of(procedure).check(procedure)


@dataclass(frozen=True, eq=False)
class InForce:
    """The procedure that answers, and the patches that it is of."""

    kind: ProcedureKind
    patches: tuple[Patch, ...]

    @classmethod
    def of(cls, patches: Sequence[Patch]) -> InForce | None:
        """Of patches in their order; None where none has a procedure.

        Raises:
            PatchError: procedures of several kinds, of which only one can answer.
        """
        mine = tuple(patch for patch in patches if patch.procedure is not None)
        found = [patch.procedure for patch in mine if patch.procedure is not None]
        if not found:
            return None
        if len({procedure.kind for procedure in found}) > 1:
            kinds = ", ".join(sorted({procedure.kind for procedure in found}))
            raise PatchError(
                f"patches with procedures of different kinds cannot answer together ({kinds}): "
                "take one of them back"
            )
        return cls(kind_of(found[0]).join(found), mine)


@dataclass
class Asking:
    """A procedure that is answering one question.

    Attributes:
        say: what is to be said next; None when there is an answer.
        answered: the answer.
    """

    kind: ProcedureKind
    running: Running
    say: Say | None = None
    answered: Answered | None = None
    calls: int = 0
    tokens: int = 0

    @classmethod
    def begin(cls, kind: ProcedureKind, question: str, view: ModelView) -> Asking:
        asking = cls(kind, kind.answer(question, view))
        asking._next(None)
        return asking

    def hear(self, said: str) -> None:
        """Go on with what the model said."""
        assert self.say is not None
        self._next(self.say.cut(said))

    def _next(self, said: str | None) -> None:
        try:
            self.say = next(self.running) if said is None else self.running.send(said)
        except StopIteration as done:
            self.say, self.answered = None, done.value
            return
        self.calls, self.tokens = self.calls + 1, self.tokens + self.say.tokens
        if self.calls > self.kind.calls or self.tokens > self.kind.tokens:
            self.running.close()
            limit = f"{self.kind.calls} calls or {self.kind.tokens} tokens"
            self.say = None
            self.answered = Answered(None, (Step("failed", f"no answer within {limit}"),))
