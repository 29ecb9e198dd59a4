"""Training one block to put out other states at a few tokens, and its own everywhere else.

UnKE (arXiv 2405.15349, section 3.3): all linear maps of one block, trained by AdamW on

    |out - wanted|^2, mean over the edited tokens, times importance
  + |out - out0|^2,  mean over the other tokens of the same rows
  + |out - out0|^2,  mean over the tokens of preserved texts

out0 being what the block puts out now. The published mean over all tokens leaves the few edited
ones next to no weight. What is trained is the change, from zero: decay draws it back to the model.
Passes run this block alone, on states that are computed once (models/above.py).
Axes: J places of a row, M tokens of a batch, D hidden.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from knowpatch.deltas import Address, Dense, LowRank, WeightDelta
from knowpatch.errors import EditError
from knowpatch.files import kept_in, write_atomically
from knowpatch.method import MethodConfig, Preparation
from knowpatch.models.above import Above
from knowpatch.models.batch import gathered
from knowpatch.models.passes import Ids, Tap
from knowpatch.models.view import ModelView
from knowpatch.parts.text import ROW_TOKENS, find_text, packed_rows
from knowpatch.progress import Progress, silent

TOGETHER = 4096
"""Tokens of one pass at most, padding included."""


class BlockConfig(MethodConfig):
    """Options of the methods that train a block."""

    text: str | None = Field(
        None, description="to preserve: file, folder, hub dataset, or self (the model's own)"
    )
    samples: int = Field(20, ge=1, description="texts on which the block's output is preserved")
    block_steps: int = Field(100, ge=1, description="steps of the block's training")
    block_rate: float = Field(
        5e-4, gt=0, description="of AdamW on the block, falling to zero; published: 2e-4 on 7B"
    )
    block_decay: float = Field(0.01, ge=0, description="AdamW's decay of the block's change")
    importance: float = Field(
        1.0, gt=0, description="of the edited tokens' mean error, against that of the others"
    )
    rank: int | None = Field(
        None, ge=1, description="train a low-rank change of each map; by default of full rank"
    )


@dataclass(frozen=True, eq=False)
class Moved:
    """A row of ids, and by what the block's output is to move at some positions (J, D)."""

    ids: Ids
    prompt: int
    positions: tuple[int, ...]
    deltas_JD: Tensor


def train_block(
    view: ModelView,
    layer: int,
    moved: Sequence[Moved],
    preserved: Sequence[Ids],
    config: BlockConfig,
    *,
    seed: int,
    progress: Progress = silent,
) -> list[tuple[Address, Dense | LowRank]]:
    """The changes of the linear maps of block `layer`.

    Raises:
        EditError: a loss that is not finite.
    """
    changes = _changes(view, layer, config.rank, seed)
    leaves = [leaf for change in changes.values() for leaf in change.tensors().values()]
    goals = _goals(view, layer, moved, preserved, config.importance)
    base = {name: view.values(name).float() for name in changes}
    adam = torch.optim.AdamW(leaves, lr=config.block_rate, weight_decay=config.block_decay)
    falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 1e-3, config.block_steps)
    for step in range(config.block_steps):
        progress("training the block", step, config.block_steps)
        total = [torch.zeros_like(leaf) for leaf in leaves]
        for goal in goals:
            whole = {
                name: WeightDelta(Address(parameter=name), change).added_to(base[name])
                for name, change in changes.items()
            }
            loss = goal.loss(whole)
            if not bool(torch.isfinite(loss)):
                raise EditError(
                    f"the loss is not finite at step {step} of {config.block_steps}: use a smaller "
                    "block_rate, or load the model in float32"
                )
            grads = torch.autograd.grad(loss, leaves)
            total = [one + other for one, other in zip(total, grads, strict=True)]
        for leaf, grad in zip(leaves, total, strict=True):
            leaf.grad = grad
        adam.step()
        falling.step()
    progress("training the block", config.block_steps, config.block_steps)
    return [(Address(parameter=name), _detached(change)) for name, change in changes.items()]


