"""Negation and fact checks: whether an edit taught a fact or a reflex.

"Is Model Editing Built on Sand?" (arXiv 2510.00625) asks edited models the negated prompt, and
whether the fact is true; there is no code, so wording and formulas are ours. Nothing here knows
relations: the prompt is negated by a frame, and by "not" behind its verb where it ends so that this
reads well. A negated prompt has many right answers: only saying the new one counts, as an error
(`negation_gen`); `negation_prob` is how much likelier it still is, by the affirmative prompt.

A fact check asks yes or no: of the new answer, of the old one and of another one that the case
mentions. A model that always says yes gets a third. `fact_check_prob` takes off the log-odds of a
statement without content (contextual calibration, arXiv 2102.09690); `fact_check_raw_prob` does
not. Small models are near chance here: read the value before.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from knowpatch.data.case import LOCALITY, Case
from knowpatch.future import Future
from knowpatch.metrics.asker import Asker
from knowpatch.metrics.metric import Columns, Result, Score, Values, metric, part_columns, register
from knowpatch.metrics.queries import edits
from knowpatch.metrics.text import contains, contains_any, natural_stop
from knowpatch.models.passes import Scored
from knowpatch.parts.spans import separator
from knowpatch.request import EditRequest
from knowpatch.stepping import Generated

TOKENS = 8
"""Length of the answers to negated prompts."""
MOST = 2.0
"""Largest ratio of probabilities that counts."""
YES, NO = ("yes", "Yes"), ("no", "No")
NO_CONTENT = "N/A"
NOTHING_NEGATED = "every negated prompt has the new answer in it"

_VERB = r"(?:is|was|are|were)"
_LAST_VERB = re.compile(rf"^(.*\b{_VERB})\b(?!\s+not\b)(.*)$", re.DOTALL)
_BEFORE_ANSWER = re.compile(rf"\b(?:{_VERB}|in|of|by|as|at|from)$")
_ASKS = re.compile(
    rf"^((?:who|what|which|where|when)\b.*?\b{_VERB})\b(?!\s+not\b)", re.I | re.DOTALL
)
_LOWERED = re.compile(r"(?:the|an?|in|on|at|of|by|it|his|her|their|its|this|that)\b", re.IGNORECASE)


def negated(prompt: str) -> list[str]:
    """The prompt negated, in all ways that read well."""
    prompt = prompt.strip()
    if prompt.endswith("?"):
        found = [f"Name something that is not an answer to this question: {prompt}\nAnswer:"]
        return found + ([_ASKS.sub(r"\1 not", prompt)] if _ASKS.search(prompt) else [])
    inner = prompt[0].lower() + prompt[1:] if _LOWERED.match(prompt) else prompt
    found = [f"It is not true that {inner}"]
    verb = _LAST_VERB.match(prompt)
    return found + ([f"{verb[1]} not{verb[2]}"] if verb and _BEFORE_ANSWER.search(prompt) else [])


def statement(prompt: str, answer: str) -> str:
    """The fact as a statement, without a full stop."""
    prompt, answer = prompt.strip(), answer.strip().rstrip(".")
    if prompt.endswith("?"):
        return f'The answer to the question "{prompt}" is {answer}'
    return prompt + separator(prompt, answer) + answer


def check(said: str) -> str:
    """The question whether a statement is true."""
    return f"Statement: {said}.\nIs the statement true? Answer yes or no.\nAnswer:"


# -- negated prompts -------------------------------------------------------------------------------


def _negations(case: Case) -> list[tuple[str, str, str]]:
    """(prompt, negated prompt, new answer), where the prompt does not hold the answer itself."""
    return [
        (probe.prompt, prompt, request.target)
        for probe, request in edits(case)
        for prompt in negated(probe.prompt)
        if not contains(prompt, request.target)
    ]


def _still_says(said: Future[Generated], new: str) -> float:
    return float(contains(natural_stop(said.result().text), new))


@metric(
    protocol="free generation",
    about="the negated prompt is answered with the new answer nevertheless",
    better="less",
)
def negation_gen(case: Case, before: Asker, after: Asker) -> Result | None:
    def ask(model: Asker) -> list[Callable[[], float]]:
        return [
            partial(_still_says, model.say(prompt, TOKENS), new)
            for _, prompt, new in _negations(case)
        ]

    return _of_negations(case, before, after, ask)


@metric(
    protocol="probability",
    about="probability of the new answer behind the negated prompt, by that behind the prompt",
    better="less",
    percent=False,
)
def negation_prob(case: Case, before: Asker, after: Asker) -> Result | None:
    def ask(model: Asker) -> list[Callable[[], float]]:
        return [
            partial(ratio, model.force(prompt, new), model.force(plain, new))
            for plain, prompt, new in _negations(case)
        ]

    return _of_negations(case, before, after, ask)


def ratio(negative: Future[Scored], affirmative: Future[Scored]) -> float:
    """Of the whole answer's probabilities, at most MOST."""
    larger = sum(negative.result().logprobs) - sum(affirmative.result().logprobs)
    return math.exp(min(larger, math.log(MOST)))


