"""Closed-form updates of a linear map: one solver for the locate-then-edit family.

W (D, I) acts as y = W k. For keys K (I, N) and residuals R (D, N), the change that adds R at K and
leaves alone what a quadratic form S says to keep is

    delta W = R (K^T S^-1 K + alpha I)^-1 K^T S^-1        alpha: how much of R may be given up

With S = C, the second moment of keys over text, and alpha = 0 it is ROME (arXiv 2202.05262,
equation 2) for one key and EMMET's exact form (arXiv 2403.14236) for several; with S = lambda C and
alpha = 1 MEMIT (arXiv 2210.07229, equation 14); with S = L2 I and keys taken into the null space of
C AlphaEdit (arXiv 2410.02355). What earlier edits wrote is kept by adding their keys to S.

Everything is float64, by Cholesky factors; nothing is inverted, and no (I, I) matrix is formed for
an edit. Axes: F facts, N keys, J width of the solve (I, or the dimensions of a subspace), M keys
kept since the last factorisation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from knowpatch.errors import EditError

LEAST_COSINE = 0.05
"""Below this cosine between direction and key the update would be amplified beyond use."""

LARGEST_COSINE = 0.9
"""Above this cosine two keys are too near to be solved for at once."""

LEAST_SINE = 1e-6
"""Below this sine of the angle to the others a key depends on them, as far as rounding can tell."""

KEPT_SHARE = 4
"""Keys kept beside a factor before it is made anew, as a share of its width: 1 / KEPT_SHARE. So the
work per key stays of the order of one solve, and rounding does not add up."""


def ridged(second_II: Tensor, ridge: float) -> Tensor:
    """A second moment plus `ridge` times the median of its diagonal.

    The median, since the attention sink at the first position makes a few entries huge.
    """
    wide_II = second_II.double()
    return raised(wide_II, ridge * float(wide_II.diagonal().median()))


def raised(matrix_JJ: Tensor, size: float) -> Tensor:
    """A matrix plus `size` on its diagonal, without a second matrix for it."""
    return torch.diagonal_scatter(matrix_JJ, matrix_JJ.diagonal() + size)


def cholesky(matrix_JJ: Tensor) -> Tensor:
    """The lower Cholesky factor in float64; adds the least jitter that makes one exist."""
    scale = float(matrix_JJ.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
    jitter = 0.0
    while jitter < 1:
        wide_JJ = matrix_JJ.double()
        wide_JJ = raised(wide_JJ, jitter * scale) if jitter else wide_JJ
        factor, failed = torch.linalg.cholesky_ex(wide_JJ)
        if not bool(failed):
            found: Tensor = factor
            return found
        jitter = jitter * 10 or 1e-10
    raise EditError("key statistics are not positive definite; collect more tokens or add a ridge")


Factors = tuple[Tensor, Tensor]
"""A change in factors: left (D, F), right (F, I), float64."""


@dataclass(frozen=True, eq=False)
class Form:
    """S = S0 + the sum of k k^T over kept keys: symmetric, positive definite, (J, J), float64.

    Attributes:
        root: S0 = size root root^T, a Cholesky factor (J, J); None for the identity.
        size: a number, so that a form is scaled without another matrix.
        width: J.
        white_JM: S0^-1/2 of the keys that were kept since the factor was made.
        inner_MM: the Cholesky factor of I + white^T white.
        kept: how many keys have been added in all.
    """

    root: Tensor | None
    size: float
    width: int
    white_JM: Tensor
    inner_MM: Tensor
    kept: int = 0

    @classmethod
    def of(cls, matrix_JJ: Tensor) -> Form:
        """The form of a symmetric positive definite matrix."""
        return cls._bare(cholesky(matrix_JJ), 1.0, len(matrix_JJ), 0)

    @classmethod
    def even(cls, size: float, width: int) -> Form:
        """`size` times the identity."""
        return cls._bare(None, size, width, 0)

    @classmethod
    def _bare(cls, root: Tensor | None, size: float, width: int, kept: int) -> Form:
        none = torch.zeros(width, 0, dtype=torch.float64)
        return cls(root, size, width, none, torch.zeros(0, 0, dtype=torch.float64), kept)

    def scaled(self, size: float) -> Form:
        """`size` times a form that has kept no keys yet."""
        assert not self.kept
        return replace(self, size=self.size * size)

    def solve(self, keys_JN: Tensor) -> Tensor:
        """S^-1 K (J, N)."""
        white_JN = self._whitened(keys_JN.double())
        if self.white_JM.shape[1]:
            inner_MN = torch.cholesky_solve(self.white_JM.T @ white_JN, self.inner_MM)
            white_JN = white_JN - self.white_JM @ inner_MN
        solved_JN: Tensor = white_JN / self.size**0.5
        if self.root is not None:
            solved_JN = torch.linalg.solve_triangular(self.root.T, solved_JN, upper=True)
        return solved_JN

    def keeping(self, keys_JN: Tensor) -> Form:
        """The form with k k^T added for each of these keys; this one stays as it is."""
        keys_JN, count = keys_JN.double(), keys_JN.shape[1]
        beside = self.white_JM.shape[1]
        if beside + count > max(self.width // KEPT_SHARE, 1):
            return self._factored(keys_JN)
        white_JN = self._whitened(keys_JN)
        border_MN = torch.linalg.solve_triangular(
            self.inner_MM, self.white_JM.T @ white_JN, upper=False
        )
        corner_NN = torch.eye(count, dtype=torch.float64)
        corner_NN = corner_NN + white_JN.T @ white_JN - border_MN.T @ border_MN
        inner = torch.zeros(beside + count, beside + count, dtype=torch.float64)
        inner[:beside, :beside] = self.inner_MM
        inner[beside:, :beside] = border_MN.T
        inner[beside:, beside:] = cholesky(corner_NN)
        white_JM = torch.cat([self.white_JM, white_JN], dim=1)
        return Form(self.root, self.size, self.width, white_JM, inner, self.kept + count)

    def _factored(self, keys_JN: Tensor) -> Form:
        """With these keys, in one factor: root chol(I + W W^T), W the whitened keys.

        S itself is not formed: the digits lost are those of the keys, not of the statistics.
        """
        white_JM = torch.cat([self.white_JM, self._whitened(keys_JN)], dim=1)
        factor_JJ = cholesky(raised(white_JM @ white_JM.T, 1.0))
        root = factor_JJ if self.root is None else self.root @ factor_JJ
        return self._bare(root, self.size, self.width, self.kept + keys_JN.shape[1])

    def matrix(self) -> Tensor:
        """S itself (J, J)."""
        if self.root is None:
            matrix_JJ = raised(self.white_JM @ self.white_JM.T, 1.0)
        else:
            keys_JM = self.root @ self.white_JM
            matrix_JJ = torch.addmm(keys_JM @ keys_JM.T, self.root, self.root.T)
        return matrix_JJ * self.size

    def _whitened(self, keys_JN: Tensor) -> Tensor:
        """S0^-1/2 K (J, N)."""
        white_JN: Tensor = keys_JN / self.size**0.5
        if self.root is not None:
            white_JN = torch.linalg.solve_triangular(self.root, white_JN, upper=False)
        return white_JN


def update(
    residuals_DF: Tensor,
    keys_JN: Tensor,
    form: Form,
    *,
    slack: float,
    owner_N: Tensor | None = None,
    basis_IJ: Tensor | None = None,
) -> Factors:
    """left (D, r), right (r, I), float64: R (K^T S^-1 K + slack I)^-1 K^T S^-1, of rank r <= F.

    Args:
        residuals_DF: what is to be added for each of F facts.
        keys_JN: the keys, in the coordinates of the form.
        form: S.
        slack: alpha; 0 for a change that adds all of every residual.
        owner_N: which fact's residual is to be added at each key; None where each fact has one key.
        basis_IJ: the space in whose coordinates keys and form are; None for all of I.

    Raises:
        EditError: without slack, keys that depend on each other.
    """
    keys, residuals = keys_JN.double(), residuals_DF.double()
    count, facts = keys.shape[1], residuals.shape[1]
    if slack and count > form.width:  # primal: (slack S + K K^T) is the smaller of the two
        right = form.keeping(keys / slack**0.5).solve(keys).T / slack
    else:
        right = _dual(keys, form.solve(keys), slack)
    if owner_N is not None:
        # Keys of one fact share its residual, so that the change is of rank one for each fact.
        right = torch.zeros(facts, form.width, dtype=torch.float64).index_add(0, owner_N, right)
    if basis_IJ is not None:
        right = right @ basis_IJ.T
    if facts > len(residuals):  # never of a higher rank than the map
        return torch.eye(len(residuals), dtype=torch.float64), residuals @ right
    return residuals, right


def _dual(keys_JN: Tensor, solved_JN: Tensor, slack: float) -> Tensor:
    """(K^T S^-1 K + slack I)^-1 (S^-1 K)^T, (N, J)."""
    gram_NN = raised(keys_JN.T @ solved_JN, slack)
    size_N = gram_NN.diagonal().sqrt()
    factor_NN, failed = torch.linalg.cholesky_ex(gram_NN / (size_N[:, None] * size_N))
    # A pivot is the sine of the angle between a key and those before it.
    if bool(failed) or bool((factor_NN.diagonal() < LEAST_SINE).any()):
        raise EditError(
            "the keys of these facts depend on each other (or one is zero), so that not all of "
            "them can be written exactly: give them one after the other, or allow some slack"
        )
    return torch.cholesky_solve((solved_JN / size_N).T, factor_NN) / size_N[:, None]


def deletion(written_DN: Tensor, keys_JN: Tensor, form: Form) -> Factors:
    """left (D, N), right (N, J): what takes facts back as if they had never been written.

    For a ridge solution with slack 1: -(V - W K) K^T S^-1. With M = S + K K^T this is the same as
    -(V - W K) (I - K^T M^-1 K)^-1 K^T M^-1, without the difference that loses digits.

    Args:
        written_DN: V - W K, what each fact asked for less what the map gives at its key now.
        keys_JN: the keys of the facts.
        form: S, with the keys kept of all facts but these.
    """
    return -written_DN.double(), form.solve(keys_JN).T


def gain(at_I: Tensor, key_I: Tensor, form: Form) -> float:
    """The share of a change made at `key_I` that arrives at `at_I`: 1 at the key itself."""
    direction_I = form.solve(key_I[:, None])[:, 0]
    return float((at_I.double() @ direction_I) / (key_I.double() @ direction_I))


def energies(keys_JN: Tensor, form: Form) -> Tensor:
    """k^T S^-1 k for each key (N): g, of which g / (slack + g) of a residual is written."""
    return (keys_JN.double() * form.solve(keys_JN)).sum(0)


def apart(keys_IN: Tensor, form: Form, most: float = LARGEST_COSINE) -> list[list[int]]:
    """Numbers of keys in waves, so that within one no two are nearly the same.

    Two keys are as near as their cosine under S^-1: solving for both at once would ask for their
    difference, enlarged.
    """
    gram_NN = keys_IN.double().T @ form.solve(keys_IN)
    size_N = gram_NN.diagonal().sqrt()
    near_NN = (gram_NN / (size_N[:, None] * size_N)).abs() > most
    waves: list[list[int]] = []
    for number in range(keys_IN.shape[1]):
        fitting = (wave for wave in waves if not bool(near_NN[number, wave].any()))
        wave = next(fitting, None)
        if wave is None:
            waves.append([number])
        else:
            wave.append(number)
    return waves


def mixed_change(residual_D: Tensor, direction_key_I: Tensor, key_I: Tensor, form: Form) -> Factors:
    """ROME as published: the direction from one key, the constraint at another; rank one.

    Raises:
        EditError: direction and key are nearly orthogonal, so the change would be amplified.
    """
    direction_I = form.solve(direction_key_I[:, None])[:, 0]
    direction_I = direction_I / direction_I.norm()
    key = key_I.double()
    cosine = float(direction_I @ key / key.norm())
    if not cosine >= LEAST_COSINE:  # not a number, for a key of zeros
        raise EditError(
            f"the averaged key is nearly orthogonal to the prompt's own (cosine {cosine:.3f}, at "
            f"least {LEAST_COSINE} is needed): use the averaged key throughout, or another layer"
        )
    return residual_D.double()[:, None] / (direction_I @ key), direction_I[None, :]
