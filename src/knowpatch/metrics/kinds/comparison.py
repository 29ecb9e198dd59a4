"""Comparison of the new and the old answer's probability: efficacy, paraphrases, neighbourhood.

ROME (arXiv 2202.05262) and MEMIT (arXiv 2210.07229): the answer with the larger log-probability per
token wins, the new one on the edited prompt and its paraphrases, the old one on neighbours; a tie
is lost. Their score S is the harmonic mean of the three means over records, not of records' own.
Exponentials of means per token are no probabilities; `prob_success_sum` takes the whole answers',
which favours short ones. Consistency with reference texts and essence drift are not here: they
need texts that the data does not bring.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import chain

from knowpatch.data.case import NEIGHBOUR, REPHRASE, REWRITE, Case, Probe
from knowpatch.future import Future
from knowpatch.metrics.asker import Asker
from knowpatch.metrics.metric import Columns, Result, Score, Values, metric, part_columns, register
from knowpatch.metrics.queries import both, per_probe, request_of, values_of
from knowpatch.models.passes import Scored

Two = tuple[Future[Scored], Future[Scored]]
"""The answer that should win, and the other."""
Of = Callable[[Scored, Scored], float]
PARTS = {"efficacy": REWRITE, "paraphrase": REPHRASE, "neighbourhood": NEIGHBOUR}


def wins(wanted: Scored, other: Scored) -> float:
    return float(wanted.mean_logprob > other.mean_logprob)


def wins_whole(wanted: Scored, other: Scored) -> float:
    return float(sum(wanted.logprobs) > sum(other.logprobs))


def magnitude(wanted: Scored, other: Scored) -> float:
    return math.exp(wanted.mean_logprob) - math.exp(other.mean_logprob)


def _two(case: Case, model: Asker, probe: Probe) -> Two | None:
    """Both answers forced, the wanted one first; roles are swapped on neighbours."""
    request = request_of(case, probe)
    if request is None or request.old is None:
        return None
    answers = [request.target, request.old]
    if probe.kind == NEIGHBOUR:
        answers.reverse()
    wanted, other = (model.force(probe.prompt, answer) for answer in answers)
    return wanted, other


def _value(of: Of) -> Callable[[Probe, Two], float]:
    return lambda _, asked: of(asked[0].result(), asked[1].result())


def _held(case: Case, kind: str, before: Asker, after: Asker, of: Of) -> Result | None:
    return both(case, kind, (before, after), partial(_two, case), _value(of))


@metric(protocol="probability", about="the new answer is likelier than the old, edited prompt")
def prob_success(case: Case, before: Asker, after: Asker) -> Result | None:
    return _held(case, REWRITE, before, after, wins)


@metric(protocol="probability", about="the new answer is likelier than the old, rephrases")
def prob_rephrase(case: Case, before: Asker, after: Asker) -> Result | None:
    return _held(case, REPHRASE, before, after, wins)


@metric(protocol="probability", about="the old answer is likelier than the new, neighbours")
def prob_neighbourhood(case: Case, before: Asker, after: Asker) -> Result | None:
    return _held(case, NEIGHBOUR, before, after, wins)


@metric(
    protocol="probability", about="how much likelier per token the new answer is, edited prompt"
)
def prob_magnitude(case: Case, before: Asker, after: Asker) -> Result | None:
    return _held(case, REWRITE, before, after, magnitude)


@metric(protocol="probability", about="how much likelier per token the new answer is, rephrases")
def prob_rephrase_magnitude(case: Case, before: Asker, after: Asker) -> Result | None:
    return _held(case, REPHRASE, before, after, magnitude)


@metric(protocol="probability", about="how much likelier per token the old answer is, neighbours")
def prob_neighbourhood_magnitude(case: Case, before: Asker, after: Asker) -> Result | None:
    return _held(case, NEIGHBOUR, before, after, magnitude)


@metric(
    protocol="probability",
    about="as prob_success, by the whole answers' probabilities, not per token",
)
def prob_success_sum(case: Case, before: Asker, after: Asker) -> Result | None:
    return _held(case, REWRITE, before, after, wins_whole)


def harmonic(means: Columns) -> float | None:
    """Harmonic mean of the three parts' means; None where a part is missing."""
    if not all(part in means for part in PARTS):
        return None
    found = [means[part] for part in PARTS]
    return len(found) / sum(1 / mean for mean in found) if all(found) else 0.0


@metric(
    protocol="probability",
    about="harmonic mean of prob_success, prob_rephrase and prob_neighbourhood over records",
    columns=part_columns,
    combine=harmonic,
)
def prob_score(case: Case, before: Asker, after: Asker) -> Result | None:
    old, new = (
        {part: per_probe(case, kind, partial(_two, case, model)) for part, kind in PARTS.items()}
        for model in (before, after)
    )
    if not any(new.values()):
        return None

    def values(asked: dict[str, dict[str, list[tuple[Probe, Two]]]]) -> Values:
        found = {part: values_of(queries, _value(wins)) for part, queries in asked.items()}
        return {part: [*chain(*subs.values())] for part, subs in found.items() if subs}

    return lambda: Score(values(new), values(old))


register(
    "comparison",
    prob_success,
    prob_rephrase,
    prob_neighbourhood,
    prob_magnitude,
    prob_rephrase_magnitude,
    prob_neighbourhood_magnitude,
    prob_score,
    prob_success_sum,
)
