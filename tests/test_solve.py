"""Closed-form updates against plain references, in float64 (the self-checks of the cards)."""

from __future__ import annotations

import pytest
import torch

from knowpatch.errors import EditError
from knowpatch.parts.solve import (
    Form,
    apart,
    cholesky,
    deletion,
    energies,
    gain,
    mixed_change,
    ridged,
    update,
)
from knowpatch.parts.space import Space

OUT, IN = 5, 7


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _case(keys: int = 1):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    samples = normal(40, IN)
    return normal(OUT, IN), normal(OUT, keys), normal(IN, keys), samples.T @ samples / 40


def _second(width: int, seed: int = 0) -> torch.Tensor:
    samples = _normal(width, 8 * width, seed=seed)
    return samples @ samples.T / (8 * width)


def _close(found: torch.Tensor, wanted: torch.Tensor, within: float = 1e-9) -> bool:
    assert found.dtype == torch.float64
    assert found.shape == wanted.shape
    return bool((found - wanted).norm() <= within * wanted.norm())


@pytest.mark.parametrize("keys", [1, 2, 3])
def test_update_meets_its_constraints(keys):
    """The edited map gives the wanted value at every key, to 1e-10."""
    weight, wanted, k, second = _case(keys)
    left, right = update(wanted - weight @ k, k, Form.of(second), slack=0)
    assert torch.allclose((weight + left @ right) @ k, wanted, atol=1e-10, rtol=0)
    assert torch.linalg.matrix_rank(left @ right) == keys


@pytest.mark.parametrize("keys", [1, 2])
def test_update_is_the_closed_form(keys):
    """The factors multiply to R (K' C^-1 K)^-1 K' C^-1, computed here with plain inverses."""
    _, residual, k, second = _case(keys)
    inverse = torch.linalg.inv(second)
    plain = residual @ torch.linalg.inv(k.T @ inverse @ k) @ k.T @ inverse
    left, right = update(residual, k, Form.of(second), slack=0)
    assert torch.allclose(left @ right, plain, atol=1e-9)


