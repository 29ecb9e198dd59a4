"""What a pass through a model is asked for, and what it gives.

Axes: B rows, T columns, M asked places, V vocabulary, D width of a module's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from knowpatch.models.batch import Batch, Place

Ids = tuple[int, ...]
TOP = 64
"""Tokens that a Spread keeps at each place."""


@dataclass(frozen=True)
class Row:
    """Token ids, the position among them that an edit changes, and how many are the prompt.

    The prompt may be followed by (part of) an answer; 0 where all is prompt.
    """

    ids: tuple[int, ...]
    position: int
    prompt: int = 0

    @property
    def end(self) -> int:
        """Where the prompt ends."""
        return self.prompt or len(self.ids)


@dataclass(frozen=True)
class Tap:
    """What passes into or out of the module at `module`."""

    module: str
    side: Literal["input", "output"]


@dataclass(frozen=True, eq=False)
class Shift:
    """delta_MD added to the output of `module` at `places` (one row of delta a place)."""

    module: str
    places: Sequence[Place]
    delta_MD: Tensor


@dataclass(frozen=True, eq=False)
class Act:
    """What the module at `module` puts out instead: `function` of what enters it (B, T, I), what it
    puts out (B, T, D), and the numbers of the pass's rows."""

    module: str
    function: Callable[[Tensor, Tensor, Sequence[int]], Tensor]


@dataclass(frozen=True, eq=False)
class Run:
    """What one pass gave: logits_MV at the asked places (float32), and (B, T, .) per tap."""

    batch: Batch
    logits_MV: Tensor
    tapped: Mapping[Tap, Tensor]

    def at(self, tap: Tap, places: Sequence[Place]) -> Tensor:
        """What `tap` saw at `places`, (M, .), float32."""
        return self.tapped[tap][self.batch.at(places)].float()


@dataclass(frozen=True)
class Second:
    """A second reading of a question, and its share of the prediction, between 0 and 1."""

    prompt: Ids
    share: float


@dataclass(frozen=True)
class Scored:
    """A forced answer: for each of its tokens, was it the most likely, and its log-probability."""

    ids: tuple[int, ...]
    correct: tuple[bool, ...]
    logprobs: tuple[float, ...]

    @classmethod
    def of(cls, logits_MV: Tensor, answers: Sequence[Ids]) -> list[Self]:
        """Answers from the logits at the places where their tokens are predicted, in order."""
        logprobs_MV, led = logits_MV.log_softmax(-1), logits_MV.argmax(-1).tolist()
        found, start = [], 0
        for answer in answers:
            stop = start + len(answer)
            flat = torch.tensor(answer, device=logits_MV.device)
            rows = logprobs_MV[start:stop]
            forced = rows.gather(1, flat[:, None])[:, 0].tolist()
            correct = tuple(a == b for a, b in zip(answer, led[start:stop], strict=True))
            found.append(cls(tuple(answer), correct, tuple(forced), *cls._more(rows)))
            start = stop
        return found

    @classmethod
    def _more(cls, logprobs_NV: Tensor) -> tuple[Any, ...]:
        """What a subclass keeps besides, from the log-probabilities at one answer's places."""
        return ()

    def plain(self) -> Scored:
        """The score alone, without what a subclass keeps."""
        return Scored(self.ids, self.correct, self.logprobs)

    @property
    def accuracy(self) -> float:
        """Share of tokens that were the most likely (teacher-forced token accuracy)."""
        return sum(self.correct) / len(self.correct)

    @property
    def probability(self) -> float:
        """Probability of the whole answer."""
        return math.exp(sum(self.logprobs))

    @property
    def mean_logprob(self) -> float:
        """Log-probability per token."""
        return sum(self.logprobs) / len(self.logprobs)


@dataclass(frozen=True)
class Spread(Scored):
    """A forced answer with the TOP likeliest tokens at each of its places, likeliest first."""

    top_ids: tuple[tuple[int, ...], ...]
    top_logprobs: tuple[tuple[float, ...], ...]

    @classmethod
    def _more(cls, logprobs_NV: Tensor) -> tuple[Any, ...]:
        values, ids = logprobs_NV.topk(min(TOP, logprobs_NV.shape[1]), dim=-1)
        return tuple(map(tuple, ids.tolist())), tuple(map(tuple, values.tolist()))

    @property
    def leading(self) -> tuple[int, ...]:
        """The likeliest token at each place."""
        return tuple(ids[0] for ids in self.top_ids)


@dataclass(frozen=True, eq=False)
class Distributions(Scored):
    """A forced answer with the log-probabilities of the whole vocabulary at its N places."""

    logprobs_NV: Tensor

    @classmethod
    def _more(cls, logprobs_NV: Tensor) -> tuple[Any, ...]:
        return (logprobs_NV,)

    @property
    def leading(self) -> tuple[int, ...]:
        """The likeliest token at each place."""
        found: list[int] = self.logprobs_NV.argmax(-1).tolist()
        return tuple(found)

    def divergence(self, base: Spread) -> tuple[float, ...]:
        """KL(base || self) at each place, in nats, over the base's likeliest tokens and the rest.

        All other tokens are taken as one, so it is a lower bound of the whole divergence, and
        equal to it where the rest is negligible.
        """
        ids_NK = torch.tensor(base.top_ids, device=self.logprobs_NV.device)
        p_NK = torch.tensor(base.top_logprobs, dtype=torch.float64)
        q_NK = self.logprobs_NV.gather(1, ids_NK).double().cpu()
        found_N = (p_NK.exp() * (p_NK - q_NK)).sum(1)
        if ids_NK.shape[1] < self.logprobs_NV.shape[1]:
            # One minus a sum of exponentials would lose a small rest to rounding.
            others_NV = self.logprobs_NV.double()
            others_NV = others_NV.scatter(1, ids_NK, float("-inf"))
            p_N = (1 - p_NK.exp().sum(1)).clamp(min=0)
            q_N = others_NV.logsumexp(1).cpu()
            found_N = found_N + torch.special.xlogy(p_N, p_N) - p_N * q_N
        return tuple(found_N.clamp(min=0).tolist())
