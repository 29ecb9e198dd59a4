"""FT-M and the floor of gradient methods as published programs run them.

FT-M (arXiv 2401.01286): one request at a time, the whole model forward, logits at every place, the
cross-entropy on the answer's tokens, Adam on one matrix. Axes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """How one matrix is trained."""

    steps: int = 25
    learning_rate: float = 5e-4
    enough: float = 1e-2


Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt and answer, as ids."""


def loss(model: Any, pairs: Sequence[Pair]) -> Tensor:
    """Mean over each answer's tokens and then over answers; padded on the right."""
    rows = [(*prompt, *answer) for prompt, answer in pairs]
    width = max(map(len, rows))
    ids = torch.tensor([(*row, *[0] * (width - len(row))) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    each = []
    for number, (prompt, answer) in enumerate(pairs):
        stop = len(prompt) + len(answer)
        at = logits[number, len(prompt) - 1 : stop - 1].float()
        each.append(torch.nn.functional.cross_entropy(at, torch.tensor(answer)))
    return torch.stack(each).mean()


def train(model: Any, name: str, pair: Pair, settings: Settings) -> Tensor:
    """The change of the parameter `name` after training on one pair; the model as it was."""
    parameter = model.get_parameter(name)
    before = parameter.detach().clone()
    required = [(other, other.requires_grad) for other in model.parameters()]
    for other, _ in required:
        other.requires_grad_(requires_grad=other is parameter)
    adam = torch.optim.Adam([parameter], lr=settings.learning_rate)
    for _ in range(settings.steps):
        adam.zero_grad()
        found = loss(model, [pair])
        if float(found.detach()) < settings.enough:
            break
        found.backward()
        adam.step()
    change = parameter.detach() - before
    with torch.no_grad():
        parameter.copy_(before)
    parameter.grad = None
    for other, was in required:
        other.requires_grad_(requires_grad=was)
    return change


def once(model: Any, names: Sequence[str], pairs: Sequence[Pair], size: int) -> None:
    """One forward and one backward pass to the weights `names`, `size` pairs at a time."""
    wanted = set(names)
    required = [(other, other.requires_grad) for other in model.parameters()]
    for name, other in model.named_parameters():
        other.requires_grad_(requires_grad=name in wanted)
    for start in range(0, len(pairs), size):
        loss(model, pairs[start : start + size]).backward()
    for other, was in required:
        other.grad = None
        other.requires_grad_(requires_grad=was)
