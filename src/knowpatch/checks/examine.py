"""Examining: a suite's questions asked of the unedited and of the edited model, and judged.

Each check asks both models through the planner, and is judged when all are answered, so what
several checks ask is asked once and in common batches. An answer that is wanted must be the
likeliest at each of its tokens, as for an edit to have taken; where none can be forced (a procedure
answers in steps), it must be said.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from knowpatch.ask import Ask
from knowpatch.checks.suite import Change, Keep, MultipleChoice, Perplexity, Suite
from knowpatch.data.case import Case, Probe
from knowpatch.edited import EditedModel
from knowpatch.editing import bare
from knowpatch.effects import ANSWER_TOKENS, FIX_TOKENS
from knowpatch.errors import Unscored
from knowpatch.future import Future
from knowpatch.metrics.asker import Asker, Nobody
from knowpatch.metrics.kinds.general import general_mc
from knowpatch.metrics.kinds.perplexity import of_corpus, of_ordinary
from knowpatch.metrics.metric import Columns, Score, total_columns
from knowpatch.metrics.text import contains
from knowpatch.models.passes import Scored
from knowpatch.patch import Patch
from knowpatch.progress import Progress, silent

CHANGE, KEEP = "change", "keep"
PERPLEXITY, CHOICE = "perplexity", "multiple_choice"

Askers = Mapping[bool, Asker]
"""Who asks one model: plainly, and through the chat template."""


@dataclass(frozen=True)
class Finding:
    """One question of a suite, or one budget, as it came out.

    Attributes:
        asked: the question; what is measured.
        chat: whether it was asked through the chat template.
        wanted: what was wanted, in words.
        before, after: what the models say, or the values as text.
        holds: whether it is as wanted.
        values: before and after of a budget, as numbers; None where there are none.
    """

    asked: str
    chat: bool
    wanted: str
    before: str
    after: str
    holds: bool
    values: tuple[float, float] | None = None


@dataclass(frozen=True)
class Group:
    """The findings of one part of a suite, and which share of them must hold."""

    name: str
    findings: tuple[Finding, ...]
    least: float = 1.0

    @property
    def held(self) -> int:
        return sum(one.holds for one in self.findings)

    @property
    def passed(self) -> bool:
        # A share of 0.95 of 40 is 38, whatever its last digits are.
        return self.held >= self.least * len(self.findings) - 1e-9


@dataclass(frozen=True)
class Verdict:
    """What came of a suite."""

    groups: tuple[Group, ...]

    @property
    def passed(self) -> bool:
        return all(group.passed for group in self.groups)

    def failures(self) -> list[tuple[str, Finding]]:
        """What does not hold of the groups that did not pass."""
        return [
            (group.name, one)
            for group in self.groups
            if not group.passed
            for one in group.findings
            if not one.holds
        ]


Judge = Callable[[], Finding]
Check = Callable[[Askers, Askers], Judge]


def examine(
    model: EditedModel,
    patches: Sequence[Patch],
    suite: Suite,
    general: Sequence[Probe] = (),
    *,
    progress: Progress = silent,
) -> Verdict:
    """Ask the model as it came, and with `patches` on top of what is live; given back as it was.

    Args:
        model: with whatever patches are live on it: they count as edits, too.
        patches: on top of them.
        suite: what must hold.
        general: the questions of its multiple choice (`Suite.general`).
        progress: told how far the asking is.
    """
    checks = dict(_checks(suite, general))
    with bare(model):
        before = heard(model, [check for some in checks.values() for check in some], progress)
    with model.applied(*patches):
        ask = Ask(model, progress=progress)
        after = _askers(ask)
        judges = {name: [one(before, after) for one in some] for name, some in checks.items()}
        ask.run()
        found = {name: tuple(judge() for judge in some) for name, some in judges.items()}
    least = suite.thresholds.model_dump()
    return Verdict(tuple(Group(name, some, least.get(name, 1.0)) for name, some in found.items()))


def heard(model: EditedModel, checks: Sequence[Check], progress: Progress) -> Askers:
    """The unedited model's answers to all that the checks ask of it."""
    ask = Ask(model, progress=progress)
    before = _askers(ask, patches=())
    nobody = {chat: Nobody(ask, chat=chat) for chat in (False, True)}
    for check in checks:
        check(before, nobody)
    ask.run()
    return {chat: asker.answered() for chat, asker in before.items()}


def _askers(ask: Ask, patches: Sequence[Patch] | None = None) -> dict[bool, Asker]:
    return {chat: Asker(ask, patches, chat) for chat in (False, True)}


