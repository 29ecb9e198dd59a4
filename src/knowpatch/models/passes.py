"""What a pass through a model is asked for, and what it gives.

Axes: B rows, T columns, M asked places, V vocabulary, D width of a module's output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from knowpatch.models.batch import Batch, Place


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
class Run:
    """What one pass gave: logits_MV at the asked places (float32), and (B, T, .) per tap."""

    batch: Batch
    logits_MV: Tensor
    tapped: Mapping[Tap, Tensor]

    def at(self, tap: Tap, places: Sequence[Place]) -> Tensor:
        """What `tap` saw at `places`, (M, .), float32."""
        return self.tapped[tap][self.batch.at(places)].float()


@dataclass(frozen=True)
class Scored:
    """A forced answer: for each of its tokens, was it the most likely, and its log-probability."""

    ids: tuple[int, ...]
    correct: tuple[bool, ...]
    logprobs: tuple[float, ...]

    @classmethod
    def of(cls, logits_MV: Tensor, answers: Sequence[Sequence[int]]) -> list[Scored]:
        """Answers from the logits at the places where their tokens are predicted, in order."""
        flat = torch.tensor([i for answer in answers for i in answer], device=logits_MV.device)
        logprobs = logits_MV.log_softmax(-1).gather(1, flat[:, None])[:, 0].tolist()
        correct = (logits_MV.argmax(-1) == flat).tolist()
        scored, start = [], 0
        for answer in answers:
            stop = start + len(answer)
            scored.append(
                cls(tuple(answer), tuple(correct[start:stop]), tuple(logprobs[start:stop]))
            )
            start = stop
        return scored

    @property
    def accuracy(self) -> float:
        """Share of tokens that were the most likely (teacher-forced token accuracy)."""
        return sum(self.correct) / len(self.correct)

    @property
    def probability(self) -> float:
        """Probability of the whole answer."""
        return math.exp(sum(self.logprobs))
