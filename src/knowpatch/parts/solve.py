"""Closed-form updates of a linear map, in factored form.

W (D, I) acts as y = W k. Solves are in float64 by Cholesky; nothing is ever inverted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from knowpatch.errors import EditError

LEAST_COSINE = 0.05
"""Below this cosine between direction and key the update would be amplified beyond use."""

LARGEST_COSINE = 0.9
"""Above this cosine two keys are too near to be solved for at once."""


def ridged(second_II: Tensor, ridge: float) -> Tensor:
    """A second moment plus `ridge` times the median of its diagonal.

    The median, since the attention sink at the first position makes a few entries huge.
    """
    size = second_II.diagonal().median()
    return second_II + ridge * size * torch.eye(len(second_II), dtype=second_II.dtype)


def cholesky(matrix_II: Tensor) -> Tensor:
    """The lower Cholesky factor in float64; adds the least jitter that makes one exist."""
    symmetric = (matrix_II + matrix_II.T).double() / 2
    scale = symmetric.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    eye = torch.eye(len(symmetric), dtype=torch.float64)
    jitter = 0.0
    while jitter < 1:
        factor, failed = torch.linalg.cholesky_ex(symmetric + jitter * scale * eye)
        if not bool(failed):
            found: Tensor = factor
            return found
        jitter = jitter * 10 or 1e-10
    raise EditError("key statistics are not positive definite; collect more tokens or add a ridge")


def least_change(
    residuals_DN: Tensor, keys_IN: Tensor, factor_II: Tensor | None
) -> tuple[Tensor, Tensor]:
    """left (D, N), right (N, I), float64: the least change that adds each residual at its key.

    R (K^T C^-1 K)^-1 (C^-1 K)^T with C given by its Cholesky factor (None: the identity). For one
    key this is ROME's equation 2; for several, the exact form of EMMET (arXiv 2403.14236).
    """
    keys = keys_IN.double()
    directions = keys if factor_II is None else torch.cholesky_solve(keys, factor_II)
    directions = directions / directions.norm(dim=0)
    left: Tensor = torch.linalg.solve(directions.T @ keys, residuals_DN.double(), left=False)
    return left, directions.T


def gain(at_I: Tensor, key_I: Tensor, factor_II: Tensor | None) -> float:
    """The share of a change made at `key_I` that arrives at `at_I`: 1 at the key itself."""
    key = key_I.double()[:, None]
    direction = key if factor_II is None else torch.cholesky_solve(key, factor_II)
    return float((at_I.double() @ direction) / (key_I.double() @ direction))


def apart(
    keys_IN: Tensor, factor_II: Tensor | None, most: float = LARGEST_COSINE
) -> list[list[int]]:
    """Numbers of keys in waves, so that within one no two are nearly the same.

    Two keys are as near as their cosine under C^-1: solving for both at once would ask for their
    difference, enlarged.
    """
    keys = keys_IN.double()
    if factor_II is not None:
        keys = torch.linalg.solve_triangular(factor_II, keys, upper=False)
    keys = keys / keys.norm(dim=0)
    near_NN = (keys.T @ keys).abs() > most
    waves: list[list[int]] = []
    for number in range(keys.shape[1]):
        fitting = (wave for wave in waves if not bool(near_NN[number, wave].any()))
        wave = next(fitting, None)
        if wave is None:
            waves.append([number])
        else:
            wave.append(number)
    return waves


def mixed_change(
    residual_D: Tensor, direction_key_I: Tensor, key_I: Tensor, factor_II: Tensor | None
) -> tuple[Tensor, Tensor]:
    """ROME as published: the direction from one key, the constraint at another; rank one.

    Raises:
        EditError: direction and key are nearly orthogonal, so the change would be amplified.
    """
    direction = direction_key_I.double()[:, None]
    if factor_II is not None:
        direction = torch.cholesky_solve(direction, factor_II)
    direction = direction[:, 0] / direction.norm()
    key = key_I.double()
    cosine = float(direction @ key / key.norm())
    if cosine < LEAST_COSINE:
        raise EditError(
            f"the averaged key is nearly orthogonal to the prompt's own (cosine {cosine:.3f}, at "
            f"least {LEAST_COSINE} is needed): use the averaged key throughout, or another layer"
        )
    return residual_D.double()[:, None] / (direction @ key), direction[None, :]
