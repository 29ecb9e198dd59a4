"""Scoring as published programs do it: each metric its own calls, one question a pass, all logits.

KnowEdit (arXiv 2401.01286): prompt and answer as one text, one forward pass each; the unedited and
the edited model are asked anew for every metric. Of several accepted answers the best counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

Model = Callable[[Tensor], Tensor]
"""Token ids (1, T) to logits (1, T, V)."""


class PlainScorer:
    """The teacher-forced metrics of one case, one call after the other."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def forced(self, model: Model, prompt: str, answer: str) -> tuple[Tensor, Tensor]:
        """The answer's ids (N), and the logits (N, V) at the places that predict them."""
        space = "" if prompt[-1].isspace() or answer[0] in ".,;:!?)" else " "
        encoded = self.tokenizer(prompt + space + answer, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"]]
        first = next(i for i, end in enumerate(ends) if end > len(prompt))
        ids = torch.tensor([encoded["input_ids"]])
        with torch.no_grad():
            logits = model(ids)
        return ids[0, first:], logits[0, first - 1 : -1]

    def accuracy(self, model: Model, prompt: str, answers: Sequence[str], *, exact: bool) -> float:
        """Share of an answer's tokens that lead (all or nothing if `exact`), of the best answer."""
        found = []
        for answer in answers:
            ids, logits = self.forced(model, prompt, answer)
            right = logits.argmax(-1) == ids
            found.append(float(right.all()) if exact else float(right.double().mean()))
        return max(found)


def same(old: Tensor, new: Tensor) -> float:
    """Share of an answer's places where both models' likeliest token is the same."""
    return float((old.argmax(-1) == new.argmax(-1)).double().mean())


def divergence(old: Tensor, new: Tensor) -> float:
    """Mean KL divergence at an answer's places, in nats."""
    p, q = old.double().log_softmax(-1), new.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def macro(groups: Sequence[Sequence[float | None]]) -> float | None:
    """Questions to their sub-kind's mean, those to the record's."""
    filled = [[value for value in group if value is not None] for group in groups]
    means = [fmean(group) for group in filled if group]
    return fmean(means) if means else None
