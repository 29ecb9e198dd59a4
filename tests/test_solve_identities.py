"""What the cards of the locate-then-edit methods promise, each against the card's own formula.

The references are written out with dense float64 matrices and plain inverses; the letters are the
cards': W weights, K keys, V wanted values, R = V - W K, C0 the second moment of K0, Kp the keys of
earlier edits, P the projector on the eigenvectors of C0 below TAU.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.linalg import inv

from knowpatch.parts.solve import Form, deletion, energies, mixed_change, update
from knowpatch.parts.space import Space

OUT, IN, TAU = 9, 24, 0.05
EYE = torch.eye(IN, dtype=torch.float64)


def normal(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def world(n: int = 4, earlier: int = 5) -> SimpleNamespace:
    """One case, with eigenvalues of C0 from 0.001 to 10."""
    turn = torch.linalg.qr(normal(IN, IN, seed=1)).Q
    K0 = (turn * torch.logspace(-1.5, 0.5, IN, dtype=torch.float64)) @ normal(IN, 400, seed=2)
    C0 = K0 @ K0.T / 400
    values, vectors = torch.linalg.eigh(C0)
    W, V, K = normal(OUT, IN, seed=3), normal(OUT, n, seed=4), normal(IN, n, seed=5)
    Kp, space = normal(IN, earlier, seed=6), Space.below(values, vectors, TAU)
    U0 = vectors[:, values < TAU]
    return SimpleNamespace(
        W=W, V=V, K=K, R=V - W @ K, K0=K0, C0=C0, Kp=Kp, Cp=Kp @ Kp.T, U0=U0, P=U0 @ U0.T,
        kept_out=vectors[:, values >= TAU], space=space, k=space.inside(K), kp=space.inside(Kp),
    )  # fmt: skip


def close(found: torch.Tensor, wanted: torch.Tensor, within: float = 1e-9) -> bool:
    assert found.dtype == torch.float64
    assert found.shape == wanted.shape
    return bool((found - wanted).norm() <= within * wanted.norm())


def change(R, K, form, slack=1.0, space=None) -> torch.Tensor:
    basis = None if space is None else space.basis_IJ
    return torch.matmul(*update(R, K, form, slack=slack, basis_IJ=basis))


def alpha_form(c: SimpleNamespace, l2: float, kept: bool = True) -> Form:
    form = Form.even(l2, c.space.coordinates)
    return form.keeping(c.kp) if kept else form


def rome(c):
    u = inv(c.C0) @ c.K
    return c.R @ u.T / (u.T @ c.K), (c.K, Form.of(c.C0), 0.0)


def emmet_exact(c):
    inverse = inv(c.C0)
    return c.R @ inv(c.K.T @ inverse @ c.K) @ c.K.T @ inverse, (c.K, Form.of(c.C0), 0.0)


def emmet_published(c):
    S, eye = 100 * c.C0 + 0.3 * EYE, torch.eye(c.K.shape[1], dtype=torch.float64)
    wanted = c.R @ inv(c.K.T @ inv(S) @ c.K + 0.1 * eye) @ c.K.T @ inv(S)
    return wanted, (c.K, Form.of(S), 0.1)


def memit(c):
    return c.R @ (inv(30 * c.C0 + c.K @ c.K.T) @ c.K).T, (c.K, Form.of(30 * c.C0), 1.0)


def memit_as_slack(c):
    return memit(c)[0], (c.K, Form.of(c.C0), 30.0)


def memit_in_sequence(c):
    wanted = c.R @ (inv(30 * c.C0 + c.Cp + c.K @ c.K.T) @ c.K).T
    return wanted, (c.K, Form.of(c.C0).scaled(30).keeping(c.Kp), 1.0)


def encore(c):
    S = 30 * c.C0 + 2 * EYE
    wanted = c.R @ (inv(S + c.Cp + c.K @ c.K.T) @ c.K).T
    return wanted, (c.K, Form.of(S).keeping(c.Kp), 1.0)


def alphaedit_published(c):
    wanted = (inv(c.P @ (c.K @ c.K.T + c.Cp) + 0.4 * EYE) @ c.P @ c.K @ c.R.T).T
    return wanted, (c.k, alpha_form(c, 0.4), 1.0, c.space)


def alphaedit_symmetric(c):
    wanted = (inv(c.P @ (c.K @ c.K.T + c.Cp) @ c.P + 0.4 * EYE) @ c.P @ c.K @ c.R.T).T
    return wanted, alphaedit_published(c)[1]


def alphaedit_reduced(c):
    k, small = c.U0.T @ c.K, torch.eye(c.U0.shape[1], dtype=torch.float64)
    wanted = c.R @ k.T @ inv(k @ k.T + c.U0.T @ c.Cp @ c.U0 + 0.4 * small) @ c.U0.T
    return wanted, alphaedit_published(c)[1]


def alphaedit_dual(c):
    k, eye = c.U0.T @ c.K, torch.eye(c.K.shape[1], dtype=torch.float64)
    solved = k.T @ inv(c.U0.T @ c.Cp @ c.U0 + 0.4 * torch.eye(len(k), dtype=torch.float64))
    return c.R @ inv(eye + solved @ k) @ solved @ c.U0.T, alphaedit_published(c)[1]


def evoedit(c):
    Q = torch.linalg.svd(c.P @ c.Kp, full_matrices=False).U
    P, eye = c.P - Q @ Q.T, torch.eye(c.K.shape[1], dtype=torch.float64)
    wanted = c.R @ inv(c.K.T @ P @ c.K + 0.4 * eye) @ c.K.T @ P
    left = c.space.without(c.Kp, 1e-6)
    return wanted, (left.inside(c.K), Form.even(0.4, left.width), 1.0, left)


def evoedit_first(c):
    wanted = (inv(c.P @ c.K @ c.K.T + 0.4 * EYE) @ c.P @ c.K @ c.R.T).T  # AlphaEdit, Cp = 0
    return wanted, (c.k, alpha_form(c, 0.4, kept=False), 1.0, c.space)


def betaedit(c):
    S = c.P @ (c.K @ c.K.T + c.Cp + 50 * c.C0) + 0.4 * EYE
    C = c.U0.T @ (50 * c.C0) @ c.U0 + 0.4 * torch.eye(c.U0.shape[1], dtype=torch.float64)
    wanted = (inv(S) @ c.P @ c.K @ c.R.T).T
    return wanted, (c.k, Form.of(C).keeping(c.kp), 1.0, c.space)


def betaedit_without_leak(c):
    return alphaedit_published(c)[0], (c.k, Form.of(alpha_form(c, 0.4).matrix()), 1.0, c.space)


def ultraedit(c):
    H, values_TD = c.K.T, c.R.T  # rows are tokens
    return (inv(H.T @ H + 0.7 * EYE) @ H.T @ values_TD).T, (c.K, Form.even(0.7, IN), 1.0)


def malmen_dual(c):
    H, eye = c.K.T, torch.eye(c.K.shape[1], dtype=torch.float64)
    return c.R @ inv(H @ H.T + 0.7 * eye) @ H, (c.K, Form.even(0.7, IN), 1.0)


BATCHED = [
    emmet_published, memit, memit_as_slack, memit_in_sequence, encore, alphaedit_published,
    alphaedit_symmetric, alphaedit_reduced, alphaedit_dual, evoedit, evoedit_first, betaedit,
    betaedit_without_leak, ultraedit, malmen_dual,
]  # fmt: skip
CASES = [(rome, 1), *((emmet_exact, n) for n in (1, 4, 15, IN))]
CASES += [(card, n) for card in BATCHED for n in (1, 4, 15, 60)]  # 15 > D, 60 > I


@pytest.mark.parametrize(("card", "n"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_update_is_the_formula_of_the_card(card, n):
    """Every row of the index's table, for n below D, above D and above I; rank <= min(n, D)."""
    c = world(n)
    wanted, (keys, form, slack, *space) = card(c)
    left, right = update(
        c.R, keys, form, slack=slack, basis_IJ=space[0].basis_IJ if space else None
    )
    assert close(left @ right, wanted)
    assert left.shape == (OUT, min(n, OUT))
    assert right.shape == (min(n, OUT), IN)


