"""Perplexity of the wanted answers: how surprised the model is at the text it was taught.

GRACE (arXiv 2211.11031) and WISE score repaired hallucinations so; useful where the target is a
sentence. `perplexity_tf` is the corpus's: the exponential of all tokens' mean, so that long answers
count as long. The published mean of records' own perplexities (`perplexity_tf_published`) is led by
the few worst. Neither says anything of unrelated text: that is `ordinary_ppl_tf`, of one ordinary
text that ships with the library and is about none of the facts.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable
from functools import cache, partial
from importlib import resources

from knowpatch.data.case import REWRITE, Case, Probe
from knowpatch.future import Future
from knowpatch.metrics.asker import Asker
from knowpatch.metrics.metric import (
    Columns,
    Result,
    Score,
    Values,
    metric,
    register,
    total_columns,
)
from knowpatch.metrics.queries import Asked, both, forcible, per_probe
from knowpatch.models.passes import Scored

LARGEST = math.log(sys.float_info.max)
OPENING = 3
"""Words of a sentence that are given; the rest is forced."""


@cache
def ordinary() -> tuple[tuple[str, str], ...]:
    """The sentences of the ordinary text, each as its opening and the rest."""
    text = resources.files("knowpatch").joinpath("assets", "ordinary.txt").read_text("utf-8")
    sentences = re.split(r"(?<=[.?!])\s+", text.strip())
    split = (sentence.split(" ", OPENING) for sentence in sentences)
    return tuple((" ".join(words[:OPENING]), words[OPENING]) for words in split)


def _first(model: Asker, probe: Probe) -> Future[Scored] | None:
    answers = forcible(probe.aliases)
    return model.force(probe.prompt, answers[0]) if answers else None


def of_corpus(means: Columns) -> float | None:
    """Records' means of both columns to the corpus's perplexity: their ratio is the sums' ratio."""
    return perplexity(means["nll"] / means["tokens"]) if means.get("tokens") else None


def perplexity(nll: float) -> float:
    """The exponential of a mean per token; the largest number there is where that is beyond it."""
    return math.exp(min(nll, LARGEST))


of_text = partial(
    metric,
    protocol="teacher-forced",
    better="less",
    percent=False,
    columns=total_columns,
    combine=of_corpus,
)
"""A metric of log-likelihoods and numbers of tokens, summed up over records."""


@of_text(about="perplexity of the targets' tokens, all records together")
def perplexity_tf(case: Case, before: Asker, after: Asker) -> Result | None:
    old, new = (per_probe(case, REWRITE, partial(_first, model)) for model in (before, after))
    return (lambda: Score(_sums(new), _sums(old))) if new else None


def _sums(asked: Asked[Future[Scored]]) -> Values:
    return _summed(future for queries in asked.values() for _, future in queries)


def _summed(asked: Iterable[Future[Scored]]) -> Values:
    scored = [future.result() for future in asked]
    return {
        "nll": [-sum(one.logprobs) for one in scored],
        "tokens": [float(len(one.logprobs)) for one in scored],
    }


@metric(
    protocol="teacher-forced",
    about="mean over records of the target's perplexity",
    better="less",
    percent=False,
    published=True,
)
def perplexity_tf_published(case: Case, before: Asker, after: Asker) -> Result | None:
    return both(
        case,
        REWRITE,
        (before, after),
        _first,
        lambda _, asked: perplexity(-asked.result().mean_logprob),
    )


@of_text(about="perplexity of an ordinary text that no edit is about")
def ordinary_ppl_tf(case: Case, before: Asker, after: Asker) -> Result | None:
    return of_ordinary(before, after) if case.requests and case.probes else None


def of_ordinary(before: Asker, after: Asker) -> Result:
    """Of both models: log-likelihood and tokens of the ordinary text, as `of_corpus` takes them."""
    old, new = (
        [model.force(opening, rest) for opening, rest in ordinary()] for model in (before, after)
    )
    return lambda: Score(_summed(new), _summed(old))


register("perplexity", perplexity_tf, perplexity_tf_published, ordinary_ppl_tf)
