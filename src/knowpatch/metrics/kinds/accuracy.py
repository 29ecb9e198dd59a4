"""Teacher-forced accuracy of what an edit should change: edit success, rephrases, portability.

KnowEdit (arXiv 2401.01286) and its code: the answer is forced behind the prompt, and the share of
its tokens that are the most likely ones counts (`_tf`), or whether all are (`_exact`). Of several
accepted answers the best counts; the published computation takes the first alias of the first
(`portability_tf_published`). Forcing leaks the answer's length and beginning: see generation.py
for answers that nobody helped.
"""

from __future__ import annotations

from collections.abc import Callable

from knowpatch.data.case import PORTABILITY, REPHRASE, REWRITE, Case, Probe
from knowpatch.future import Future
from knowpatch.metrics.asker import Asker
from knowpatch.metrics.metric import Result, metric, register
from knowpatch.metrics.queries import both, forcible
from knowpatch.models.passes import Scored

Best = Callable[[Scored], float]


def token_accuracy(scored: Scored) -> float:
    return scored.accuracy


def all_right(scored: Scored) -> float:
    return float(all(scored.correct))


def forced(
    case: Case, kind: str, before: Asker, after: Asker, of: Best, *, first: bool = False
) -> Result | None:
    """Force the accepted answers of the probes of `kind`; a query's value is its best answer's."""

    def ask(model: Asker, probe: Probe) -> list[Future[Scored]] | None:
        answers = forcible(probe.aliases[:1] if first else probe.aliases)
        return [model.force(probe.prompt, answer) for answer in answers] or None

    return both(
        case, kind, (before, after), ask, lambda _, asked: max(of(f.result()) for f in asked)
    )


@metric(protocol="teacher-forced", about="share of the target's tokens that lead, edited prompt")
def success_tf(case: Case, before: Asker, after: Asker) -> Result | None:
    return forced(case, REWRITE, before, after, token_accuracy)


@metric(protocol="teacher-forced", about="all tokens of the target lead, edited prompt")
def success_exact(case: Case, before: Asker, after: Asker) -> Result | None:
    return forced(case, REWRITE, before, after, all_right)


@metric(protocol="teacher-forced", about="share of the target's tokens that lead, rephrases")
def rephrase_tf(case: Case, before: Asker, after: Asker) -> Result | None:
    return forced(case, REPHRASE, before, after, token_accuracy)


@metric(protocol="teacher-forced", about="all tokens of the target lead, rephrases")
def rephrase_exact(case: Case, before: Asker, after: Asker) -> Result | None:
    return forced(case, REPHRASE, before, after, all_right)


@metric(protocol="teacher-forced", about="share of the answer's tokens that lead, what follows")
def portability_tf(case: Case, before: Asker, after: Asker) -> Result | None:
    return forced(case, PORTABILITY, before, after, token_accuracy)


@metric(protocol="teacher-forced", about="all tokens of an answer lead, what follows")
def portability_exact(case: Case, before: Asker, after: Asker) -> Result | None:
    return forced(case, PORTABILITY, before, after, all_right)


@metric(
    protocol="teacher-forced",
    about="as portability_tf, for the first alias of the first answer alone",
    published=True,
)
def portability_tf_published(case: Case, before: Asker, after: Asker) -> Result | None:
    return forced(case, PORTABILITY, before, after, token_accuracy, first=True)


register(
    "accuracy",
    success_tf,
    success_exact,
    rephrase_tf,
    rephrase_exact,
    portability_tf,
    portability_exact,
    portability_tf_published,
)
