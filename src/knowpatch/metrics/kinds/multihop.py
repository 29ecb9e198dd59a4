"""Multi-hop questions: whether an edit is used where an answer needs several facts.

MQuAKE (arXiv 2305.14795): a case is right if any of its phrasings is answered (`multihop_gen_any`);
that is three tries, so each question's own accuracy stands beside it (`multihop_gen`), that of the
single hops (`hop_gen`), and the case's among those whose hops are all answered
(`multihop_gen_given_hops`), which tells putting together from knowing. Answers are greedy, up to
the line's end, and contain an accepted answer as whole words; for `_exact` they are nothing else up
to their natural stop, since without examples a model goes on talking.
Hop-wise accuracy (arXiv 2312.15194; `hopwise_gen`) asks as well that every answer on the way is the
right one, for methods whose answers come with the chain of them; the others are unscored.
Prompts are the data's: no examples are put in front. Chains of thought are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from knowpatch.data.case import HOP, MULTIHOP, Case, Probe
from knowpatch.future import Future
from knowpatch.metrics.asker import Asker
from knowpatch.metrics.metric import Result, Score, Values, metric, register
from knowpatch.metrics.queries import Asked, both, per_probe, values_of
from knowpatch.metrics.text import contains_any, equals_any, first_line, natural_stop
from knowpatch.stepping import Generated

Right = Callable[[str, Sequence[str]], bool]


def _contains(text: str, answers: Sequence[str]) -> bool:
    return contains_any(first_line(text), answers)


def _exact(text: str, answers: Sequence[str]) -> bool:
    return equals_any(natural_stop(text), answers)


def _say(model: Asker, probe: Probe) -> Future[Generated] | None:
    return model.say(probe.prompt) if any(probe.aliases) else None


def _each(case: Case, kind: str, before: Asker, after: Asker, right: Right) -> Result | None:
    return both(
        case,
        kind,
        (before, after),
        _say,
        lambda probe, said: float(right(said.result().text, probe.aliases)),
    )


def _flat(asked: Asked[Future[Generated]], right: Right) -> list[float]:
    """Which of the questions are answered."""
    values = values_of(asked, lambda p, said: float(right(said.result().text, p.aliases)))
    return [value for queries in values.values() for value in queries]


def _any(
    case: Case, before: Asker, after: Asker, right: Right, *, given_hops: bool = False
) -> Result | None:
    """Whether any phrasing is answered; with `given_hops` only where all single hops are."""
    models = (before, after)
    questions = [per_probe(case, MULTIHOP, partial(_say, model)) for model in models]
    hops = [per_probe(case, HOP, partial(_say, model)) for model in models]
    if not questions[1] or (given_hops and not hops[1]):
        return None

    def values(number: int) -> Values:
        if given_hops and not all(_flat(hops[number], right)):
            return {}
        return {"": [max(_flat(questions[number], right))]}

    def result() -> Score:
        before, after = values(0), values(1)
        reason = "not all single hops are answered"
        return Score(after, before) if after else Score.none(reason, before)

    return result


@metric(protocol="free generation", about="any phrasing of the question has the new answer in it")
def multihop_gen_any(case: Case, before: Asker, after: Asker) -> Result | None:
    return _any(case, before, after, _contains)


@metric(protocol="free generation", about="any phrasing of the question gives just the new answer")
def multihop_gen_any_exact(case: Case, before: Asker, after: Asker) -> Result | None:
    return _any(case, before, after, _exact)


@metric(protocol="free generation", about="the answer has the new one in it, each phrasing")
def multihop_gen(case: Case, before: Asker, after: Asker) -> Result | None:
    return _each(case, MULTIHOP, before, after, _contains)


@metric(protocol="free generation", about="the answer is just the new one, each phrasing")
def multihop_gen_exact(case: Case, before: Asker, after: Asker) -> Result | None:
    return _each(case, MULTIHOP, before, after, _exact)


@metric(protocol="free generation", about="the answer, and each on the way to it, is right")
def hopwise_gen(case: Case, before: Asker, after: Asker) -> Result | None:
    gold = [hop.aliases for hop in case.of(HOP)]
    if not gold:
        return None

    def right(probe: Probe, said: Future[Generated]) -> float | None:
        found = said.result()
        if not (found.chain or found.steps):
            return None
        ends = _contains(found.text, probe.aliases)
        return float(ends and _is_chain(found.chain, gold))

    none = "the answer comes without a chain"
    return both(case, MULTIHOP, (before, after), _say, right, none=none)


def _is_chain(chain: Sequence[str], gold: Sequence[Sequence[str]]) -> bool:
    """Whether the answers on the way are these, each by any of its names."""
    return len(chain) == len(gold) and all(map(equals_any, chain, gold))


@metric(protocol="free generation", about="the answer has the right one in it, single hops")
def hop_gen(case: Case, before: Asker, after: Asker) -> Result | None:
    return _each(case, HOP, before, after, _contains)


@metric(protocol="free generation", about="multihop_gen_any where all single hops are answered")
def multihop_gen_given_hops(case: Case, before: Asker, after: Asker) -> Result | None:
    return _any(case, before, after, _contains, given_hops=True)


register(
    "multihop",
    multihop_gen_any,
    multihop_gen_any_exact,
    multihop_gen,
    multihop_gen_exact,
    hop_gen,
    hopwise_gen,
    multihop_gen_given_hops,
)