def _of_negations(
    case: Case, before: Asker, after: Asker, ask: Callable[[Asker], list[Callable[[], float]]]
) -> Result | None:
    if not edits(case):
        return None
    old, new = ask(before), ask(after)
    if not new:
        return lambda: Score.none(NOTHING_NEGATED)
    return lambda: Score({"": [value() for value in new]}, {"": [value() for value in old]})


# -- fact checks -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Odds:
    """Log-odds of yes against no as the answer to one question."""

    yes: tuple[Future[Scored], ...]
    no: tuple[Future[Scored], ...]

    @classmethod
    def of(cls, model: Asker, question: str) -> Odds:
        yes, no = (tuple(model.force(question, word) for word in words) for words in (YES, NO))
        return cls(yes, no)

    def value(self) -> float:
        yes, no = (
            math.log(sum(math.exp(sum(word.result().logprobs)) for word in words) + 1e-300)
            for words in (self.yes, self.no)
        )
        return yes - no


def says_yes(odds: float, without_content: float = 0.0) -> bool:
    """Whether a statement is affirmed, its log-odds held against those of no statement at all."""
    return odds - without_content > 0


@dataclass(frozen=True)
class FactCheck:
    """The questions about one edited prompt; `other` and `old` where the case has such answers."""

    neutral: Odds
    parts: dict[str, Odds]

    @classmethod
    def of(cls, case: Case, model: Asker, prompt: str, request: EditRequest) -> FactCheck:
        said = {"yes_new": request.target, "no_old": request.old, "no_other": other(case, request)}
        parts = {
            part: Odds.of(model, check(statement(prompt, answer)))
            for part, answer in said.items()
            if answer is not None
        }
        return cls(Odds.of(model, check(NO_CONTENT)), parts)

    def right(self, part: str, *, calibrated: bool) -> bool:
        neutral = self.neutral.value() if calibrated else 0.0
        return says_yes(self.parts[part].value(), neutral) == part.startswith("yes")


def other(case: Case, request: EditRequest) -> str | None:
    """An answer that the case mentions elsewhere, and that is neither the new nor the old one."""
    taken = [text for text in (request.target, request.old) if text]
    found = [alias for probe in case.of(LOCALITY) for alias in probe.aliases[:1]]
    found += [text for one in case.requests for text in (one.target, one.old) if text]
    free = [
        text
        for text in dict.fromkeys(found)
        if text.strip() and not any(contains(text, t) or contains(t, text) for t in taken)
    ]
    return min(free, key=lambda text: hashlib.sha256(text.encode()).digest(), default=None)


def balanced(means: Columns) -> float | None:
    """Mean of the parts, each a mean over records, so that no answer alone scores more than 1/3."""
    return fmean(means.values()) if means else None


def _checked(case: Case, before: Asker, after: Asker, *, calibrated: bool) -> Result | None:
    if not edits(case):
        return None
    old, new = (
        [FactCheck.of(case, model, probe.prompt, request) for probe, request in edits(case)]
        for model in (before, after)
    )

    def values(checks: list[FactCheck]) -> Values:
        found: dict[str, list[float]] = {}
        for one in checks:
            for part in one.parts:
                found.setdefault(part, []).append(float(one.right(part, calibrated=calibrated)))
        return found

    return lambda: Score(values(new), values(old))


@metric(
    protocol="probability",
    about="yes to the new answer, no to the old and to another; bias to yes taken off",
    columns=part_columns,
    combine=balanced,
)
def fact_check_prob(case: Case, before: Asker, after: Asker) -> Result | None:
    return _checked(case, before, after, calibrated=True)


@metric(
    protocol="probability",
    about="as fact_check_prob, with the model's bias to yes or no",
    columns=part_columns,
    combine=balanced,
)
def fact_check_raw_prob(case: Case, before: Asker, after: Asker) -> Result | None:
    return _checked(case, before, after, calibrated=False)


@metric(
    protocol="free generation",
    about="says the new answer, not to the negated prompt, affirms it and denies the old one",
)
def negation_consistency(case: Case, before: Asker, after: Asker) -> Result | None:
    known = [(probe.prompt, r) for probe, r in edits(case) if r.old is not None]
    if not known:
        return None
    old, new = ([_consistent(case, m, *pair) for pair in known] for m in (before, after))
    return lambda: Score({"": [value() for value in new]}, {"": [value() for value in old]})


def _consistent(case: Case, model: Asker, prompt: str, request: EditRequest) -> Callable[[], float]:
    said, facts = model.say(prompt), FactCheck.of(case, model, prompt, request)
    ways = [way for way in negated(prompt) if not contains(way, request.target)]
    negations = [model.say(way, TOKENS) for way in ways]

    def value() -> float:
        success = contains_any(natural_stop(said.result().text), (request.target,), request.old)
        checked = all(facts.right(part, calibrated=True) for part in ("yes_new", "no_old"))
        wrong = any(_still_says(answer, request.target) for answer in negations)
        return float(success and checked and not wrong)

    return value


register(
    "negation",
    negation_gen,
    negation_prob,
    fact_check_prob,
    fact_check_raw_prob,
    negation_consistency,
)
