"""Restraints of closed-form edits against plain references (the self-checks of the cards)."""

from __future__ import annotations

import math

import pytest
import torch

from knowpatch.errors import EditError
from knowpatch.parts import stabilise

OUT, IN, RANK = 12, 30, 4


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _change(size: float = 1.0):
    return size * _normal(OUT, RANK, seed=1), _normal(RANK, IN, seed=2)


def _with_sizes(*sizes: float):
    """left, right of a change with these singular values."""
    left = torch.linalg.qr(_normal(OUT, len(sizes), seed=3)).Q
    right = torch.linalg.qr(_normal(IN, len(sizes), seed=4)).Q
    return left * torch.tensor(sizes, dtype=torch.float64), right.T


def _sizes(left, right):
    return torch.linalg.svdvals(left @ right)[: left.shape[1]]


class TestRect:
    @pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.4, 0.75, 0.999, 1.0])
    def test_the_share_of_entries_that_stay(self, share):
        """round(share * entries) entries stay as they were, all others are 0."""
        change, weight = _normal(OUT, IN), _normal(OUT, IN, seed=1)
        kept = stabilise.rect(change, weight, share)
        assert int((kept != 0).sum()) == round(share * change.numel())
        assert torch.equal(kept[kept != 0], change[kept != 0])

    def test_share_one_is_the_change_itself(self):
        change = _normal(OUT, IN)
        assert stabilise.rect(change, _normal(OUT, IN, seed=1), 1.0) is change

    def test_those_that_stay_changed_most_for_their_size(self):
        """Against a full sort; weights that are 0, and of either sign, count by their size."""
        change, weight = _normal(OUT, IN), _normal(OUT, IN, seed=1)
        weight[0] = 0
        relative = (change.abs() / (weight.abs() + 1e-12)).flatten()
        order = relative.argsort(descending=True)[: round(0.3 * change.numel())]
        plain = torch.zeros(change.numel(), dtype=torch.float64)
        plain[order] = change.flatten()[order]
        found = stabilise.rect(change, weight, 0.3)
        assert torch.equal(found, plain.view_as(change))
        assert torch.equal(found, stabilise.rect(change, -weight, 0.3))

    def test_order_of_rows_and_columns_does_not_matter(self):
        """Permuting both matrices permutes the result, ties included."""
        change, weight = _normal(OUT, IN).round(), _normal(OUT, IN, seed=1).round()
        rows, columns = torch.randperm(OUT), torch.randperm(IN)
        found = stabilise.rect(change, weight, 0.2)
        moved = stabilise.rect(change[rows][:, columns], weight[rows][:, columns], 0.2)
        assert torch.equal(moved, found[rows][:, columns])

    def test_ties_stay_together(self):
        """Where all entries changed alike none comes before another; no change stays none."""
        ones = torch.ones(OUT, IN, dtype=torch.float64)
        assert torch.equal(stabilise.rect(ones, ones, 0.2), ones)
        assert not stabilise.rect(0 * ones, ones, 0.2).any()

    def test_what_is_given_is_not_changed(self):
        change, weight = _normal(OUT, IN), _normal(OUT, IN, seed=1)
        before = change.clone(), weight.clone()
        stabilise.rect(change, weight, 0.2)
        assert torch.equal(change, before[0])
        assert torch.equal(weight, before[1])


class TestLargestSingular:
    @pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (12, 30), (30, 12), (200, 300)])
    def test_equals_the_svd(self, shape):
        weight = _normal(*shape)
        plain = float(torch.linalg.svdvals(weight)[0])
        assert stabilise.largest_singular(weight) == pytest.approx(plain, rel=1e-6)
        assert stabilise.largest_singular(weight.float()) == pytest.approx(plain, rel=1e-6)

    @pytest.mark.parametrize("second", [1.0, 1 - 1e-9, 1 - 1e-5, 1 - 1e-3])
    def test_a_near_second_does_not_stop_it_early(self, second):
        sizes = torch.cat([torch.tensor([1.0, second]), torch.linspace(0, 0.999, 98)]).double()
        turn = torch.linalg.qr(_normal(100, 100)).Q
        assert stabilise.largest_singular(turn * sizes) == pytest.approx(1, rel=1e-6)

    def test_low_rank_and_nothing(self):
        left, right = _with_sizes(3.0, 2.0)
        assert stabilise.largest_singular(left @ right) == pytest.approx(3, rel=1e-6)
        assert stabilise.largest_singular(torch.zeros(4, 5)) == 0

    def test_the_same_each_time(self):
        """Random numbers drawn elsewhere do not matter, and none are used up."""
        weight = _normal(40, 50)
        torch.manual_seed(1)
        first, state = stabilise.largest_singular(weight), torch.get_rng_state()
        torch.manual_seed(2)
        assert stabilise.largest_singular(weight) == first
        torch.manual_seed(1)
        assert torch.equal(torch.get_rng_state(), state)


