"""Asking behind a long context as published programs do it: every question a pass of its own.

IKE (arXiv 2305.12740), and its port in EasyEdit: the demonstrations are put in front of each
question anew, and context, question and answer are read as one text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Model = Callable[[Tensor], Tensor]
"""Token ids (1, T) to logits (1, T, V)."""


def scored(model: Model, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    """Log-probabilities of an answer's tokens behind a prompt, both as ids."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logprobs = model(ids)[0].float().log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return [float(logprobs[place, token]) for place, token in zip(places, answer, strict=True)]