@pytest.mark.parametrize("n", [1, 4, 15, IN, 60])
@pytest.mark.parametrize("alpha", [0.01, 1.0, 100.0])
def test_dual_is_primal_and_the_residual_is_as_stated(n, alpha):
    """R (G + alpha)^-1 K'S^-1 = R K'(alpha S + K K')^-1; W'K - V = -R alpha (G + alpha)^-1."""
    c = world(n)
    S, eye = c.C0 + c.Cp, torch.eye(n, dtype=torch.float64)
    G = c.K.T @ inv(S) @ c.K
    found = change(c.R, c.K, Form.of(c.C0).keeping(c.Kp), alpha)
    assert close(found, c.R @ inv(G + alpha * eye) @ c.K.T @ inv(S))
    assert close(found, c.R @ c.K.T @ inv(alpha * S + c.K @ c.K.T))
    missing = (c.W + found) @ c.K - c.V
    assert (missing + alpha * c.R @ inv(G + alpha * eye)).norm() < 1e-9 * c.R.norm()


def test_memit_misses_by_the_stated_share():
    """W'K - V = -R (I + K'C0^-1 K / lambda)^-1; none at lambda -> 0, all at lambda -> infinity."""
    c = world()
    G, eye = c.K.T @ inv(c.C0) @ c.K, torch.eye(4, dtype=torch.float64)
    found = change(c.R, c.K, Form.of(c.C0).scaled(30))
    assert close((c.W + found) @ c.K - c.V, -c.R @ inv(eye + G / 30))
    small, large = (change(c.R, c.K, Form.of(c.C0).scaled(size)) for size in (1e-9, 1e12))
    assert (small @ c.K - c.R).norm() < 1e-8 * c.R.norm()
    assert large.norm() < 1e-6 * found.norm()


