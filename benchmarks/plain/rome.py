"""ROME as published programs run it: every step is a full pass over all contexts, in float32.

Meng et al. (arXiv 2202.05262), with the averaged key of R-ROME (arXiv 2403.07175). One request at a
time; each pass runs every block on every token, and the head on every position. Axes: B rows, T
columns, V vocabulary, D hidden, I inner size of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    given, labels_BT = inputs(rows), labels(fact)
    positions = [position for _, position in rows]
    seen: list[Tensor] = []
    old = None

    def see(mod: Any, args: Any, output: Any) -> None:
        seen.append(tensor_of(output)[0, positions[0]].detach().clone())

    delta = torch.zeros(model.config.hidden_size, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=settings.learning_rate)
    for step in range(settings.steps):
        adam.zero_grad()
        with hooked(model, module, see), shifted(model, module, positions, delta):
            logprobs_BTV = model(**given).logits.log_softmax(-1)
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
    hook = hooked(model, module, lambda mod, args, output: seen.append((args[0], output)))
    with hook, torch.no_grad():
        model(**inputs(fact.contexts))
    rows = range(len(fact.contexts))
    columns = [position for _, position in fact.contexts]
    key, output = (tensor[rows, columns].mean(0) for tensor in seen[0])
    return key, output


def inputs(rows: Sequence[tuple[tuple[int, ...], int]]) -> dict[str, Any]:
    """Rows of (ids, position) padded on the right: ids and mask (B, T)."""
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids, _ in rows])
    mask_BT = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "use_cache": False}


def labels(fact: Fact) -> Tensor:
    """(B, T) over the contexts: the token that should follow, -1 where none is wanted."""
    width = max(len(ids) for ids, _ in (*fact.contexts, fact.kl))
    wanted_BT = torch.full((len(fact.contexts), width), -1)
    for row, (ids, _) in enumerate(fact.contexts):
        wanted_BT[row, len(ids) - len(fact.target) : len(ids)] = torch.tensor(fact.target)
    return wanted_BT


def tensor_of(output: Any) -> Tensor:
    """Hidden states (B, T, D): what a decoder block puts out, or the first part of a tuple."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


@contextmanager
def shifted(model: Any, module: str, positions: Sequence[int], delta_D: Tensor) -> Iterator[None]:
    """Adds delta to the module's output, at one position of each row."""

    def add(mod: Any, args: Any, output: Any) -> Any:
        hidden_BTD = tensor_of(output).clone()
        for row, position in enumerate(positions):
            hidden_BTD[row, position] = hidden_BTD[row, position] + delta_D
        return (hidden_BTD, *output[1:]) if isinstance(output, tuple) else hidden_BTD

    with hooked(model, module, add):
        yield


@contextmanager
def hooked(model: Any, module: str, function: Callable[..., Any]) -> Iterator[None]:
    """A forward hook on the module at that path."""
    handle = model.get_submodule(module).register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()