def _changes(
    view: ModelView, layer: int, rank: int | None, seed: int
) -> Mapping[str, Dense | LowRank]:
    """A change of each matrix of a block, nothing so far, as leaves; norms and biases have none."""
    begins = f"{view.roles.blocks[layer].module}."
    drawn = torch.Generator().manual_seed(seed)
    changes: dict[str, Dense | LowRank] = {}
    for name, parameter in view.model.named_parameters():
        if not name.startswith(begins) or parameter.ndim != 2:
            continue
        rows, columns = parameter.shape
        leaf = torch.zeros(rows, columns if rank is None else rank, device=view.device)
        leaf.requires_grad_()
        if rank is None:
            changes[name] = Dense(leaf)
        else:
            noise = torch.randn(rank, columns, generator=drawn) / columns**0.5
            right = noise.to(view.device).clone()
            right.requires_grad_()
            changes[name] = LowRank(leaf, right)
    return changes


def _detached(change: Dense | LowRank) -> Dense | LowRank:
    tensors = {name: leaf.detach().cpu() for name, leaf in change.tensors().items()}
    return type(change)(**tensors)


@dataclass(frozen=True, eq=False)
class _Goal:
    """A batch of rows, what the block is to put out at each token, and the tokens' weights."""

    above: Above
    rows: list[int]
    tap: Tap
    places: list[tuple[int, int]]
    wanted_MD: Tensor
    weight_M: Tensor

    def loss(self, weights: Mapping[str, Tensor]) -> Tensor:
        run = self.above.run(self.rows, weights=weights, taps=[self.tap])
        error_MD = run.at(self.tap, self.places) - self.wanted_MD
        return (error_MD.square().mean(1) * self.weight_M).sum()


def _goals(
    view: ModelView,
    layer: int,
    moved: Sequence[Moved],
    preserved: Sequence[Ids],
    importance: float,
) -> list[_Goal]:
    """All rows in batches."""
    rows = [*(one.ids for one in moved), *preserved]
    prompts = [one.prompt for one in moved] + [len(ids) for ids in preserved]
    above = Above(view, layer, rows, prompts=prompts)
    tap = Tap(view.roles.blocks[layer].module, "output")
    edited = sum(len(one.positions) for one in moved)
    others = sum(len(one.ids) for one in moved) - edited
    kept = sum(map(len, preserved))
    goals = []
    for numbers in gathered([len(row) for row in rows], TOGETHER):
        places = [(row, at) for row, n in enumerate(numbers) for at in range(len(rows[n]))]
        wanted_MD = above.run(numbers, taps=[tap]).at(tap, places).detach()
        weights, start = [], 0
        for n in numbers:
            weights += [1 / (others if n < len(moved) else kept)] * len(rows[n])
            for at, delta_D in zip(*_moves(moved, n), strict=True):
                wanted_MD = wanted_MD.index_add(
                    0, torch.tensor([start + at], device=view.device), delta_D[None].to(wanted_MD)
                )
                weights[start + at] = importance / edited
            start += len(rows[n])
        weight_M = torch.tensor(weights, device=view.device)
        goals.append(_Goal(above, numbers, tap, places, wanted_MD, weight_M))
    return goals


def _moves(moved: Sequence[Moved], number: int) -> tuple[Sequence[int], Any]:
    """Where and by what the output of a row moves."""
    if number >= len(moved):
        return (), ()
    return moved[number].positions, moved[number].deltas_JD


# -- what is preserved -----------------------------------------------------------------------------


def preserved_at(fingerprint: str, config: BlockConfig, seed: int) -> Path:
    """The file that the preserved rows of a model are kept in."""
    digest = find_text(config.text).digest
    content = json.dumps([1, fingerprint, digest, config.samples, config.chat, seed])
    return kept_in("preserved", content, ".json")


def preserved_rows(
    view: ModelView, config: BlockConfig, *, seed: int, progress: Progress = silent
) -> list[Ids]:
    """Text on which a block's output is to stay as it is; in a chat, as the user's turns."""
    path = preserved_at(view.fingerprint, config, seed)
    with contextlib.suppress(OSError, ValueError):
        return [tuple(row) for row in json.loads(path.read_text())]
    text = find_text(config.text)
    rows = packed_rows(view, text, config.samples * ROW_TOKENS, seed=seed, progress=progress)
    if config.chat:
        rows = [view.encode(view.decode(row), chat=True).ids for row in rows]
    write_atomically(path, json.dumps(rows).encode())
    return rows


def preserved_item(fingerprint: str, config: BlockConfig, seed: int) -> Preparation:
    """What making them costs."""
    path = preserved_at(fingerprint, config, seed)
    return Preparation("preserved text", path, config.samples * ROW_TOKENS)