class TestRestrained:
    def test_small_changes_come_back_as_they_are(self):
        left, right = _with_sizes(5.0, 2.0, 0.1)
        found = stabilise.restrained(left, right, 5.1)
        assert found[0] is left
        assert found[1] is right

    @pytest.mark.parametrize("base", [math.e, 2.0, 1.5, 1.2])
    @pytest.mark.parametrize("share", [0.3, 0.05])
    def test_factors_equal_the_dense_computation(self, base, share):
        """The full SVD of the product, the formula written out; also for factors of any scale."""
        left, right = _change(10.0)
        left, right = left * torch.tensor([1e3, 1.0, 1e-3, 1.0]), right
        u, s, v = torch.linalg.svd(left @ right, full_matrices=False)
        largest = share * float(s[0])
        mapped = (s.log() - math.log(largest)) / math.log(base) + largest
        s = torch.where(s > largest, torch.minimum(s, mapped), s)
        found = torch.matmul(*stabilise.restrained(left, right, largest, base))
        assert (found - u * s @ v).norm() < 1e-6 * (u * s @ v).norm()

    def test_large_ones_become_their_logarithm_and_small_ones_stay(self):
        found = _sizes(*stabilise.restrained(*_with_sizes(40.0, 6.0, 3.0, 0.5), 4.0))
        wanted = [4 + math.log(10), 4 + math.log(1.5), 3.0, 0.5]
        assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-12)

    @pytest.mark.parametrize("factors", [1, RANK, OUT, OUT + 5, IN + 5])
    def test_rank_and_shape(self, factors):
        """No more factors than before, nor than the map has outputs; the rank is the same."""
        left, right = _normal(OUT, factors, seed=1), _normal(factors, IN, seed=2)
        found = stabilise.restrained(left, right, 1e-3)
        assert found[0].shape == (OUT, min(factors, OUT))
        assert found[1].shape == (min(factors, OUT), IN)
        rank = torch.linalg.matrix_rank
        assert rank(found[0] @ found[1]) == rank(left @ right)

    def test_no_factors_and_no_change(self):
        none = torch.zeros(OUT, 0, dtype=torch.float64), torch.zeros(0, IN, dtype=torch.float64)
        assert stabilise.restrained(*none, 1.0) == none
        zeros = torch.zeros(OUT, 1), torch.ones(1, IN)
        assert stabilise.restrained(*zeros, 1.0) == zeros

    @pytest.mark.parametrize("largest", [1e-3, 0.1, 0.9, 1.0, 3.0, 30.0])
    @pytest.mark.parametrize("base", [math.e, 1.2, 2.0])
    def test_never_expansive_and_monotone(self, largest, base):
        """No singular value grows, their order stays, and so the norm of a change never grows."""
        s = torch.logspace(-4, 4, 4001, dtype=torch.float64)
        found = stabilise.held_back(s, largest, base)
        assert (found <= s).all()
        assert (found.diff() > 0).all()
        change = _change()
        norm = stabilise.largest_singular(torch.matmul(*stabilise.restrained(*change, largest)))
        assert norm <= _sizes(*change)[0] * (1 + 1e-12)

    @pytest.mark.parametrize("largest", [0.5, 5.0])
    def test_continuous_at_the_largest(self, largest):
        near = torch.tensor([largest * (1 - 1e-9), largest, largest * (1 + 1e-9)]).double()
        assert (stabilise.held_back(near, largest) - largest).abs().max() < 1e-7

    @pytest.mark.parametrize("base", [math.e, 1.5, 2.0])
    def test_slope_just_above_is_that_of_the_logarithm(self, base):
        """1 / (largest ln b), less than one; exactly one where the formula alone would enlarge."""
        largest, step = 5.0, 1e-6
        above = torch.tensor([largest, largest + step], dtype=torch.float64)
        slope = float(stabilise.held_back(above, largest, base).diff() / step)
        assert slope == pytest.approx(1 / (largest * math.log(base)), rel=1e-4)
        assert slope < 1
        small = torch.tensor([0.1, 0.1 + step], dtype=torch.float64)
        assert float(stabilise.held_back(small, 0.1, base).diff()) == pytest.approx(step)

    def test_turning_the_inputs_turns_the_result(self):
        left, right = _change()
        turn = torch.linalg.qr(_normal(IN, IN, seed=5)).Q
        found = torch.matmul(*stabilise.restrained(left, right, 2.0))
        turned = torch.matmul(*stabilise.restrained(left, right @ turn, 2.0))
        assert torch.allclose(turned, found @ turn, atol=1e-9)


