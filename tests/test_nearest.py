"""The exact search against a plain one: every distance in float32, the least taken."""

from __future__ import annotations

import random

import pytest
import torch

from knowpatch.parts import nearest
from knowpatch.parts.nearest import Index


def _plain(keys, queries, count):
    gaps = torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist")
    order = gaps.argsort(dim=1, stable=True)[:, :count]
    return gaps.gather(1, order), order


def _crowded(count, size, seed):
    """Keys with a mean in common, many in clumps that bfloat16 cannot tell apart, some twice."""
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randn(count, size, generator=draw) + 2 * torch.randn(size, generator=draw)
    clump = keys[: count // 4] + 1e-3 * torch.randn(count // 4, size, generator=draw)
    keys[count // 4 : 2 * (count // 4)] = clump
    keys[-5:] = keys[:5]
    queries = torch.cat(
        [
            keys[::17] + 1e-3 * torch.randn(len(keys[::17]), size, generator=draw),
            torch.randn(9, size, generator=draw),
            keys[:3],
        ]
    )
    return keys, queries


@pytest.mark.parametrize("count", [1, 3, 64])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("size", [10, 65, 700, 5000])
def test_the_nearest_are_those_of_a_plain_search(size, unit, count):
    """Distances and numbers, bit for bit, also where the shortlist alone could not decide."""
    keys, queries = _crowded(size, 48, size)
    if unit:
        keys, queries = (torch.nn.functional.normalize(x, dim=1) for x in (keys, queries))
    gaps, numbers = Index(keys).nearest(queries, count)
    wanted, order = _plain(keys, queries, min(count, size))
    assert torch.equal(gaps, wanted)
    assert torch.equal(numbers, order)


def test_what_a_query_finds_does_not_depend_on_those_beside_it(monkeypatch):
    keys, queries = _crowded(2000, 96, 1)
    index, draw = Index(keys), random.Random(0)
    gaps, numbers = index.nearest(queries, 5)
    for _ in range(40):
        some = draw.choices(range(len(queries)), k=draw.randint(1, 9))
        mine, whose = index.nearest(queries[some], 5)
        assert torch.equal(mine, gaps[some])
        assert torch.equal(whose, numbers[some])
    monkeypatch.setattr(nearest, "HELD", 5000)
    mine, whose = index.nearest(queries, 5)
    assert torch.equal(mine, gaps)
    assert torch.equal(whose, numbers)


def test_only_some_keys_are_searched():
    keys, queries = _crowded(1000, 48, 2)
    for part in (slice(0, 10), slice(100, 700), slice(999, 1000)):
        gaps, numbers = Index(keys).nearest(queries, 2, among=part)
        wanted, order = _plain(keys[part], queries, 2)
        assert torch.equal(gaps, wanted)
        assert torch.equal(numbers, order + part.start)


def test_the_shortlist_is_short():
    """Scattered keys: a few in a thousand are measured again."""
    draw = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(20_000, 512, generator=draw), dim=1)
    queries = torch.nn.functional.normalize(torch.randn(20, 512, generator=draw), dim=1)
    kept = Index(keys)._shortlist(queries, 1, 0, len(keys))
    assert bool((kept.sum(1) >= 1).all())
    assert float(kept.float().mean()) < 0.02


def test_what_is_not_a_number_is_answered():
    keys, queries = _crowded(300, 48, 3)
    queries[1] = float("nan")
    gaps, numbers = Index(keys).nearest(queries)
    assert bool(torch.isnan(gaps[1]).all())
    wanted, order = _plain(keys, queries[2:], 1)
    assert torch.equal(gaps[2:], wanted)
    assert torch.equal(numbers[2:], order)