def test_one_key_writes_the_share_that_its_energy_says():
    """n = 1: gamma = g / (alpha + g); in the null space g = |Pk|^2 / L2."""
    c = world(1)
    for keys, form, slack, space in (
        (c.K, Form.of(c.C0).keeping(c.Kp), 3.0, None),
        (c.k, alpha_form(c, 0.4, kept=False), 1.0, c.space),
    ):
        g = energies(keys, form)
        assert g.shape == (1,)
        assert close(change(c.R, keys, form, slack, space) @ c.K, c.R * g / (slack + g))
    assert float(g) == pytest.approx(float((c.P @ c.K).norm() ** 2 / 0.4))


def test_energies_are_the_diagonal_of_the_gram_matrix():
    c = world()
    wanted = (c.K.T @ inv(c.C0 + c.Cp) @ c.K).diagonal()
    assert close(energies(c.K, Form.of(c.C0).keeping(c.Kp)), wanted)


def test_rome_with_an_averaged_key_is_the_published_mix():
    """(V - W k)(C0^-1 kmean)' / ((C0^-1 kmean)'k); with kmean = k it is the exact form (R-ROME)."""
    c = world(1)
    k, mean = c.K[:, 0], c.K[:, 0] + 0.2 * normal(IN, seed=7)
    u = inv(c.C0) @ mean
    mixed = torch.matmul(*mixed_change(c.R[:, 0], mean, k, Form.of(c.C0)))
    assert close(mixed, torch.outer(c.R[:, 0], u) / (u @ k))
    assert close(torch.matmul(*mixed_change(c.R[:, 0], k, k, Form.of(c.C0))), rome(c)[0])
    assert float(u @ mean) > 0


def test_weight_and_slack_of_emmet_are_one_number():
    """At beta = 0, slack alpha on w C0 is slack alpha w on C0; without slack w does not matter."""
    c = world()
    heavy = change(c.R, c.K, Form.of(1000 * c.C0), 0.1)
    assert close(heavy, change(c.R, c.K, Form.of(c.C0), 100.0))
    exact = change(c.R, c.K, Form.of(c.C0), 0)
    assert close(change(c.R, c.K, Form.of(1e5 * c.C0), 0), exact)
    assert close(exact @ c.K, c.R)


