"""Prompt rules: what a patch does to a question before the model sees it, as data.

A patch names the kind of its rule ("name@version") and holds its data; the code is in the library
(one file of parts/prompting) or in a package that registers it, so a patch file never brings code.
Rules of one kind that are in force together are one: a thousand patches with a fact each are a
memory of a thousand facts. A rule that finds nothing to say leaves the question as it is, token for
token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, Self

from knowpatch.errors import not_apart
from knowpatch.models.passes import Second
from knowpatch.models.sites import Firing, listeners
from knowpatch.parts.spans import Encoded
from knowpatch.patch import Patch, PromptRule
from knowpatch.registry import Registry

if TYPE_CHECKING:
    from knowpatch.models.view import ModelView

KEPT = 64
"""Joined rules that a model keeps at most."""


@dataclass(frozen=True)
class Decided:
    """What a rule decided of one of its entries.

    Attributes:
        owner: number of the joined rule that the entry is of.
        fired: whether it is put before the question.
        measure, score, threshold: how that was decided; None where it always is.
        what: the entry in words.
    """

    owner: int
    fired: bool
    what: str
    measure: str = "words"
    score: float | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Apart:
    """What stands around a second reading of a question, and its share of the prediction."""

    before: str
    system: str | None
    share: float


@dataclass(frozen=True)
class Rendered:
    """What stands around a question: text before it, and a system turn where there is a chat."""

    before: str = ""
    system: str | None = None
    decided: tuple[Decided, ...] = ()
    apart: Apart | None = None


class RuleKind(ABC):
    """Rules of one kind, as one.

    Class attributes:
        kind: "name@version"; the file's stem is the name.
    """

    kind: ClassVar[str]

    @classmethod
    @abstractmethod
    def check(cls, rule: PromptRule) -> None:
        """PatchError if the rule is not whole."""

    @classmethod
    @abstractmethod
    def join(cls, rules: Sequence[PromptRule]) -> Self:
        """Rules of this kind, in patch order, as one."""

    @classmethod
    def without(cls, rule: PromptRule, prompts: Collection[str]) -> PromptRule:
        """The rule without the facts of these prompts; what is left stays as it was, bit for bit.

        Raises:
            PatchError: its facts cannot be taken out one by one.
        """
        raise not_apart(cls.kind)

    @abstractmethod
    def render(self, question: str, view: ModelView, *, chat: bool) -> Rendered:
        """What stands around `question`."""


RULES: Registry[type[RuleKind]] = Registry(
    "prompt rule",
    package="knowpatch.parts.prompting",
    group="knowpatch.rules",
    variable="KNOWPATCH_RULES",
)
register = RULES.register
"""Decorator that enters a kind under its file's stem."""


def kind_of(rule: PromptRule) -> type[RuleKind]:
    """The kind of a rule; PatchError, in one line, for one that is not known."""
    return RULES.versioned(rule.kind)


def check_rule(rule: PromptRule) -> None:
    """PatchError, in one line, for a kind this version does not know or data that is not its."""
    kind_of(rule).check(rule)


def rendered(patches: Sequence[Patch], question: str, view: ModelView, *, chat: bool) -> Rendered:
    """What all rules of `patches` put around a question; the first system turn stays.

    Of second readings the one with the largest share stays; the other rules act on it as well.
    """
    before, system, apart = "", None, None
    for kind, run in groupby(
        (patch for patch in patches if patch.rule is not None), key=lambda p: p.rule and p.rule.kind
    ):
        some = tuple(run)
        around = _joined(some, view).render(question, view, chat=chat)
        before += around.before
        system = around.system if system is None else system
        if around.apart and (apart is None or around.apart.share > apart.share):
            apart = around.apart
        for heard in listeners():
            heard += [_firing(one, some[one.owner], str(kind)) for one in around.decided]
    if apart is not None:
        apart = Apart(before + apart.before, system or apart.system, apart.share)
    return Rendered(before, system, apart=apart)


def read(
    patches: Sequence[Patch], question: str, view: ModelView, *, chat: bool
) -> tuple[Encoded, Second | None]:
    """A question as ids, as the rules of `patches` want it read; and in the second way."""
    around = rendered(patches, question, view, chat=chat)
    first = view.encode(question, chat=chat, before=around.before, system=around.system)
    if (apart := around.apart) is None:
        return first, None
    other = view.encode(question, chat=chat, before=apart.before, system=apart.system)
    return first, Second(other.ids, apart.share)


def _joined(patches: tuple[Patch, ...], view: ModelView) -> RuleKind:
    """Rules of one kind as one; the same patches are joined once."""
    kept: dict[Any, RuleKind] = view.kept.rules
    key = tuple(patch.id for patch in patches)
    if key not in kept:
        if len(kept) >= KEPT:
            kept.pop(next(iter(kept)))
        rules = [patch.rule for patch in patches if patch.rule is not None]
        kept[key] = kind_of(rules[0]).join(rules)
    return kept[key]


def _firing(one: Decided, patch: Patch, kind: str) -> Firing:
    return Firing(
        patch=patch,
        kind=kind,
        module="",
        row=0,
        fired=one.fired,
        measure=one.measure,
        score=one.score,
        threshold=one.threshold,
        what=one.what,
    )
