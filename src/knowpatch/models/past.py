"""Past: rows of tokens that a model has read, to be read on from.

What the attention of each block keeps of a token (its key and value) does not depend on what
follows, so a beginning that several rows share is read once. Padding may stand anywhere between
the pieces; the mask says where, and positions are counted without it.
Axes: B rows, P columns read so far, T columns of the next piece.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from knowpatch.models.batch import Batch

LARGEST = 256
"""Rows at most that are held to share one beginning: what more would save is nothing."""


@dataclass(frozen=True)
class Past:
    """Rows read so far: a transformers cache (None before the first piece), and the mask."""

    cache: Any
    mask_BP: Tensor

    @classmethod
    def nothing(cls, rows: int, device: torch.device) -> Past:
        return cls(None, torch.zeros(rows, 0, dtype=torch.long, device=device))

    @property
    def columns(self) -> int:
        return int(self.mask_BP.shape[1])

    def pick(self, rows: Sequence[int]) -> Past:
        """The past of each of `rows`, which may repeat; what was picked from is used up."""
        index = torch.tensor(rows, dtype=torch.long, device=self.mask_BP.device)
        if self.cache is not None:
            self.cache.batch_select_indices(index)
        return Past(self.cache, self.mask_BP[index])

    def inputs(self, piece: Batch) -> dict[str, Any]:
        """Keyword arguments for a model that reads `piece` on top of this past."""
        seen_B1 = self.mask_BP.sum(1, keepdim=True)
        positions = (seen_B1 + piece.mask_BT.cumsum(1) - 1).clamp(min=0)
        inputs = {
            "input_ids": piece.ids_BT,
            "attention_mask": torch.cat([self.mask_BP, piece.mask_BT], dim=1),
            "position_ids": positions,
        }
        return inputs if self.cache is None else {**inputs, "past_key_values": self.cache}

    def read(self, forward: Callable[..., Any], rows: Sequence[Sequence[int]]) -> Past:
        """The past after one more piece of each row (which may be empty).

        `forward` runs the model, its head excepted, on keyword arguments.
        """
        if not any(rows):
            return self
        piece = Batch.of(rows, pad=0, side="right", device=self.mask_BP.device)
        with torch.no_grad():
            out = forward(**self.inputs(piece), use_cache=True)
        return Past(out.past_key_values, torch.cat([self.mask_BP, piece.mask_BT], dim=1))

    def freeze(self) -> None:
        """From now on a pass on top of this past leaves it as it is."""
        for layer in self.cache.layers if self.cache is not None else ():
            layer.update = _joined(weakref.proxy(layer))  # a plain one would keep itself


def _joined(layer: Any) -> Any:
    def update(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([layer.keys, keys], dim=-2), torch.cat([layer.values, values], dim=-2)

    return update


def read_shared(
    forward: Callable[..., Any], rows: Sequence[Sequence[int]], device: torch.device
) -> Past:
    """The past of `rows`, where beginnings that several rows share are read once."""
    heads = shared_beginnings([tuple(row) for row in rows])
    first = list(dict.fromkeys(heads))
    past = Past.nothing(len(first), device).read(forward, first)
    past = past.pick([first.index(head) for head in heads])
    return past.read(forward, [row[len(head) :] for row, head in zip(rows, heads, strict=True)])


def shared_beginnings(rows: Sequence[tuple[int, ...]], least: int = 1) -> list[tuple[int, ...]]:
    """For each row the beginning that it shares with its like; () where sharing saves nothing.

    Rows are taken in lexicographic order and cut into groups of neighbours, so that what all groups
    save together, (rows - 1) * shared tokens each, is most.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i])
    shared = [_common(rows[i], rows[j]) for i, j in pairwise(order)]
    best = [0] * (len(rows) + 1)  # saved by the first n rows in order
    cut = list(range(-1, len(rows)))  # where the last group of the first n rows begins
    for stop in range(1, len(rows) + 1):
        best[stop], common = best[stop - 1], None
        for start in range(stop - 2, max(stop - LARGEST, 0) - 1, -1):
            common = shared[start] if common is None else min(common, shared[start])
            if common < least:
                break
            saved = best[start] + (stop - start - 1) * common
            if saved > best[stop]:
                best[stop], cut[stop] = saved, start
    heads: list[tuple[int, ...]] = [()] * len(rows)
    stop = len(rows)
    while stop > 0:
        members = order[cut[stop] : stop]
        length = min((shared[i] for i in range(cut[stop], stop - 1)), default=0)
        for i in members:
            heads[i] = rows[i][:length]
        stop = cut[stop]
    return heads


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
