"""How a model is let go on: greedily, or by sampling with randomness of each row's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)


@dataclass(frozen=True)
class Sampled:
    """Sample from the `top_k` likeliest tokens; row i with seeds[i], whoever its neighbours are."""

    top_k: int
    seeds: tuple[int, ...]

    @classmethod
    def rows(cls, top_k: int, count: int, *, seed: int) -> Sampled:
        """For `count` rows, all from one seed."""
        return cls(top_k, tuple(seed * 1_000_003 + i for i in range(count)))


@dataclass(frozen=True)
class Mixed:
    """Row i and row i + B of 2 B rows are readings of one question: the later one has shares[i] of
    the prediction, and both go on with the same token, chosen as `sampled` says."""

    shares: tuple[float, ...]
    sampled: Sampled | None = None


def greedily(
    max_new_tokens: int, pad: int, stops: Sequence[int], *, whole: bool = False
) -> GenerationConfig:
    """Take the likeliest token each time; nothing from the model's own defaults.

    Args:
        max_new_tokens: most new tokens; with `whole` just so many, since none of `stops` is taken.
        pad: what stands behind a row that has ended.
        stops: what ends a row.
        whole: whether no row may end.
    """
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        num_beams=1,
        pad_token_id=pad,
        eos_token_id=None if whole else list(stops) or None,
        suppress_tokens=list(stops) or None if whole else None,
    )


def processors(how: Sampled | Mixed | None) -> LogitsProcessorList | None:
    """What turns the greedy choice into another one."""
    if isinstance(how, Mixed):
        more = [] if how.sampled is None else [_Choice(how.sampled, times=2)]
        return LogitsProcessorList([_Mixture(how.shares), *more])
    return None if how is None else LogitsProcessorList([_Choice(how)])


def endings(
    words: Sequence[str], decode: Callable[[Sequence[int]], str], start: int
) -> StoppingCriteriaList | None:
    """What ends a row as soon as one of `words` is in its text, from column `start` on."""
    return StoppingCriteriaList([_Until(words, decode, start)]) if words else None


def ended(
    ids: Sequence[int],
    stops: Sequence[int],
    words: Sequence[str],
    decode: Callable[[Sequence[int]], str],
) -> tuple[int, ...]:
    """A row up to and with the first of `stops`, or the id that brings one of `words`; what its
    neighbours went on with is cut off."""
    counts = range(1, len(ids) + 1)
    ends = [n for n in counts if ids[n - 1] in stops]
    found = (n for n in counts if any(word in decode(ids[:n]) for word in words))
    if words:
        ends += [next(found, len(ids))]
    return tuple(ids[: min(ends, default=len(ids))])


class _Until(StoppingCriteria):
    """Looks into the new text alone: a word that begins in the prompt ends nothing."""

    def __init__(
        self, words: Sequence[str], decode: Callable[[Sequence[int]], str], start: int
    ) -> None:
        self.words, self.decode, self.start = tuple(words), decode, start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        texts = [self.decode(row) for row in input_ids[:, self.start :].tolist()]
        ended = [any(word in text for word in self.words) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


class _Mixture(LogitsProcessor):
    """Predictions of two readings, mixed as probabilities."""

    def __init__(self, shares: Sequence[float]) -> None:
        self.shares_B1 = torch.tensor(shares)[:, None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        first_BV, second_BV = scores.float().log_softmax(-1).chunk(2)
        shares_B1 = self.shares_B1.to(scores.device)
        mixed_BV = torch.logaddexp(first_BV + (-shares_B1).log1p(), second_BV + shares_B1.log())
        return torch.cat([mixed_BV, mixed_BV])


class _Choice(LogitsProcessor):
    """The largest of logits with Gumbel noise is a sample of their softmax (Gumbel, 1954)."""

    def __init__(self, sampled: Sampled, *, times: int = 1) -> None:
        self.top_k = sampled.top_k
        seeds = sampled.seeds * times
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        values_BK, ids_BK = scores.float().topk(min(self.top_k, scores.shape[-1]), dim=-1)
        count = values_BK.shape[1]
        uniform_BK = torch.stack([torch.rand(count, generator=g) for g in self.generators])
        noise_BK = -(-uniform_BK.log()).log()
        chosen_B1 = (values_BK + noise_BK.to(values_BK)).argmax(-1, keepdim=True)
        kept = torch.full_like(scores, float("-inf"))
        return kept.scatter_(1, ids_BK.gather(1, chosen_B1), 0.0)
