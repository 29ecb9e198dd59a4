"""MEMIT as published programs run it: full passes, one request at a time, a dense solve per layer.

Meng et al. (arXiv 2210.07229, section 4). The target of a request is a state of the residual stream
behind the last edited block; each edited layer, from low to high, takes its share of what is still
missing. Every pass runs all blocks on all tokens, and the head on every position. Axes: B rows, T
columns, N facts, D hidden, I inner size of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plain import rome
from plain.rome import Fact

Change = Callable[[int, Tensor, Tensor], Tensor]
"""Number of the layer, keys (I, N) and residuals (D, N) to the change (D, I)."""
TOGETHER = 128
"""Rows of one pass in which keys or states are read."""


VALUE = rome.Settings(25, 0.5, 0.75, 0.5, 0.0625, 0.05)
"""The published settings of the targets' optimisation, for models of the Llama family."""


@dataclass(frozen=True)
class Settings:
    """The published hyper-parameters for models of the Llama family.

    Attributes:
        keep: lambda, the weight of the statistics (15,000, at I = 14,336).
        value: of the targets' optimisation.
    """

    keep: float
    value: rome.Settings = VALUE


def edit(
    model: Any,
    block: str,
    maps: Sequence[str],
    facts: Sequence[Fact],
    seconds_II: Sequence[Tensor],
    settings: Settings,
) -> list[Tensor]:
    """The change (D, I) of each map's weight; the model is given back as it was.

    Args:
        model: a causal language model.
        block: path of the last edited decoder block.
        maps: paths of the edited MLP output maps, from low to high; the last one is in `block`.
        facts: to be written, as one batch.
        seconds_II: the second moment of each map's keys over text.
        settings: hyper-parameters.
    """
    targets_DN = targets(model, block, facts, settings.value)

    def change(layer: int, keys_IN: Tensor, residuals_DN: Tensor) -> Tensor:
        return closed_form(keys_IN, residuals_DN, seconds_II[layer], settings.keep)

    with restored(model, maps):
        return spread(model, block, maps, facts, targets_DN, change)


def targets(model: Any, block: str, facts: Sequence[Fact], settings: rome.Settings) -> Tensor:
    """Z (D, N): what the block should put out at each subject's last token; one after the other."""
    values = [rome.value(model, block, fact, settings) for fact in facts]
    return torch.stack([clean_D + delta_D for clean_D, delta_D in values], dim=1)


def closed_form(keys_IN: Tensor, residuals_DN: Tensor, second_II: Tensor, keep: float) -> Tensor:
    """R K^T (lambda C0 + K K^T)^-1 (D, I): equation 14, by a general solve in float64."""
    keys = keys_IN.double()
    adjusted_IN = torch.linalg.solve(keep * second_II.double() + keys @ keys.T, keys)
    delta_DI: Tensor = residuals_DN.double() @ adjusted_IN.T
    return delta_DI


def spread(
    model: Any,
    block: str,
    maps: Sequence[str],
    facts: Sequence[Fact],
    targets_DN: Tensor,
    change: Change,
) -> list[Tensor]:
    """Write layer by layer, each 1 / (layers left) of what is missing; the changes (D, I)."""
    changes = []
    for layer, path in enumerate(maps):
        keys_IN = keys(model, path, facts)
        missing_DN = targets_DN - states(model, block, facts)
        delta_DI = change(layer, keys_IN, missing_DN / (len(maps) - layer))
        with torch.no_grad():
            weight(model, path).add_(delta_DI)
        changes.append(delta_DI)
    return changes


def keys(model: Any, path: str, facts: Sequence[Fact]) -> Tensor:
    """K (I, N): what enters the map, half the bare prompt's and half the mean behind prefixes."""
    read_BI = _read(model, path, [row for fact in facts for row in fact.contexts], inward=True)
    found = []
    for rows_CI in read_BI.split([len(fact.contexts) for fact in facts]):
        groups = [rows_CI[:1], rows_CI[1:]]
        found.append(torch.stack([group.mean(0) for group in groups if len(group)]).mean(0))
    return torch.stack(found, dim=1)


def states(model: Any, block: str, facts: Sequence[Fact]) -> Tensor:
    """H (D, N): what the block puts out on the bare prompts, at each subject's last token."""
    return _read(model, block, [fact.contexts[0] for fact in facts], inward=False).T


def weight(model: Any, path: str) -> Tensor:
    """The map's weight as (D, I), a view: all but nn.Linear store it the other way round."""
    module = model.get_submodule(path)
    stored: Tensor = module.weight
    return stored if isinstance(module, nn.Linear) else stored.T


@contextmanager
def restored(model: Any, maps: Sequence[str]) -> Iterator[None]:
    """The weights of these maps are afterwards what they were."""
    kept = [weight(model, path).detach().clone() for path in maps]
    try:
        yield
    finally:
        with torch.no_grad():
            for path, old in zip(maps, kept, strict=True):
                weight(model, path).copy_(old)


def _read(
    model: Any, module: str, rows: Sequence[tuple[tuple[int, ...], int]], *, inward: bool
) -> Tensor:
    """What enters or leaves the module at each row's position, (B, I) or (B, D); whole passes."""
    found = []
    for start in range(0, len(rows), TOGETHER):
        lot = rows[start : start + TOGETHER]
        seen: list[Tensor] = []

        def see(mod: Any, args: Any, output: Any, seen: list[Tensor] = seen) -> None:
            seen.append(args[0] if inward else rome.tensor_of(output))

        with rome.hooked(model, module, see), torch.no_grad():
            model(**rome.inputs(lot))
        found.append(seen[0][range(len(lot)), [position for _, position in lot]])
    return torch.cat(found)
