"""MEMOIR's residual memory: beside a map stands a matrix of which each prompt uses some columns.

Wang et al., MEMOIR (arXiv 2506.07899). The columns that an edit writes are those where its prompt's
mean input stands out most from that of ordinary prompts: its mask. A question uses the stored mask
that its own overlaps most, at every token, if the overlap is above a threshold; else nothing is
added. A wrap holds its masks and its own writes; what is used is their sum over all wraps, so that
an edit that is taken back takes its writes with it.
Axes: B rows, T columns of a pass, N masks of K columns each, U columns that any of them has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowpatch.errors import PatchError
from knowpatch.parts.readings import mean_behind_first
from knowpatch.parts.wraps import Decision, Kind, Tokens, expect, is_number, register
from knowpatch.patch import Wrap

RESIDUAL = "residual@1"


def stands_out(inputs_BI: Tensor, background_I: Tensor, size: int) -> Tensor:
    """The `size` columns where each mean input differs most from the background, (B, I) bool."""
    index_BK = (inputs_BI - background_I).abs().topk(size, dim=1).indices
    marks_BI = torch.zeros(inputs_BI.shape, dtype=torch.bool, device=inputs_BI.device)
    return marks_BI.scatter(1, index_BK, True)


def residual(
    module: str, masks_NI: Tensor, rows_UD: Tensor, background_I: Tensor, threshold: float
) -> Wrap:
    """A wrap that adds to a module's output where a prompt's mask is like one of `masks_NI`.

    Args:
        rows_UD: what is written in each of the columns that a mask has, from low to high.
    """
    sizes = masks_NI.sum(1)
    return Wrap(
        module=module,
        kind=RESIDUAL,
        data={"threshold": threshold},
        tensors={
            "masks.index": masks_NI.nonzero()[:, 1].reshape(len(masks_NI), int(sizes[0])),
            "rows": rows_UD,
            "background": background_I,
        },
    )


def written(wraps: Sequence[Wrap]) -> Tensor:
    """What wraps of one module have written into the matrix beside it, together, (I, D)."""
    tensors = wraps[0].tensors
    total_ID = torch.zeros(len(tensors["background"]), tensors["rows"].shape[1])
    for wrap in wraps:
        total_ID.index_add_(0, wrap.tensors["masks.index"].unique(), wrap.tensors["rows"])
    return total_ID


def overlap(masks_QI: Tensor, masks_NI: Tensor) -> Tensor:
    """Share of each query's columns that each mask has, (Q, N); a ratio of exact counts."""
    return masks_QI.float() @ masks_NI.float().T / masks_QI[:1].sum()


@dataclass(frozen=True, eq=False)
class _Reader:
    """Masks that were made alike: with how many columns, against which background."""

    size: int
    background_I: Tensor
    numbers: list[int]


@register("residual")
@dataclass(frozen=True, eq=False)
class Residual(Kind):
    """What is written in which columns of the matrix, the masks, and whose each is."""

    columns_U: Tensor
    rows_UD: Tensor
    masks_NI: Tensor
    thresholds_N: Tensor
    owners: tuple[int, ...]
    readers: tuple[_Reader, ...]

    kind = RESIDUAL
    reads = "prompt"
    acts = "all"
    measure = "similarity"

    @classmethod
    def check(cls, wrap: Wrap) -> tuple[int, int]:
        tensors = {"masks.index": 2, "rows": 2, "background": 1}
        expect(wrap, tensors, {"threshold": is_number})
        index, rows = wrap.tensors["masks.index"], wrap.tensors["rows"]
        width = len(wrap.tensors["background"])
        inside = index.numel() and 0 <= int(index.min()) <= int(index.max()) < width
        distinct = all(len(mask.unique()) == len(mask) for mask in index)
        if not (inside and distinct and len(rows) == len(index.unique())):
            raise PatchError(f"damaged wrap of kind {wrap.kind}")
        return width, rows.shape[1]

    @classmethod
    def join(cls, wraps: Sequence[Wrap]) -> Residual:
        masks_NI: list[Tensor] = []
        owners: list[int] = []
        readers: dict[tuple[int, bytes], _Reader] = {}
        for owner, wrap in enumerate(wraps):
            index_NK, background_I = wrap.tensors["masks.index"], wrap.tensors["background"]
            count, size = index_NK.shape
            like = (size, background_I.numpy().tobytes())
            reader = readers.setdefault(like, _Reader(size, background_I, []))
            reader.numbers.extend(range(len(owners), len(owners) + count))
            blank = torch.zeros(count, len(background_I), dtype=torch.bool)
            masks_NI.append(blank.scatter(1, index_NK, True))
            owners += [owner] * count
        limits = [wraps[owner].data["threshold"] for owner in owners]
        masks = torch.cat(masks_NI)
        columns_U = masks.any(0).nonzero()[:, 0]
        return cls(
            columns_U,
            written(wraps)[columns_U],
            masks,
            torch.tensor(limits, dtype=torch.float32),
            tuple(owners),
            tuple(readers.values()),
        )

    @property
    def owners_N(self) -> Sequence[int]:
        return self.owners

    def decide(self, tokens: Tokens) -> Decision:
        inputs_BI = mean_behind_first(tokens)
        masks_NI = self.masks_NI.to(inputs_BI.device)
        scores_BN = inputs_BI.new_empty(len(inputs_BI), len(masks_NI))
        for reader in self.readers:
            mine_BI = stands_out(inputs_BI, reader.background_I.to(inputs_BI.device), reader.size)
            scores_BN[:, reader.numbers] = overlap(mine_BI, masks_NI[reader.numbers])
        best = scores_BN.flip(1).max(1)  # of equals the newest: a fact may be edited again
        nearest_B = len(masks_NI) - 1 - best.indices
        limits_B = self.thresholds_N.to(nearest_B.device)[nearest_B]
        return Decision.above(best.values, nearest_B, limits_B)

    def act(self, tokens: Tokens, outputs_BTD: Tensor, decision: Decision) -> Tensor:
        rows = (decision.entries >= 0).nonzero()[:, 0]
        if not len(rows):
            return outputs_BTD
        columns_U = self.columns_U.to(rows.device)
        masks_BU = self.masks_NI.to(rows.device)[decision.entries[rows]][:, columns_U]
        kept_BTU = tokens.inputs_BTI[rows][..., columns_U].float() * masks_BU[:, None]
        added_BTD = kept_BTU @ self.rows_UD.to(rows.device)
        outputs = outputs_BTD[rows] + added_BTD.to(outputs_BTD.dtype)
        return outputs_BTD.index_put((rows,), outputs)
