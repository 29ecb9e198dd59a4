"""General ability: multiple choice about what no edit is about, before and after.

KnowEdit (arXiv 2401.01286) asks edited models general tasks, to see what else an edit broke. Here
each choice is forced behind the question, without the others in sight, and the likeliest is the
model's: by the mean log-probability of its tokens, since a sum is led by length (`general_mc`), or
by their sum, which is the choice's probability (`general_sum_mc`). Of choices that are equally
likely each is taken for its share. A small model is near chance; whether it still chooses as before
(`general_same_mc`) tells more than how often it is right.

The questions come from data/general.py, which deals them out over the cases; the value is the share
of all questions, not the mean of the cases' shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

from knowpatch.data.case import GENERAL, Case, Probe
from knowpatch.future import Future
from knowpatch.metrics.asker import Asker
from knowpatch.metrics.metric import Columns, Result, Values, metric, register
from knowpatch.metrics.queries import both, compared
from knowpatch.models.passes import Scored

Options = Mapping[str, Future[Scored]]
By = Callable[[Scored], float]


def of_mean(scored: Scored) -> float:
    return scored.mean_logprob


def of_sum(scored: Scored) -> float:
    return sum(scored.logprobs)


def taken(options: Options, by: By) -> frozenset[str]:
    """The likeliest choices; more than one where they are equally likely, none where unknown."""
    values = {choice: by(future.result()) for choice, future in options.items()}
    if any(math.isnan(value) for value in values.values()):
        return frozenset()
    most = max(values.values())
    return frozenset(choice for choice, value in values.items() if value == most)


def counted(values: Values) -> Columns:
    """What came out of the record's questions in all, and how many they are."""
    every = [value for queries in values.values() for value in queries]
    return {"sum": sum(every), "questions": float(len(every))} if every else {}


def share(means: Columns) -> float | None:
    """Records' means of both columns to the share of all questions."""
    return means["sum"] / means["questions"] if means.get("questions") else None


of_questions = partial(
    metric, protocol="multiple choice", general=True, columns=counted, combine=share
)
"""A metric of general questions."""


def _options(model: Asker, probe: Probe) -> Options | None:
    return {choice: model.force(probe.prompt, choice) for choice in probe.choices} or None


def _right(case: Case, before: Asker, after: Asker, by: By) -> Result | None:
    def right(probe: Probe, options: Options) -> float:
        chosen = taken(options, by)
        return (probe.expected in chosen) / len(chosen) if chosen else math.nan

    return both(case, GENERAL, (before, after), _options, right)


@of_questions(about="of general questions, share whose right choice has the likeliest tokens")
def general_mc(case: Case, before: Asker, after: Asker) -> Result | None:
    return _right(case, before, after, of_mean)


@of_questions(about="of general questions, share whose right choice is the likeliest text")
def general_sum_mc(case: Case, before: Asker, after: Asker) -> Result | None:
    return _right(case, before, after, of_sum)


@of_questions(about="of general questions, share with the same choice as before")
def general_same_mc(case: Case, before: Asker, after: Asker) -> Result | None:
    def options(probe: Probe) -> tuple[Options, Options] | None:
        old, new = _options(before, probe), _options(after, probe)
        return (old, new) if old and new else None

    def same(_: Probe, asked: tuple[Options, Options]) -> float:
        old, new = (taken(found, of_mean) for found in asked)
        return float(old == new) if old and new else math.nan

    return compared(case, GENERAL, options, same)


register("general", general_mc, general_sum_mc, general_same_mc)
