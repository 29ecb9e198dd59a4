"""What a model says of facts now: their keys at a map, and what modules put out beside them.

Axes: C contexts, I inner size of the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowpatch.models.passes import Tap
from knowpatch.models.view import ModelView
from knowpatch.parts.tasks import ValueTask

READ_TOKENS = 2048
"""Tokens read in one pass for keys."""


@dataclass(frozen=True, eq=False)
class Fact:
    """What a model says of a fact now: keys (C, I) of the map, and outputs of tapped modules."""

    keys_CI: Tensor
    outputs: Mapping[Tap, Tensor]

    @property
    def bare_I(self) -> Tensor:
        return self.keys_CI[0]

    @property
    def grouped_I(self) -> Tensor:
        """Half of the bare prompt's key, half of the other contexts' mean (MEMIT)."""
        return torch.stack(self.both()).mean(0)

    def both(self) -> tuple[Tensor, ...]:
        """The bare prompt's key and the other contexts' mean (I each)."""
        if len(self.keys_CI) == 1:
            return (self.keys_CI[0],)
        return self.keys_CI[0], self.keys_CI[1:].mean(0)


def read(
    view: ModelView, module: str, tasks: Sequence[ValueTask], taps: Sequence[Tap] = ()
) -> list[Fact]:
    """Each fact's keys, which enter `module`, and what `taps` see at the same places, float64."""
    key = Tap(module, "input")
    wanted = [key, *taps]
    facts: list[Fact] = []
    for batch in _batches(tasks):
        # What follows the subject does not change its key.
        rows = [row for task in batch for row in task.contexts]
        run = view.run([row.ids[: row.position + 1] for row in rows], taps=wanted)
        places = [(i, row.position) for i, row in enumerate(rows)]
        seen = {tap: run.at(tap, places).cpu().double() for tap in wanted}
        start = 0
        for task in batch:
            stop = start + len(task.contexts)
            mine = {tap: tensor[start:stop] for tap, tensor in seen.items()}
            facts.append(Fact(mine.pop(key), mine))
            start = stop
    return facts


def _batches(tasks: Sequence[ValueTask]) -> list[list[ValueTask]]:
    """Tasks that are read in one pass, in their order."""
    batches: list[list[ValueTask]] = []
    rows = longest = 0
    for task in tasks:
        rows += len(task.contexts)
        longest = max(longest, *(row.position + 1 for row in task.contexts))
        if not batches or rows * longest > READ_TOKENS:
            batches.append([])
            rows, longest = len(task.contexts), max(row.position + 1 for row in task.contexts)
        batches[-1].append(task)
    return batches