def _checks(suite: Suite, general: Sequence[Probe]) -> Iterator[tuple[str, list[Check]]]:
    if suite.change:
        yield CHANGE, [partial(_change, one) for one in suite.change]
    if suite.keep:
        yield KEEP, [partial(_keep if one.answer else _same, one) for one in suite.keep]
    if suite.perplexity is not None:
        yield PERPLEXITY, [partial(_perplexity, suite.perplexity)]
    if suite.multiple_choice is not None:
        yield CHOICE, [partial(_choice, suite.multiple_choice, general)]


# -- questions -------------------------------------------------------------------------------------


def _change(one: Change, before: Askers, after: Askers) -> Judge:
    judge = _keep(one, before, after, tokens=FIX_TOKENS)
    wanted = [" or ".join(one.answer)] if one.answer else []
    wanted += [f"not {text}" for text in one.gone]

    def judged() -> Finding:
        found = judge()
        gone = not any(contains(found.after, text) for text in one.gone)
        holds = gone and (found.holds or not one.answer)
        return replace(found, wanted=", ".join(wanted), holds=holds)

    return judged


def _keep(one: Keep, before: Askers, after: Askers, tokens: int = ANSWER_TOKENS) -> Judge:
    """One of the accepted answers must be given."""
    old, new = (model[one.chat].say(one.prompt, tokens) for model in (before, after))
    forced = [after[one.chat].force(one.prompt, answer) for answer in one.answer]

    def judged() -> Finding:
        said = new.result().text
        pairs = zip(one.answer, forced, strict=True)
        holds = any(_led(future, said, answer) for answer, future in pairs)
        wanted = " or ".join(one.answer)
        return Finding(one.prompt, one.chat, wanted, old.result().text, said, holds)

    return judged


def _led(forced: Future[Scored], said: str, answer: str) -> bool:
    """Whether each token of the answer leads; whether it is said, where none can be forced."""
    with contextlib.suppress(Unscored):
        return all(forced.result().correct)
    return contains(said, answer)


def _same(one: Keep, before: Askers, after: Askers) -> Judge:
    """The first tokens of the answer must be what they were."""
    old, new = (model[one.chat].say(one.prompt, ANSWER_TOKENS) for model in (before, after))

    def judged() -> Finding:
        was, is_now = old.result().text, new.result().text
        return Finding(one.prompt, one.chat, "as before", was, is_now, was == is_now)

    return judged


# -- budgets ---------------------------------------------------------------------------------------


def _perplexity(budget: Perplexity, before: Askers, after: Askers) -> Judge:
    score = of_ordinary(before[False], after[False])

    def found(old: float, new: float) -> Finding:
        rise = new / old - 1
        return Finding(
            "perplexity of ordinary text",
            False,
            f"at most {_percent(budget.rise)}",
            f"{old:.4g}",
            f"{new:.4g} ({_percent(rise)})",
            rise <= budget.rise,
            (old, new),
        )

    return partial(_budget, "perplexity of ordinary text", score, total_columns, of_corpus, found)


def _choice(
    budget: MultipleChoice, general: Sequence[Probe], before: Askers, after: Askers
) -> Judge:
    score = general_mc.ask(Case("general", (), tuple(general)), before[False], after[False])
    assert score is not None, "Suite.general gives at least one question"
    name = f"{len(general)} multiple-choice questions"

    def found(old: float, new: float) -> Finding:
        return Finding(
            name,
            False,
            f"at most {_percent(-budget.fall)}",
            f"{100 * old:.1f} % right",
            f"{100 * new:.1f} % right ({_percent(new - old)})",
            old - new <= budget.fall + 1e-9,
            (old, new),
        )

    return partial(_budget, name, score, general_mc.columns, general_mc.combine, found)


def _budget(
    name: str,
    score: Callable[[], Score],
    columns: Callable[..., Columns],
    combine: Callable[[Columns], float | None],
    found: Callable[[float, float], Finding],
) -> Finding:
    """A metric's values before and after, judged; what cannot be measured does not hold."""
    try:
        scored = score()
    except Unscored as why:
        return Finding(name, False, "a value", "", str(why), False)
    old, new = (combine(columns(values or {})) for values in (scored.before, scored.after))
    if old is None or new is None or not old >= 0 or not new >= 0:  # nan is neither
        return Finding(name, False, "a value", "", scored.unscored or "not finite", False)
    return found(old, new)


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %" if abs(share) >= 0.1 else f"{100 * share:+.2g} %"
