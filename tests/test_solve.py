"""Closed-form updates against plain references, in float64 (the self-checks of the cards)."""

from __future__ import annotations

import pytest
import torch

from knowpatch.errors import EditError
from knowpatch.parts.solve import apart, cholesky, gain, least_change, mixed_change, ridged

OUT, IN = 5, 7


def _case(keys: int = 1):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    samples = normal(40, IN)
    return normal(OUT, IN), normal(OUT, keys), normal(IN, keys), samples.T @ samples / 40


@pytest.mark.parametrize("keys", [1, 2, 3])
def test_least_change_meets_its_constraints(keys):
    """The edited map gives the wanted value at every key, to 1e-10."""
    weight, wanted, k, second = _case(keys)
    left, right = least_change(wanted - weight @ k, k, cholesky(second))
    assert torch.allclose((weight + left @ right) @ k, wanted, atol=1e-10, rtol=0)
    assert torch.linalg.matrix_rank(left @ right) == keys


@pytest.mark.parametrize("keys", [1, 2])
def test_least_change_is_the_closed_form(keys):
    """The factors multiply to R (K' C^-1 K)^-1 K' C^-1, computed here with plain inverses."""
    _, residual, k, second = _case(keys)
    inverse = torch.linalg.inv(second)
    plain = residual @ torch.linalg.inv(k.T @ inverse @ k) @ k.T @ inverse
    left, right = least_change(residual, k, cholesky(second))
    assert torch.allclose(left @ right, plain, atol=1e-9)


def test_least_change_is_least():
    """Any other change with the same constraint moves ordinary keys (weighted by C) more."""
    _, residual, k, second = _case()
    left, right = least_change(residual, k, cholesky(second))
    change = left @ right
    away = torch.randn(OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    away -= (away @ k) @ k.T / (k.T @ k)
    for size in (0.01, 1.0):
        other = change + size * away
        assert torch.trace(other @ second @ other.T) > torch.trace(change @ second @ change.T)


def test_orthogonal_inputs_are_untouched_and_scale_of_statistics_does_not_matter():
    """x with u.x = 0 keeps its output; C and 100 C give the same change."""
    _, residual, k, second = _case()
    left, right = least_change(residual, k, cholesky(second))
    x = torch.randn(IN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x -= right[0] * (right[0] @ x) / (right[0] @ right[0])
    assert (left @ (right @ x)).abs().max() < 1e-12
    scaled = torch.matmul(*least_change(residual, k, cholesky(100 * second)))
    assert torch.allclose(left @ right, scaled, atol=1e-10)


def test_identity_statistics():
    """Without statistics the direction is the key itself."""
    _, residual, k, _ = _case()
    left, right = least_change(residual, k, None)
    assert torch.allclose(left @ right, residual @ k.T / (k.T @ k), atol=1e-12)


def test_the_mix_meets_its_constraint_at_the_bare_key_only():
    """The published mix holds at the prompt's own key, not at the averaged one."""
    weight, wanted, _, second = _case()
    bare = torch.ones(IN, dtype=torch.float64)
    mean = bare + 0.3 * torch.arange(IN, dtype=torch.float64)
    left, right = mixed_change(
        (wanted - weight @ bare[:, None])[:, 0], mean, bare, cholesky(second)
    )
    edited = weight + left @ right
    assert torch.allclose(edited @ bare, wanted[:, 0], atol=1e-10)
    assert not torch.allclose(edited @ mean, wanted[:, 0], atol=1e-2)


def test_the_mix_refuses_an_orthogonal_direction():
    """A product that vanishes is refused, with the cosine, instead of exploding."""
    residual, first, second = torch.ones(OUT), torch.eye(IN)[0], torch.eye(IN)[1]
    with pytest.raises(EditError, match=r"cosine 0\.000"):
        mixed_change(residual, first, second, None)


def test_gain_is_one_at_the_key_and_linear():
    """A change made at k arrives whole at k, half at k/2, and not at a C-orthogonal key."""
    _, _, k, second = _case()
    factor, key = cholesky(second), k[:, 0]
    assert gain(key, key, factor) == pytest.approx(1)
    assert gain(key / 2, key, factor) == pytest.approx(0.5)
    other = torch.linalg.inv(second)[1]
    direction = torch.linalg.inv(second) @ key
    other = other - key * (other @ direction) / (key @ direction)
    assert gain(other, key, factor) == pytest.approx(0, abs=1e-9)


def test_cholesky_solves_to_1e_8_and_survives_a_singular_matrix():
    """The residual of a solve is below 1e-8; dead dimensions get the least jitter that works."""
    _, _, k, second = _case()
    solved = torch.cholesky_solve(k, cholesky(second))
    assert (second @ solved - k).norm() / k.norm() < 1e-8
    second[0] = second[:, 0] = 0
    assert torch.isfinite(cholesky(second)).all()
    with pytest.raises(EditError, match="not positive definite"):
        cholesky(-torch.eye(3))


def test_ridge_is_in_units_of_the_median_variance():
    """One huge entry (the attention sink) does not blow the ridge up."""
    second = torch.diag(torch.tensor([1e6, 2.0, 2.0, 2.0, 2.0], dtype=torch.float64))
    assert torch.allclose(
        ridged(second, 0.1).diagonal() - second.diagonal(), torch.tensor(0.2).double()
    )


def test_keys_that_nearly_coincide_are_set_apart():
    """No wave holds two keys of a cosine above 0.9 under C^-1; what fits goes into the first."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    keys[:, 2] = 3 * keys[:, 0] + 0.01 * keys[:, 1]
    keys[:, 3] = -keys[:, 0]
    assert apart(keys, None) == [[0, 1], [2], [3]]
    assert apart(keys[:, :2], None) == [[0, 1]]
    stretch = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    second = stretch @ stretch.T + 0.1 * torch.eye(8, dtype=torch.float64)
    factor = cholesky(second)
    white = torch.linalg.inv(factor) @ keys
    cosines = torch.nn.functional.normalize(white, dim=0)
    near = (cosines.T @ cosines).abs() > 0.9
    for wave in apart(keys, factor):
        assert int(near[wave][:, wave].sum()) == len(wave)
