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

from knowpatch.data.case import LOCALITY, Case, Probe
from knowpatch.future import Future
from knowpatch.metrics.asker import Asker
from knowpatch.metrics.metric import Result, metric, register
from knowpatch.metrics.queries import both, compared, forcible
from knowpatch.models.passes import Distributions, Scored, Spread


def _held_against(
    case: Case, before: Asker, after: Asker, of: Callable[[Spread, Distributions], float]
) -> Result | None:
    """The first answer forced on both models, their distributions held against each other."""

    def ask(probe: Probe) -> Future[float] | None:
        answers = forcible(probe.aliases[:1])
        if not answers:
            return None
        base = before.spread(probe.prompt, answers[0])
        edited = after.distributions(probe.prompt, answers[0])
        return edited.read(lambda found: of(base.result(), found))

    return compared(case, LOCALITY, ask, lambda _, asked: asked.result())


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


def _forced(model: Asker, probe: Probe) -> list[Future[Scored]]:
    """All accepted answers forced."""
    return [model.force(probe.prompt, answer) for answer in forcible(probe.aliases)]


def _knows(asked: list[Future[Scored]]) -> bool:
    return any(all(future.result().correct) for future in asked)


@metric(
    protocol="teacher-forced",
    about="of queries with an answer whose tokens all led before, share where they still do",
)
def locality_right_tf(case: Case, before: Asker, after: Asker) -> Result | None:
    def ask(probe: Probe) -> tuple[list[Future[Scored]], list[Future[Scored]]] | None:
        if not forcible(probe.aliases):
            return None
        return _forced(before, probe), _forced(after, probe)

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
        lambda model, probe: _forced(model, probe) or None,
        lambda _, asked: max(future.result().accuracy for future in asked),
    )


register("locality", locality_tf, locality_right_tf, locality_kl, specificity_tf)
