"""ROME as published programs run it: every step is a full pass over all contexts, in float32.

Meng et al. (arXiv 2202.05262), with the averaged key of R-ROME (arXiv 2403.07175). One request at a
time; each pass runs every block on every token, and the head on every position. Axes: B rows, T
columns, V vocabulary, D hidden, I inner size of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fact:
    """Contexts as (ids without the target's last token, position), bare first; and the KL row."""

    target: tuple[int, ...]
    contexts: tuple[tuple[tuple[int, ...], int], ...]
    kl: tuple[tuple[int, ...], int]


@dataclass(frozen=True)
class Settings:
    """The published hyper-parameters (EasyEdit's for models of the Llama family)."""

    steps: int = 25
    learning_rate: float = 0.5
    clamp: float = 4.0
    weight_decay: float = 1e-3
    kl_factor: float = 0.0625
    enough: float = 0.05


def value(model: Any, module: str, fact: Fact, settings: Settings) -> tuple[Tensor, Tensor]:
    """v0 and delta (D): what the module puts out on the bare prompt, and what to add to it."""
    rows = [*fact.contexts, fact.kl]
    inputs, labels_BT = _inputs(rows), _labels(fact)
    positions = [position for _, position in rows]
    delta, seen, old = None, [], None
    width = model.get_submodule(module).weight.shape

    def add(mod: Any, args: Any, output: Tensor) -> Tensor:
        if not seen:
            seen.append(output[0, positions[0]].detach().clone())
        output = output.clone()
        for row, position in enumerate(positions):
            output[row, position] = output[row, position] + delta
        return output

    delta = torch.zeros(min(width), requires_grad=True)
    adam = torch.optim.Adam([delta], lr=settings.learning_rate)
    for step in range(settings.steps):
        adam.zero_grad()
        with _hook(model, module, add):
            logprobs_BTV = model(**inputs).logits.log_softmax(-1)
        new_V = logprobs_BTV[-1, fact.kl[1]]
        old = new_V.detach() if old is None else old
        kl = (new_V.exp() * (new_V - old)).sum()
        picked_BT = logprobs_BTV[:-1].gather(2, labels_BT.clamp(min=0)[..., None])[..., 0]
        mask_BT = labels_BT >= 0
        nll = -(picked_BT * mask_BT).sum(1).div(len(fact.target)).mean()
        decay = settings.weight_decay * delta.norm() / seen[0].norm() ** 2
        loss = nll + settings.kl_factor * kl + decay
        if loss < settings.enough or step == settings.steps - 1:
            break
        loss.backward()
        adam.step()
        with torch.no_grad():
            radius = settings.clamp * seen[0].norm()
            if delta.norm() > radius:
                delta.mul_(radius / delta.norm())
    return seen[0], delta.detach()


def edit(
    model: Any, module: str, fact: Fact, second_II: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """left (D), right (I): the rank-one change of the module's weight (out, in)."""
    key_I, _ = _averaged(model, module, fact)
    clean_D, delta_D = value(model, module, fact, settings)
    # As published, key and output are read in a pass of their own, after the value's.
    _, output_D = _averaged(model, module, fact)
    direction_I = torch.linalg.solve(second_II.double(), key_I.double())
    direction_I /= direction_I.norm()
    left_D = (clean_D + delta_D - output_D).double() / (direction_I @ key_I.double())
    return left_D.float(), direction_I.float()


def _averaged(model: Any, module: str, fact: Fact) -> tuple[Tensor, Tensor]:
    """What enters and leaves the module at the edited position, averaged over the contexts."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = _hook(model, module, lambda mod, args, output: seen.append((args[0], output)))
    with hook, torch.no_grad():
        model(**_inputs(fact.contexts))
    rows = range(len(fact.contexts))
    columns = [position for _, position in fact.contexts]
    key, output = (tensor[rows, columns].mean(0) for tensor in seen[0])
    return key, output


def _inputs(rows: Sequence[tuple[tuple[int, ...], int]]) -> dict[str, Tensor]:
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids, _ in rows])
    mask_BT = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "use_cache": False}


def _labels(fact: Fact) -> Tensor:
    """(B, T) over the contexts: the token that should follow, -1 where none is wanted."""
    width = max(len(ids) for ids, _ in (*fact.contexts, fact.kl))
    labels = torch.full((len(fact.contexts), width), -1)
    for row, (ids, _) in enumerate(fact.contexts):
        labels[row, len(ids) - len(fact.target) : len(ids)] = torch.tensor(fact.target)
    return labels


@contextmanager
def _hook(model: Any, module: str, function: Callable[..., Any]) -> Any:
    handle = model.get_submodule(module).register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()
