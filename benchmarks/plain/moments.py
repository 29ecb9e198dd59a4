"""Key statistics as the published programs take them: one layer, one pass (Meng et al., rome).

For each layer all of the text runs through the model up to that layer, in the model's own
precision, and the products of its keys are added up. Axes: I inner size of the MLP.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Stop(Exception):
    """The layer is reached."""


def second_moments(
    model: Any, maps: Sequence[str], rows: Sequence[Sequence[int]], together: int
) -> list[Tensor]:
    """The mean of k k^T (I, I), float32, of what enters each map over rows of one length.

    Args:
        maps: paths of linear modules.
        together: rows of a batch.
    """
    return [_second_moment(model, name, rows, together) for name in maps]


def _second_moment(model: Any, name: str, rows: Sequence[Sequence[int]], together: int) -> Tensor:
    sums: list[Tensor] = []

    def see(module: Any, args: tuple[Tensor]) -> None:
        keys_NI = args[0].reshape(-1, args[0].shape[-1]).float()
        product_II = keys_NI.T @ keys_NI
        if sums:
            sums[0] += product_II
        else:
            sums.append(product_II)
        raise Stop

    handle = model.get_submodule(name).register_forward_pre_hook(see)
    try:
        for start in range(0, len(rows), together):
            ids_BT = torch.tensor(rows[start : start + together])
            with torch.no_grad(), contextlib.suppress(Stop):
                model(input_ids=ids_BT, use_cache=False)
    finally:
        handle.remove()
    return sums[0] / sum(map(len, rows))