def test_emmet_is_the_least_change():
    """Any other change with W'K = V has a larger tr(dW C0 dW')."""
    c = world()
    exact = change(c.R, c.K, Form.of(c.C0), 0)
    aside = EYE - c.K @ inv(c.K.T @ c.K) @ c.K.T
    for seed in range(5):
        other = normal(OUT, IN, seed=100 + seed) @ aside
        slope = torch.trace(exact @ c.C0 @ other.T)
        assert slope.abs() < 1e-10 * exact.norm() * other.norm()
        for size in (0.01, -1.0):
            moved = exact + size * other
            assert torch.trace(moved @ c.C0 @ moved.T) > torch.trace(exact @ c.C0 @ exact.T)


def test_a_larger_floor_makes_a_smaller_change():
    """ENCORE: beta grows, the Frobenius norm falls; beta = 0 is MEMIT with Cp."""
    c = world()
    forms = [Form.of(30 * c.C0 + beta * EYE).keeping(c.Kp) for beta in (0, 0.1, 1, 10, 100)]
    found = [change(c.R, c.K, form) for form in forms]
    norms = [float(each.norm()) for each in found]
    assert norms == sorted(set(norms), reverse=True)
    assert close(found[0], memit_in_sequence(c)[0])


@pytest.mark.parametrize("orders", [[[0, 1], [2], [3, 4, 5], [6]], [[5], [6, 0, 3], [4, 1, 2]]])
@pytest.mark.parametrize("inside", [False, True])
def test_batches_with_kept_keys_are_one_shot(orders, inside):
    """MEMIT, and AlphaEdit in its reduced form: neither the split nor the order matters."""
    c = world(7)
    keys, form, space = c.K, Form.of(30 * c.C0), None
    once = c.W + memit(c)[0]
    if inside:
        keys, form, space = c.k, alpha_form(c, 0.4, kept=False), c.space
        once = c.W + evoedit_first(c)[0]
    weight = c.W
    for batch in orders:
        residual = c.V[:, batch] - weight @ c.K[:, batch]
        weight = weight + change(residual, keys[:, batch], form, space=space)
        form = form.keeping(keys[:, batch])
    assert close(weight - c.W, once - c.W, 1e-8)
    assert form.kept == 7


@pytest.mark.parametrize("gone", [[0], [4], [9], [2, 3, 7], [0, 9], [*range(10)]])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("weight_of_c0", [30.0, 0.3])
def test_deletion_is_never_having_written(gone, inside, weight_of_c0):
    """First, middle, last, several, all: W and S are as if those facts had not been there."""
    c = world(10)
    start, keys, basis = Form.of(c.C0).scaled(weight_of_c0), c.K, EYE
    if inside:
        start, keys, basis = alpha_form(c, weight_of_c0 / 50, kept=False), c.k, c.space.basis_IJ
    rest = [number for number in range(10) if number not in gone]

    def sequence(numbers):
        weight, form = c.W, start
        for number in numbers:
            k = keys[:, [number]]
            residual = c.V[:, [number]] - weight @ c.K[:, [number]]
            weight = weight + change(residual, k, form) @ basis.T
            form = form.keeping(k)
        return weight, form

    weight, form = sequence(range(10))
    written = c.V[:, gone] - weight @ c.K[:, gone]
    never, after = sequence(rest)
    left, right = deletion(written, keys[:, gone], after)
    # The card's own formula, with the form that still holds the facts.
    k, solved = keys[:, gone], inv(form.matrix()) @ keys[:, gone]
    plain = -written @ inv(torch.eye(len(gone)).double() - k.T @ solved) @ solved.T
    assert close(left @ right, plain, 1e-8)
    assert close(weight + left @ right @ basis.T, never, 1e-8)
    assert close(form.matrix() - keys[:, gone] @ keys[:, gone].T, after.matrix(), 1e-8)
    assert after.kept == len(rest)


def test_deletion_of_a_fact_that_is_written_almost_whole():
    """At a gain of 1 - 1e-5: 1 - k'M^-1 k is a small difference, and loses the digits."""
    c = world(3)
    size = 1e-5 * float((c.K.T @ inv(c.C0) @ c.K).diagonal().min())
    form = Form.of(c.C0).scaled(size).keeping(c.K[:, 1:])
    both = Form.of(c.C0).scaled(size)
    weight = c.W + change(c.R, c.K, both)
    never = c.W + change(c.R[:, 1:], c.K[:, 1:], both)
    written = size * (c.R @ inv(c.K.T @ inv(c.C0) @ c.K + size * torch.eye(3).double()))[:, :1]
    found = weight + torch.matmul(*deletion(written, c.K[:, :1], form))
    assert close(found, never, 1e-8)


