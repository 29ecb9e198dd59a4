"""Locality, teacher-forced: what an edit should leave as it is.

KnowEdit (arXiv 2401.01286): the data's answer is forced on both models, and the share of places
whose likeliest token is the same counts (`locality_tf`). That says "unchanged", not "right": a
model that keeps its wrong answers scores full. So there is also whether known answers stay known
(`locality_right_tf`), how far distributions move (`locality_kl`, in nats), and, as MEND and ROME
score unrelated questions, the accuracy of the data's answers themselves (`specificity_tf`).

Not here: locality of free answers (generation.py), neighbours by probability (comparison.py). A
probe without an answer has nothing to force and is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from knowpatch.ask import Future
from knowpatch.data.case import LOCALITY, Case, Probe
from knowpatch.metrics.asker import Asker
from knowpatch.metrics.metric import Result, metric, register
from knowpatch.metrics.queries import both, compared, forcible
from knowpatch.models.passes import Distributions, Scored, Spread

Forced = Future[Scored] | Future[Spread] | Future[Distributions]


def _held_against(
    case: Case, before: Asker, after: Asker, of: Callable[[Spread, Distributions], float]
) -> Result | None:
    """The first answer forced on both models, their distributions held against each other."""

    def ask(probe: Probe) -> tuple[Future[Spread], Future[Distributions]] | None:
        answers = forcible(probe.aliases[:1])
        if not answers:
            return None
        return (
            before.spread(probe.prompt, answers[0]),
            after.distributions(probe.prompt, answers[0]),
        )

    return compared(case, LOCALITY, ask, lambda _, asked: of(asked[0].result(), asked[1].result()))


def _same_leading(base: Spread, edited: Distributions) -> float:
    pairs = zip(base.leading, edited.leading, strict=True)
    return fmean(float(one == other) for one, other in pairs)


@metric(protocol="teacher-forced", about="share of places with the same likeliest token as before")
def locality_tf(case: Case, before: Asker, after: Asker) -> Result | None:
    return _held_against(case, before, after, _same_leading)


@metric(
    protocol="teacher-forced",
    about="mean KL divergence from the unedited model at the answer's places, in nats",
    better="less",
    percent=False,
)
def locality_kl(case: Case, before: Asker, after: Asker) -> Result | None:
    return _held_against(case, before, after, lambda base, edited: fmean(edited.divergence(base)))


def _forced(model: Asker, probe: Probe, *, edited: bool) -> list[Forced]:
    """All accepted answers forced, the first just as the comparisons above ask it.

    Further aliases are never held against each other, so that they need no distributions, which
    are large.
    """
    answers = forcible(probe.aliases)
    asked: list[Forced] = []
    for answer in answers:
        if answer != probe.aliases[0]:
            asked.append(model.force(probe.prompt, answer))
        elif edited:
            asked.append(model.distributions(probe.prompt, answer))
        else:
            asked.append(model.spread(probe.prompt, answer))
    return asked


def _knows(asked: list[Forced]) -> bool:
    return any(all(future.result().correct) for future in asked)


@metric(
    protocol="teacher-forced",
    about="of queries with an answer whose tokens all led before, share where they still do",
)
def locality_right_tf(case: Case, before: Asker, after: Asker) -> Result | None:
    def ask(probe: Probe) -> tuple[list[Forced], list[Forced]] | None:
        if not forcible(probe.aliases):
            return None
        return _forced(before, probe, edited=False), _forced(after, probe, edited=True)

    return compared(
        case,
        LOCALITY,
        ask,
        lambda _, asked: float(_knows(asked[1])) if _knows(asked[0]) else None,
        none="the unedited model knows none of the answers",
    )


@metric(protocol="teacher-forced", about="share of the data's answer's tokens that lead, locality")
def specificity_tf(case: Case, before: Asker, after: Asker) -> Result | None:
    return both(
        case,
        LOCALITY,
        (before, after),
        lambda model, probe: _forced(model, probe, edited=model is after) or None,
        lambda _, asked: max(future.result().accuracy for future in asked),
    )


register("locality", locality_tf, locality_right_tf, locality_kl, specificity_tf)
