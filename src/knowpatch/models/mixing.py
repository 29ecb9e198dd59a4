"""Mixing: a question read in two ways, whose predictions are mixed as probabilities.

    p(token | x) = share p(token | second reading of x) + (1 - share) p(token | x)

Both readings are rows of one batch, each with its own past, and both go on with the same token.
Axes: B questions, N places of an answer, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from knowpatch.models.beside import Rows, session
from knowpatch.models.passes import Distributions, Ids, Second
from knowpatch.models.sampling import Mixed, Sampled
from knowpatch.models.view import ModelView, S


def mixed(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Log-probabilities of a mixture from those of its parts."""
    return torch.logaddexp(first + math.log1p(-share), second + math.log(share))


def score(
    view: ModelView,
    pairs: Sequence[tuple[Ids, Ids]],
    seconds: Sequence[Second],
    rows: Rows,
    give: type[S],
) -> list[S]:
    """Force each answer behind its question, both readings of which carry rows[i]."""
    twice = [*pairs, *((s.prompt, a) for s, (_, a) in zip(seconds, pairs, strict=True))]
    with session(view.model, (*rows, *rows)):
        found = view.score(twice, Distributions)
    answers: list[S] = []
    for number, second in enumerate(seconds):
        first_NV, other_NV = (found[n].logprobs_NV for n in (number, number + len(pairs)))
        answers += give.of(mixed(first_NV, other_NV, second.share), [pairs[number][1]])
    return answers


def generate(
    view: ModelView,
    prompts: Sequence[Ids],
    seconds: Sequence[Second],
    rows: Rows,
    *,
    max_new_tokens: int,
    sampled: Sampled | None = None,
    whole: bool = False,
    until: Sequence[str] = (),
) -> list[Ids]:
    """Continue each question from both of its readings; keywords as in `ModelView.generate`."""
    how = Mixed(tuple(second.share for second in seconds), sampled)
    twice = [*prompts, *(second.prompt for second in seconds)]
    with session(view.model, (*rows, *rows)):
        said = view.generate(
            twice, max_new_tokens=max_new_tokens, sampled=how, whole=whole, until=until
        )
    return said[: len(prompts)]
