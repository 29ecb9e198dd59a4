"""Sentiment of what is said of an entity: does it turn, does the topic stay, do others keep theirs.

SERAC (arXiv 2206.06520), KnowEdit's ConvSent. With mean log-probabilities over the tokens of all
answers: z_sent = sigmoid(wanted sentiment - other sentiment), both after the edit; z_topic =
min(1, exp(wanted after - wanted before)), that the answers still speak of the matter; success is
z_sent * z_topic. Drift is the mean KL divergence from the unedited model on another entity's
answers, in nats.

The published computation, beside it: tokens are scored where the next one is predicted (nothing is
shifted by one), and the edited model stands on both sides, so that z_topic is 1 and the drift 0 for
whatever edits in place. Two of its details are not repeated: the last token of each answer, for
which there is no further place, is left out; and a batch's answers are not masked by its last row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from knowpatch.data.case import OPPOSITE, OTHER, SAME, Case
from knowpatch.future import Future
from knowpatch.metrics.asker import Asker
from knowpatch.metrics.metric import Result, Score, metric, register
from knowpatch.metrics.queries import forcible
from knowpatch.models.passes import Distributions, Scored, Spread

Questions = list[tuple[str, str]]


def _questions(case: Case, kind: str) -> Questions:
    """Each prompt of a kind with each of its answers."""
    return [(probe.prompt, answer) for probe in case.of(kind) for answer in forcible(probe.aliases)]


def topic_and_sentiment(same: float, same_before: float, opposite: float) -> float:
    """z_sent * z_topic, from mean log-probabilities per token."""
    return _sigmoid(same - opposite) * min(1.0, math.exp(min(same - same_before, 0.0)))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _mean(asked: Sequence[Future[Scored]]) -> float:
    """Mean log-probability of the tokens of all answers together."""
    return fmean(logprob for future in asked for logprob in future.result().logprobs)


@metric(
    protocol="probability",
    about="the wanted sentiment is likelier than the other, and no less likely than before",
)
def sentiment_prob(case: Case, before: Asker, after: Asker) -> Result | None:
    same, opposite = _questions(case, SAME), _questions(case, OPPOSITE)
    if not same or not opposite:
        return None
    wanted, other = (
        [[model.force(*question) for question in questions] for model in (before, after)]
        for questions in (same, opposite)
    )

    def result() -> Score:
        old, new = _mean(wanted[0]), _mean(wanted[1])
        return Score(
            {"": [topic_and_sentiment(new, old, _mean(other[1]))]},
            {"": [topic_and_sentiment(old, old, _mean(other[0]))]},
        )

    return result


@metric(
    protocol="probability",
    about="mean KL divergence from the unedited model on another entity's answers, in nats",
    better="less",
    percent=False,
)
def sentiment_kl(case: Case, before: Asker, after: Asker) -> Result | None:
    questions = _questions(case, OTHER)
    if not questions:
        return None
    asked = [_divergence(before.spread(*q), after.distributions(*q)) for q in questions]
    return lambda: Score({"": [fmean(v for future in asked for v in future.result())]})


def _divergence(base: Future[Spread], edited: Future[Distributions]) -> Future[tuple[float, ...]]:
    return edited.read(lambda found: found.divergence(base.result()))


def unshifted(found: Distributions) -> list[float]:
    """The log-probability of each token where the one behind it is predicted; the last has none."""
    rows = found.logprobs_NV[1:]
    return [float(row[token]) for row, token in zip(rows, found.ids, strict=False)]


@metric(
    protocol="probability",
    about="as sentiment_prob, tokens scored one place late and the topic taken as kept",
    published=True,
)
def sentiment_prob_published(case: Case, before: Asker, after: Asker) -> Result | None:
    same, opposite = (
        [after.distributions(*question).read(unshifted) for question in _questions(case, kind)]
        for kind in (SAME, OPPOSITE)
    )
    if not same or not opposite:
        return None

    def result() -> Score:
        sides = [[v for f in side for v in f.result()] for side in (same, opposite)]
        if not all(sides):
            return Score.none("the answers have one token each, which has no place behind it")
        return Score({"": [_sigmoid(fmean(sides[0]) - fmean(sides[1]))]})

    return result


@metric(
    protocol="probability",
    about="as sentiment_kl, the edited model against itself: always 0",
    better="less",
    percent=False,
    published=True,
)
def sentiment_kl_published(case: Case, before: Asker, after: Asker) -> Result | None:
    return (lambda: Score({"": [0.0]})) if _questions(case, OTHER) else None


register(
    "sentiment", sentiment_prob, sentiment_kl, sentiment_prob_published, sentiment_kl_published
)
