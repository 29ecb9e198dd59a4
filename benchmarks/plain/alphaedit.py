"""AlphaEdit as published programs run it: MEMIT's targets and keys, changes in a null space.

Fang et al. (arXiv 2410.02355). The projector is dense, and each layer is solved for by a general
solve in float32. Axes: N facts, D hidden, I inner size of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plain import memit, rome
from plain.rome import Fact


@dataclass(frozen=True)
class Settings:
    """The published hyper-parameters for models of the Llama family.

    Attributes:
        ridge: L2, the weight of the change's own size.
        value: of the targets' optimisation (Llama-3-8B's has a learning rate of 0.1).
    """

    ridge: float = 10.0
    value: rome.Settings = memit.VALUE


def edit(
    model: Any,
    block: str,
    maps: Sequence[str],
    facts: Sequence[Fact],
    projectors_II: Sequence[Tensor],
    settings: Settings,
    earlier_II: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The change (D, I) of each map's weight, and the sums of k k^T (I, I) with these facts' keys.

    The model is given back as it was. As published, the keys that are kept are read anew when all
    layers are written.

    Args:
        model, block, maps, facts: as for `memit.edit`.
        projectors_II: P of each map.
        settings: hyper-parameters.
        earlier_II: Cp of each map, the sum of k k^T over the keys of earlier edits.
    """
    earlier = earlier_II or [torch.zeros_like(projector_II) for projector_II in projectors_II]
    targets_DN = memit.targets(model, block, facts, settings.value)

    def change(layer: int, keys_IN: Tensor, residuals_DN: Tensor) -> Tensor:
        return closed_form(
            keys_IN, residuals_DN, projectors_II[layer], earlier[layer], settings.ridge
        )

    with memit.restored(model, maps):
        changes = memit.spread(model, block, maps, facts, targets_DN, change)
        keys_LIN = [memit.keys(model, path, facts) for path in maps]
    kept = [old_II + keys @ keys.T for old_II, keys in zip(earlier, keys_LIN, strict=True)]
    return changes, kept


def projector(second_II: Tensor, threshold: float = 2e-2) -> Tensor:
    """P (I, I), float32: onto the directions of C0 with a singular value below `threshold`."""
    left_II, sizes_I, _ = torch.linalg.svd(second_II.float())
    null_IJ = left_II[:, sizes_I < threshold]
    found: Tensor = null_IJ @ null_IJ.T
    return found


def closed_form(
    keys_IN: Tensor, residuals_DN: Tensor, projector_II: Tensor, earlier_II: Tensor, ridge: float
) -> Tensor:
    """R K^T P [(K K^T + Cp) P + L2 I]^-1 (D, I), in the projector's dtype.

    Solved as published, transposed and with D right-hand sides:
    [P (K K^T + Cp) + L2 I] X = P K R^T.
    """
    keys, residuals = keys_IN.to(projector_II), residuals_DN.to(projector_II)
    eye_II = torch.eye(len(projector_II), dtype=projector_II.dtype)
    system_II = projector_II @ (keys @ keys.T + earlier_II) + ridge * eye_II
    found: Tensor = torch.linalg.solve(system_II, projector_II @ keys @ residuals.T).T
    return found