def test_update_is_the_least_change():
    """Any other change with the same constraint moves ordinary keys (weighted by C) more."""
    _, residual, k, second = _case()
    left, right = update(residual, k, Form.of(second), slack=0)
    change = left @ right
    away = torch.randn(OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    away -= (away @ k) @ k.T / (k.T @ k)
    for size in (0.01, 1.0):
        other = change + size * away
        assert torch.trace(other @ second @ other.T) > torch.trace(change @ second @ change.T)


def test_orthogonal_inputs_are_untouched_and_scale_of_statistics_does_not_matter():
    """x with u.x = 0 keeps its output; C and 100 C give the same change."""
    _, residual, k, second = _case()
    left, right = update(residual, k, Form.of(second), slack=0)
    x = torch.randn(IN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x -= right[0] * (right[0] @ x) / (right[0] @ right[0])
    assert (left @ (right @ x)).abs().max() < 1e-12
    scaled = torch.matmul(*update(residual, k, Form.of(100 * second), slack=0))
    assert torch.allclose(left @ right, scaled, atol=1e-10)


def test_identity_statistics():
    """Without statistics the direction is the key itself."""
    _, residual, k, _ = _case()
    left, right = update(residual, k, Form.even(1.0, IN), slack=0)
    assert torch.allclose(left @ right, residual @ k.T / (k.T @ k), atol=1e-12)


def test_the_mix_meets_its_constraint_at_the_bare_key_only():
    """The published mix holds at the prompt's own key, not at the averaged one."""
    weight, wanted, _, second = _case()
    bare = torch.ones(IN, dtype=torch.float64)
    mean = bare + 0.3 * torch.arange(IN, dtype=torch.float64)
    left, right = mixed_change((wanted - weight @ bare[:, None])[:, 0], mean, bare, Form.of(second))
    edited = weight + left @ right
    assert torch.allclose(edited @ bare, wanted[:, 0], atol=1e-10)
    assert not torch.allclose(edited @ mean, wanted[:, 0], atol=1e-2)


def test_the_mix_refuses_an_orthogonal_direction():
    """A product that vanishes is refused, with the cosine, instead of exploding."""
    residual, first, second = torch.ones(OUT), torch.eye(IN)[0], torch.eye(IN)[1]
    with pytest.raises(EditError, match=r"cosine 0\.000"):
        mixed_change(residual, first, second, Form.even(1.0, IN))


def test_gain_is_one_at_the_key_and_linear():
    """A change made at k arrives whole at k, half at k/2, and not at a C-orthogonal key."""
    _, _, k, second = _case()
    form, key = Form.of(second), k[:, 0]
    assert gain(key, key, form) == pytest.approx(1)
    assert gain(key / 2, key, form) == pytest.approx(0.5)
    other = torch.linalg.inv(second)[1]
    direction = torch.linalg.inv(second) @ key
    other = other - key * (other @ direction) / (key @ direction)
    assert gain(other, key, form) == pytest.approx(0, abs=1e-9)


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
    assert apart(keys, Form.even(1.0, 8)) == [[0, 1], [2], [3]]
    assert apart(keys[:, :2], Form.even(1.0, 8)) == [[0, 1]]
    stretch = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    second = stretch @ stretch.T + 0.1 * torch.eye(8, dtype=torch.float64)
    factor = cholesky(second)
    white = torch.linalg.inv(factor) @ keys
    cosines = torch.nn.functional.normalize(white, dim=0)
    near = (cosines.T @ cosines).abs() > 0.9
    for wave in apart(keys, Form.of(second)):
        assert int(near[wave][:, wave].sum()) == len(wave)


SPLITS = {
    "none": [0],
    "one": [1],
    "few": [3],
    "at once, anew": [9],
    "more than J": [40],
    "one by one": [1] * 30,
    "mixed": [3, 0, 2, 7, 1, 1, 4, 20, 2],
}


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("counts", SPLITS.values(), ids=SPLITS)
def test_a_form_is_its_matrix_however_keys_were_added(counts, even):
    """S = S0 + K K': solve, matrix and count, with and without a new factor; J = 16."""
    first = 0.3 * torch.eye(16, dtype=torch.float64) if even else _second(16)
    form = Form.even(0.3, 16) if even else Form.of(first)
    asked, plain, kept = _normal(16, 3, seed=1), first, 0
    for step, count in enumerate(counts):
        keys = _normal(16, count, seed=10 + step)
        form, kept, plain = form.keeping(keys), kept + count, plain + keys @ keys.T
        keys.zero_()  # the form does not live off the caller's tensor
        assert _close(form.solve(asked), torch.linalg.solve(plain, asked))
        assert _close(form.matrix(), plain, 1e-12)
        assert form.kept == kept
        assert form.width == 16
        assert form.white_JM.shape[1] <= 16 // 4


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("count", [1, 3, 9])
def test_keeping_leaves_the_old_form_as_it_was(count, even):
    old = (Form.even(0.3, 16) if even else Form.of(_second(16))).keeping(_normal(16, 1, seed=2))
    asked = _normal(16, 3, seed=1)
    before = old.solve(asked), old.matrix(), old.white_JM.clone(), old.inner_MM.clone()
    new = old.keeping(_normal(16, count, seed=3))
    assert not _close(new.solve(asked), before[0], 1e-3)
    for now, then in zip(
        (old.solve(asked), old.matrix(), old.white_JM, old.inner_MM), before, strict=True
    ):
        assert torch.equal(now, then)
    assert (old.kept, new.kept) == (1, 1 + count)


def test_scaling_a_form_scales_its_matrix():
    """Of a bare form only: what is kept counts in full whatever text counts."""
    for form in (Form.of(_second(16)), Form.even(0.3, 16)):
        assert _close(form.scaled(7.0).matrix(), 7 * form.matrix(), 1e-12)
        assert form.scaled(7.0).kept == 0
        with pytest.raises(AssertionError):
            form.keeping(_normal(16, 1)).scaled(7.0)


@pytest.mark.parametrize("slack", [0.0, 1.0])
def test_keys_of_one_fact_share_its_residual(slack):
    """Owners: the change is as with the residual repeated, of rank one for each fact."""
    form, keys, owner = Form.of(_second(16)), _normal(16, 6, seed=1), [0, 0, 2, 1, 2, 0]
    residual = _normal(OUT, 4, seed=2)  # the last fact has no key
    basis = torch.linalg.qr(_normal(30, 16, seed=3)).Q
    left, right = update(
        residual, keys, form, slack=slack, owner_N=torch.tensor(owner), basis_IJ=basis
    )
    plain = torch.matmul(*update(residual[:, owner], keys, form, slack=slack, basis_IJ=basis))
    assert _close(left @ right, plain)
    assert left.shape[1] == right.shape[0] == 4
    assert torch.linalg.matrix_rank(left @ right) == 3


def _space(width: int = 20) -> Space:
    vectors = torch.linalg.qr(_normal(30, 30, seed=9)).Q
    values = torch.arange(30, dtype=torch.float64)
    return Space.below(values, vectors, float(width))


def _projector(space: Space) -> torch.Tensor:
    inside = space.inside(torch.eye(30, dtype=torch.float64))
    return inside if space.basis_IJ is None else space.basis_IJ @ inside


def test_a_space_is_held_by_its_smaller_side():
    """A basis up to half of all directions, what is outside beyond; the projector is the same."""
    vectors = torch.linalg.qr(_normal(30, 30, seed=9)).Q
    for width in (0, 15, 16, 30):
        space = _space(width)
        held = space.closed_JM if space.basis_IJ is None else space.basis_IJ
        assert held.shape == (30, min(width, 30 - width))
        assert space.room == space.width == width
        plain = vectors[:, :width] @ vectors[:, :width].T
        assert (_projector(space) - plain).norm() < 1e-12
        matrix = _normal(30, 30, seed=2)
        matrix = matrix @ matrix.T
        inside = space.compressed(matrix)
        if space.basis_IJ is not None:
            inside = space.basis_IJ @ inside @ space.basis_IJ.T
        assert (inside - plain @ matrix @ plain).norm() < 1e-10


@pytest.mark.parametrize("width", [15, 20])
def test_a_space_that_loses_what_edits_wrote(width):
    """EvoEdit: P_t^2 = P_t, P_t K_t = 0, and five batches later W K_1 is what batch 1 made it."""
    space, weight = _space(width), _normal(OUT, 30, seed=1)
    firsts, after_first = _normal(30, 3, seed=20), None
    for batch in range(5):
        keys = _normal(30, 3, seed=20 + batch)
        residual = _normal(OUT, 3, seed=40 + batch) - weight @ keys
        inside, form = space.inside(keys), Form.even(0.3, space.coordinates)
        found = inside if space.basis_IJ is None else space.basis_IJ @ inside
        assert _close(found, _projector(space) @ keys)
        change = update(residual, inside, form, slack=1.0, basis_IJ=space.basis_IJ)
        weight = weight + torch.matmul(*change)
        space = space.without(keys, 1e-6)
        projector = _projector(space)
        assert space.inside(keys).norm() < 1e-10
        assert (projector @ keys).norm() < 1e-10
        assert (projector @ projector - projector).norm() < 1e-12
        assert space.room == width - 3 * (batch + 1) == round(float(projector.trace()))
        after_first = weight @ firsts if after_first is None else after_first
    assert _close(weight @ firsts, after_first)


def test_room_drops_by_the_rank_of_a_batch():
    """Duplicates, multiples, sums and zeros cost nothing, nor does what is almost a duplicate."""
    space, keys = _space(), _normal(30, 3, seed=1)
    mixed = torch.cat([keys, keys[:, :1], -3 * keys[:, 1:2], keys.sum(1, keepdim=True)], dim=1)
    assert space.without(mixed, 1e-6).room == 17
    assert space.without(torch.cat([mixed, torch.zeros(30, 2).double()], dim=1), 1e-6).room == 17
    near = torch.cat([keys, keys + 1e-9 * _normal(30, 3, seed=2)], dim=1)
    assert space.without(near, 1e-6).room == 17
    alike = torch.cat([keys, keys + 0.01 * _normal(30, 3, seed=2)], dim=1)
    assert space.without(alike, 1e-6).room == 14
    assert space.without(alike, 0.1).room == 17
    assert space.room == 20  # as it was


SPENT = {"again": 0, "sums": 0, "zeros": 0, "almost again": 1e-9}


@pytest.mark.parametrize(("kind", "noise"), SPENT.items(), ids=SPENT)
def test_a_batch_that_is_spent_already_costs_nothing(kind, noise):
    """Its keys lie in directions that are gone, but for rounding: rounding is no direction."""
    keys = _normal(30, 3, seed=1)
    space = _space().without(keys, 1e-6)
    again = {"sums": keys @ _normal(3, 5, seed=2), "zeros": torch.zeros(30, 2).double()}
    spent = again.get(kind, keys) + noise * _normal(30, 1, seed=3)
    later = space.without(spent, 1e-6)
    assert later.room == 17
    assert _close(_projector(later), _projector(space), 1e-8)


def test_a_spent_key_beside_a_new_one_costs_nothing():
    keys, new = _normal(30, 3, seed=1), _normal(30, 1, seed=2)
    space = _space().without(keys, 1e-6).without(torch.cat([keys, new], dim=1), 1e-6)
    assert space.room == 16
    assert space.inside(torch.cat([keys, new], dim=1)).norm() < 1e-10


def test_keys_outside_the_space_cost_nothing():
    """What text keys reach is not in the space, so it takes no room."""
    space = _space()
    outside = _normal(30, 2, seed=1)
    outside = outside - _projector(space) @ outside
    assert space.without(outside, 1e-6).room == 20


def test_many_small_steps_keep_directions_orthonormal():
    """200 times one key, some of them nearly spent; to 1e-12."""
    basis = torch.linalg.qr(_normal(240, 210, seed=1)).Q
    space, keys = Space(basis, torch.zeros(210, 0, dtype=torch.float64)), _normal(240, 200, seed=2)
    keys[:, 100:] = keys[:, :100] + 1e-4 * keys[:, 100:]
    for number in range(200):
        space = space.without(keys[:, [number]], 1e-6)
    gram = space.closed_JM.T @ space.closed_JM
    assert (gram - torch.eye(200, dtype=torch.float64)).abs().max() < 1e-12
    assert space.inside(keys).norm() < 1e-10
    assert space.room == 10


def test_a_space_without_room():
    """All spent: room 0 and no less, and an edit changes nothing; likewise if none ever was."""
    full = _space(6).without(_normal(30, 9, seed=1), 1e-6)
    for space in (full, _space(0)):
        assert space.room == 0
        inside = space.inside(_normal(30, 2, seed=2))
        form = Form.even(0.3, space.coordinates)
        change = update(torch.ones(OUT, 2), inside, form, slack=1.0, basis_IJ=space.basis_IJ)
        assert torch.matmul(*change).norm() < 1e-12
        assert space.without(_normal(30, 2, seed=2), 1e-6).room == 0


def test_an_empty_batch():
    """No keys: no change, no room taken, nothing kept."""
    none, form = torch.zeros(IN, 0), Form.of(_second(IN))
    for slack in (0.0, 1.0):
        left, right = update(torch.zeros(OUT, 0), none, form, slack=slack)
        assert torch.equal(left @ right, torch.zeros(OUT, IN, dtype=torch.float64))
    assert form.keeping(none).kept == 0
    assert energies(none, form).shape == (0,)
    assert apart(none, form) == []
    assert _space().without(torch.zeros(30, 0), 1e-6).room == 20


def _refused(residual, keys, form) -> str:
    with pytest.raises(EditError) as caught:
        update(residual, keys, form, slack=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", ["same", "multiple", "sum", "too many"])
def test_dependent_keys_are_refused_without_slack(kind, seed):
    """And not answered with what rounding makes of them."""
    keys = _normal(IN, IN if kind == "too many" else 3, seed=seed)
    last = {"same": keys[:, :1], "multiple": 3 * keys[:, :1], "sum": keys.sum(1, keepdim=True)}
    keys = torch.cat([keys, last.get(kind, _normal(IN, 1, seed=seed + 500))], dim=1)
    _refused(torch.ones(OUT, keys.shape[1]), keys, Form.of(_second(IN, seed + 100)))


def test_dependent_keys_are_fine_with_slack():
    """Two that conflict get the middle, two alike count double, a zero key does nothing."""
    second, keys, residual = _second(IN), _normal(IN, 3, seed=1), _normal(OUT, 3, seed=2)
    twice = torch.cat([keys, keys[:, :1], torch.zeros(IN, 1)], dim=1)
    asked = torch.cat([residual, residual[:, 1:2], torch.ones(OUT, 1)], dim=1)
    found = torch.matmul(*update(asked, twice, Form.of(second), slack=0.7))
    plain = asked @ twice.T @ torch.linalg.inv(0.7 * second + twice @ twice.T)
    assert _close(found, plain)
    conflict = torch.matmul(*update(asked, twice, Form.of(second), slack=1e-7))
    middle = (residual[:, 0] + residual[:, 1]) / 2
    assert _close(conflict @ keys[:, 0], middle, 1e-5)


def test_a_zero_key_is_refused_where_it_would_be_divided_by():
    """Without slack, and as direction or key of the published mix: an error, not NaN."""
    form, keys = Form.of(_second(IN)), _normal(IN, 2, seed=1)
    keys[:, 1] = 0
    _refused(torch.ones(OUT, 2), keys, form)
    for first, second in (keys.T, keys.T.flip(0)):
        with pytest.raises(EditError):
            mixed_change(torch.ones(OUT), first, second, form)
    assert float(energies(keys, form)[1]) == 0


def test_badly_scaled_keys():
    """Keys of 1e-6 and 1e6 in one batch: as exact as if they were alike, since scale is free."""
    second, keys, residual = _second(IN), _normal(IN, 3, seed=1), _normal(OUT, 3, seed=2)
    size, form = torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64), Form.of(_second(IN))
    exact = torch.matmul(*update(residual, keys, form, slack=0))
    assert _close(torch.matmul(*update(residual * size, keys * size, form, slack=0)), exact)
    # With slack: the large key is written whole, the small one not at all.
    solved = torch.linalg.solve(second, keys)
    gram = keys.T @ solved + torch.diag(size**-2)  # of the keys as they were, so well scaled
    plain = (residual / size) @ torch.linalg.solve(gram, solved.T)
    found = torch.matmul(*update(residual, keys * size, form, slack=1.0))
    assert _close(found, plain)
    assert _close(found @ keys[:, 2] * 1e6, residual[:, 2], 1e-6)
    assert (found @ keys[:, 0] * 1e-6).norm() < 1e-5
    assert apart(keys * size, form, 0.999) == [[0, 1, 2]]


@pytest.mark.parametrize(("width", "within"), [(16, 1e-9), (7, 1e-3)])
def test_a_form_that_keeps_badly_scaled_keys(width, within):
    """Exact beside the factor (16); made anew (7) it is what the sum of such numbers still says."""
    second, keys, asked = _second(width), _normal(width, 3, seed=1), _normal(width, 2, seed=2)
    size, inverse = torch.tensor([1e-6, 1.0, 1e6]).double(), torch.linalg.inv(second)
    inner = keys.T @ inverse @ keys + torch.diag(size**-2)
    plain = inverse - inverse @ keys @ torch.linalg.solve(inner, keys.T @ inverse)
    form = Form.of(second).keeping(keys * size)
    assert form.white_JM.shape[1] == (3 if width == 16 else 0)
    assert _close(form.solve(asked), plain @ asked, within)


def test_float32_and_strided_inputs():
    """All is computed in float64 of what is given, however it lies in memory."""
    second, keys, residual = _second(IN).float(), _normal(IN, 3).float(), _normal(OUT, 3).float()
    wide = torch.zeros(6, 2 * IN)
    wide[::2, ::2] = keys.T
    strided, form = wide[::2, ::2].T, Form.of(second)
    assert not strided.is_contiguous()
    assert not strided.T.is_contiguous()
    exact = Form.of(second.double())
    for slack in (0.0, 1.0):
        plain = torch.matmul(*update(residual.double(), keys.double(), exact, slack=slack))
        for given in (keys, strided):
            found = torch.matmul(*update(residual, given, form, slack=slack))
            assert _close(found, plain, 1e-12)
    for each in (form.keeping(strided), Form.of(second.T).keeping(keys)):
        assert _close(each.solve(strided), exact.keeping(keys.double()).solve(keys.double()), 1e-12)
    assert _close(energies(strided, form), energies(keys.double(), exact), 1e-12)
    assert gain(strided[:, 0], strided[:, 1], form) == pytest.approx(
        gain(keys[:, 0].double(), keys[:, 1].double(), exact)
    )
    assert apart(strided, form) == apart(keys.double(), exact)
    back = deletion(residual, strided, form)
    assert all(part.dtype == torch.float64 for part in back)
    mixed = torch.matmul(*mixed_change(residual[:, 0], strided[:, 0], strided[:, 0], form))
    one = torch.matmul(*update(residual[:, :1], strided[:, :1], form, slack=0))
    assert _close(mixed, one, 1e-12)


def test_a_space_of_float32_vectors():
    """Vectors that were stored in float32 serve as well, to their precision."""
    whole = _space()
    stored = Space.below(torch.arange(30.0), torch.linalg.qr(_normal(30, 30, seed=9)).Q.float(), 20)
    keys = _normal(30, 3, seed=1).float()
    changes = []
    for space in (whole, stored):
        form, inside = Form.even(0.3, space.coordinates), space.inside(keys)
        change = update(torch.ones(OUT, 3), inside, form, slack=1, basis_IJ=space.basis_IJ)
        changes.append(torch.matmul(*change))
    assert _close(changes[1], changes[0], 1e-5)
