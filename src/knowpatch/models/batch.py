"""Rows of token ids as one padded batch.

Positions are always given as (row, index in the unpadded row); only this file knows the padding.
Axes: B rows, T columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Side = Literal["left", "right"]
Place = tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """Padded rows.

    Attributes:
        ids_BT: token ids.
        mask_BT: 1 where a token is, 0 where padding is.
        starts: the column of each row's first token.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    starts: tuple[int, ...]

    @classmethod
    def of(
        cls, rows: Sequence[Sequence[int]], *, pad: int, side: Side, device: torch.device
    ) -> Batch:
        """Pad `rows` to one length on `side`."""
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), pad, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        starts = tuple(width - len(row) if side == "left" else 0 for row in rows)
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            ids[i, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
            mask[i, start : start + len(row)] = 1
        return cls(ids.to(device), mask.to(device), starts)

    def at(self, places: Sequence[Place]) -> tuple[Tensor, Tensor]:
        """Rows and columns of unpadded places, for indexing a (B, T, ...) tensor."""
        rows = torch.tensor([row for row, _ in places], dtype=torch.long)
        columns = torch.tensor([self.starts[row] + i for row, i in places], dtype=torch.long)
        return rows.to(self.ids_BT.device), columns.to(self.ids_BT.device)

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments for a model; positions count from each row's first token."""
        inputs = {"input_ids": self.ids_BT, "attention_mask": self.mask_BT}
        if any(self.starts):
            inputs["position_ids"] = (self.mask_BT.cumsum(-1) - 1).clamp(min=0)
        return inputs

    def pick(self, rows: Sequence[int]) -> Batch:
        """These of the rows, padded on the right, no wider than they need."""
        index = torch.tensor(rows, dtype=torch.long, device=self.mask_BT.device)
        width = int(self.mask_BT[index].sum(1).max())
        return Batch(self.ids_BT[index, :width], self.mask_BT[index, :width], (0,) * len(rows))


def gathered(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Numbers of rows that run together: like lengths, `most` tokens at most, padding included."""
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not groups or (len(groups[-1]) + 1) * lengths[number] > most:
            groups.append([])
        groups[-1].append(number)
    return groups


def last_columns(ids_BT: Tensor, mask_BT: Tensor | None) -> list[int]:
    """The column of each row's last token."""
    columns_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand(ids_BT.shape)
    lasts_B = (columns_BT if mask_BT is None else columns_BT * mask_BT.bool()).max(dim=1).values
    return list(map(int, lasts_B))
