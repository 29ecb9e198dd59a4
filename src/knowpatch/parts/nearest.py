"""The nearest keys, exactly: a shortlist in low precision, measured again in float32.

One product with all keys in bfloat16 reads half of what float32 would, and tells every distance up
to a known error. Whatever may be among the nearest by that is measured pair by pair, directly and
not through a matrix product: so a query finds what a plain search finds, and the same whatever
queries are beside it. Axes: N keys, Q queries, I size of a key, K wanted, P pairs.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from knowpatch.models.load import fast_dtype

SLACK = 2**-6
"""Bound of the error of a product in bfloat16, in |q| |k|: both factors and the sum are rounded."""
FEW = 64
"""Keys up to which there is no shortlist."""
HELD = 1 << 24
"""Numbers that are worked on at once."""


class Index:
    """Keys that are searched for the nearest.

    Args:
        keys_NI: float32.
    """

    def __init__(self, keys_NI: Tensor) -> None:
        self.keys_NI = keys_NI

    def to(self, device: torch.device) -> Index:
        return self if self.keys_NI.device == device else Index(self.keys_NI.to(device))

    @cached_property
    def _short_NI(self) -> Tensor:
        return self.keys_NI.to(fast_dtype(self.keys_NI.device) or torch.float32)

    @cached_property
    def _squares_N(self) -> Tensor:
        return self.keys_NI.square().sum(1)

    def nearest(
        self, queries_QI: Tensor, count: int = 1, among: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Distances (Q, K) and numbers (Q, K) of the nearest keys; of equals the lower number.

        Args:
            queries_QI: what is looked for.
            count: how many are wanted; K is less where there are fewer keys.
            among: the only keys that are searched.
        """
        first, last, _ = among.indices(len(self.keys_NI))
        chunk = max(1, HELD // max(1, last - first))
        found = [
            self._search(part_QI, min(count, last - first), first, last)
            for part_QI in queries_QI.float().split(chunk)
        ]
        distances, numbers = zip(*found, strict=True)
        return torch.cat(distances), torch.cat(numbers)

    def _search(
        self, queries_QI: Tensor, count: int, first: int, last: int
    ) -> tuple[Tensor, Tensor]:
        keys_NI = self.keys_NI[first:last]
        kept_QN = self._shortlist(queries_QI, count, first, last)
        rows_P, numbers_P = kept_QN.nonzero(as_tuple=True)
        step = max(1, HELD // keys_NI.shape[1])
        gaps_P = torch.cat(
            [
                _gaps(queries_QI[rows], keys_NI[mine])
                for rows, mine in zip(rows_P.split(step), numbers_P.split(step), strict=True)
            ]
        )
        # Stable, so that of equals the lower number comes first; then row by row.
        order_P = gaps_P.argsort(stable=True)
        order_P = order_P[rows_P[order_P].argsort(stable=True)]
        starts_Q = kept_QN.sum(1).cumsum(0) - kept_QN.sum(1)
        wanted_QK = order_P[starts_Q[:, None] + torch.arange(count, device=order_P.device)]
        return gaps_P[wanted_QK], numbers_P[wanted_QK] + first

    def _shortlist(self, queries_QI: Tensor, count: int, first: int, last: int) -> Tensor:
        """Which keys may be among the nearest (Q, N); at least `count` for each query."""
        if last - first <= max(FEW, count):
            return queries_QI.new_ones(len(queries_QI), last - first, dtype=torch.bool)
        short_NI, squares_N = self._short_NI[first:last], self._squares_N[first:last]
        products_QN = (queries_QI.to(short_NI.dtype) @ short_NI.T).float()
        apart_QN = torch.add(squares_N, products_QN, alpha=-2)
        if count == 1:
            limits_Q1 = apart_QN.amin(1, keepdim=True)
        else:
            limits_Q1 = apart_QN.topk(count, largest=False).values[:, -1:]
        reach_Q1 = 4 * SLACK * queries_QI.norm(dim=1, keepdim=True) * squares_N.max().sqrt()
        # What is not a number is near to everything, and found as that.
        far_QN: Tensor = apart_QN > limits_Q1 + reach_Q1
        return ~far_QN


def _gaps(queries_PI: Tensor, keys_PI: Tensor) -> Tensor:
    """The distance of each query to its key."""
    apart_P11: Tensor = torch.cdist(
        queries_PI[:, None], keys_PI[:, None], compute_mode="donot_use_mm_for_euclid_dist"
    )
    return apart_P11.reshape(-1)