class TestKeptOff:
    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
    def test_the_leading_eigenvectors(self, share):
        """Against the eigenvectors of W^T W: as few as hold the share; protected ones untouched."""
        weight, (_, right) = _normal(OUT, IN, seed=6), _change()
        values, vectors = torch.linalg.eigh(weight.T @ weight)
        values, vectors = values.flip(0)[:OUT], vectors.flip(1)[:, :OUT]
        held = values.cumsum(0) / values.sum()
        count = int((held < share - 1e-9).sum()) + 1
        assert stabilise.leading(weight, share).shape == (IN, count)
        found = stabilise.kept_off(right, stabilise.leading(weight, share))
        assert (found @ vectors[:, :count]).abs().max() < 1e-10
        away = found - right
        assert torch.linalg.matrix_rank(away) <= count
        assert ((away @ found.T).abs() < 1e-10).all()

    def test_other_directions_are_read_as_before(self):
        weight, (_, right) = _normal(OUT, IN, seed=6), _change()
        _, _, v = torch.linalg.svd(weight)
        count = stabilise.leading(weight, 0.5).shape[1]
        found = stabilise.kept_off(right, stabilise.leading(weight, 0.5))
        assert torch.allclose(found @ v[count:].T, right @ v[count:].T, atol=1e-12)

    def test_strength(self):
        """0 changes nothing, a half half of it; twice in full is once in full."""
        weight, (_, right) = _normal(OUT, IN, seed=6), _change()
        whole = stabilise.kept_off(right, stabilise.leading(weight, 0.5))
        half = stabilise.kept_off(right, stabilise.leading(weight, 0.5), 0.5)
        assert torch.equal(stabilise.kept_off(right, stabilise.leading(weight, 0.5), 0.0), right)
        assert torch.allclose(half, (right + whole) / 2, atol=1e-12)
        assert torch.allclose(
            stabilise.kept_off(whole, stabilise.leading(weight, 0.5)), whole, atol=1e-12
        )

    def test_share_nothing_protects_nothing(self):
        weight, (_, right) = _normal(OUT, IN, seed=6), _change()
        assert torch.equal(stabilise.kept_off(right, stabilise.leading(weight, 0.0)), right)

    def test_share_one_leaves_only_what_the_map_does_not_read(self):
        weight, (_, right) = _normal(OUT, IN, seed=6), _change()
        assert (
            stabilise.kept_off(right, stabilise.leading(weight, 1.0)) @ weight.T
        ).abs().max() < 1e-10

    def test_order_of_inputs_does_not_matter(self):
        weight, (_, right) = _normal(OUT, IN, seed=6), _change()
        order = torch.randperm(IN)
        found = stabilise.kept_off(right, stabilise.leading(weight, 0.5))
        moved = stabilise.kept_off(right[:, order], stabilise.leading(weight[:, order], 0.5))
        assert torch.allclose(moved, found[:, order], atol=1e-12)


class TestAnchored:
    @pytest.mark.parametrize("size", [0.01, 0.5, 1.0, 1.4])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_norm_is_the_anchor_and_the_direction_stays(self, size, dtype):
        """Scaled up or down; in the type that was given."""
        output = _normal(OUT).to(dtype)
        wanted = _normal(OUT, seed=1)
        delta = (size * wanted / wanted.norm() * 7).to(dtype) - output
        found = stabilise.anchored(output, delta, 7.0)
        assert found.dtype == dtype
        after = output + found
        assert float(after.norm()) == pytest.approx(7, rel=1e-5)
        assert float(after.double() @ wanted / wanted.norm()) == pytest.approx(7, rel=1e-5)

    def test_a_wish_of_more_than_twice_the_norm_is_given_up(self):
        output, wanted = torch.zeros(3), torch.tensor([1.0, 0, 0])
        assert stabilise.anchored(output, 2.01 * wanted, 1.0) is None
        assert torch.allclose(stabilise.anchored(output, 1.99 * wanted, 1.0), wanted)
        assert torch.allclose(stabilise.anchored(output, 4.9 * wanted, 1.0, most=5), wanted)

    def test_cap_never_enlarges(self):
        output, delta = 0.1 * _normal(OUT), 0.1 * _normal(OUT, seed=1)
        size = float((output + delta).norm())
        found = stabilise.anchored(output, delta, 2 * size, cap=True)
        assert torch.allclose(found, delta, atol=1e-15)
        found = stabilise.anchored(output, delta, size / 1.5, cap=True)
        assert float((output + found).norm()) == pytest.approx(size / 1.5)

    def test_nothing_stays_nothing(self):
        """Output and delta that cancel have no direction to be given a norm in."""
        output = _normal(OUT)
        assert torch.equal(stabilise.anchored(output, -output, 3.0), -output)


class TestAnchor:
    def test_the_largest_twentieth_is_left_out(self):
        """Five of 100, whatever their size and place; and the error is that of a mean of 95."""
        norms = _normal(100).abs() + 10
        largest = norms.argsort(descending=True)[:5]
        rest = norms[norms.argsort()[:95]]
        norms[largest] = 1e6
        mean, error = stabilise.anchor(norms)
        assert mean == pytest.approx(float(rest.mean()))
        assert error == pytest.approx(float(rest.std()) / 95**0.5)

    def test_few_norms_are_all_used(self):
        assert stabilise.anchor(torch.tensor([1.0, 3.0])) == pytest.approx((2, 1))
        assert stabilise.anchor(torch.full((20,), 4.0)) == (4, 0)

    @pytest.mark.parametrize("count", [0, 1])
    def test_one_has_no_error(self, count):
        with pytest.raises(EditError, match=rf"at least two pilot edits, not {count}"):
            stabilise.anchor(torch.ones(count))