def test_a_conflicting_fact_replaces_the_old_one():
    """Old pair out, new pair in: as if the new one had been there alone."""
    c = world(5)
    weight = c.W + memit(c)[0]
    old, start = c.K[:, :1], Form.of(30 * c.C0)
    written = c.V[:, :1] - weight @ old
    weight = weight + torch.matmul(*deletion(written, old, start.keeping(c.K[:, 1:])))
    wanted = normal(OUT, 1, seed=8)
    weight = weight + change(wanted - weight @ old, old, start.keeping(c.K[:, 1:]))
    values = torch.cat([wanted, c.V[:, 1:]], dim=1)
    assert close(weight, c.W + change(values - c.W @ c.K, c.K, start), 1e-8)


def test_a_lossy_write_is_made_good_by_the_next_batch():
    """(R K' - eps C_before) C_after^-1 lands on the one-shot solution whatever was lost."""
    c = world(6)
    start, lost = Form.of(30 * c.C0), 0.01 * normal(OUT, IN, seed=9)
    before, after = start.keeping(c.K[:, :3]), start.keeping(c.K)
    weight = c.W + change(c.R[:, :3], c.K[:, :3], start) + lost
    late = c.K[:, 3:]
    ideal = change(c.V[:, 3:] - weight @ late, late, before)
    weight = weight + ideal - after.solve(before.matrix() @ lost.T).T
    assert close(weight, c.W + memit(c)[0], 1e-10)


def test_the_null_space_is_left_alone():
    """Nothing above TAU is touched; what is below leaks at most TAU |dW|^2 per key over text."""
    c = world(6)
    found = change(c.R, c.k, alpha_form(c, 0.4), space=c.space)
    assert (found @ c.kept_out).norm() < 1e-10 * found.norm()
    preserved = c.K0 - c.P @ c.K0
    assert (found @ preserved).abs().max() <= 1e-5 * (c.W @ preserved).abs().max()
    assert 0 < (found @ c.K0).norm() ** 2 / c.K0.shape[1] <= TAU * found.norm() ** 2
    P = c.space.inside(torch.eye(IN, dtype=torch.float64))
    P = P if c.space.basis_IJ is None else c.space.basis_IJ @ P
    assert close(P @ P, P, 1e-13)
    assert float(P.trace()) == pytest.approx(c.space.room)
    assert torch.linalg.matrix_norm(c.C0 @ P, 2) < TAU
    assert close(P @ c.K, c.U0 @ (c.U0.T @ c.K), 1e-12)


def test_alphaedit_writes_everything_as_its_ridge_vanishes():
    """Cp = 0, L2 -> 0: dW K -> R while rank(PK) = n; beyond that it cannot, but is finite."""
    c = world(6)
    assert torch.linalg.matrix_rank(c.P @ c.K) == 6
    assert close(
        change(c.R, c.k, Form.even(1e-9, c.space.coordinates), space=c.space) @ c.K, c.R, 1e-7
    )
    many = world(c.space.width + 3)
    found = change(many.R, many.k, Form.even(1e-6, c.space.coordinates), space=c.space)
    assert found.isfinite().all()
    assert (found @ many.K - many.R).norm() > 1e-3 * many.R.norm()


@pytest.mark.parametrize("n", [1, 4])
def test_betaedit_leaks_less_than_alphaedit_at_the_same_gain(n):
    """tr(dW C0 dW') is strictly smaller: one key at equal gamma, several when written whole."""
    c = world(n)
    beta = Form.of(betaedit(c)[1][1].matrix() - c.kp @ c.kp.T)
    slack = 1.0 if n == 1 else 0.0
    l2 = float((c.k**2).sum() / energies(c.k, beta)) if n == 1 else 1.0
    alpha = Form.even(l2, c.space.coordinates)
    changes = [change(c.R, c.k, form, slack, c.space) for form in (alpha, beta)]
    assert close(changes[0] @ c.K, changes[1] @ c.K)
    leaks = [float(torch.trace(each @ c.C0 @ each.T)) for each in changes]
    assert leaks[1] < 0.95 * leaks[0]
