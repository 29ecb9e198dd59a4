"""Teacher-forced accuracy of what an edit should change: edit success, rephrases, portability.

KnowEdit (arXiv 2401.01286) and its code: the answer is forced behind the prompt, and the share of
its tokens that are the most likely ones counts (`_tf`), or whether all are (`_exact`). Of several
accepted answers the best counts; the published computation takes the first alias of the first
(`portability_tf_published`). Forcing leaks the answer's length and beginning: see generation.py
for answers that nobody helped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from knowpatch.ask import Future
from knowpatch.data.case import PORTABILITY, REPHRASE, REWRITE, Case, Probe
from knowpatch.metrics.asker import Asker
from knowpatch.metrics.metric import Result, Score, Values, metric, register
from knowpatch.models.passes import Scored

Best = Callable[[Scored], float]


def token_accuracy(scored: Scored) -> float:
    return scored.accuracy


def all_right(scored: Scored) -> float:
    return float(all(scored.correct))


def forced(
    case: Case, kind: str, before: Asker, after: Asker, of: Best, *, first: bool = False
) -> Result | None:
    """Force every accepted answer of the probes of `kind`; a query's value is its best answer's."""
    probes = {
        sub: [probe for probe in found if _answers(probe, first)]
        for sub, found in case.by_sub_kind(kind).items()
    }
    if not any(probes.values()):
        return None
    asked = [
        {sub: [_force(asker, p, first) for p in found] for sub, found in probes.items()}
        for asker in (before, after)
    ]
    return lambda: Score(before=_values(asked[0], of), after=_values(asked[1], of))


def _answers(probe: Probe, first: bool) -> tuple[str, ...]:
    """The accepted answers that can be forced: empty ones cannot."""
    given = (probe.expected or "",) if first else probe.aliases
    return tuple(answer for answer in given if answer.strip())


def _force(asker: Asker, probe: Probe, first: bool) -> list[Future[Scored]]:
    return [asker.force(probe.prompt, answer) for answer in _answers(probe, first)]


def _values(asked: Mapping[str, Sequence[Sequence[Future[Scored]]]], of: Best) -> Values:
    return {
        sub: [max(of(future.result()) for future in futures) for futures in queries]
        for sub, queries in asked.items()
    }


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
