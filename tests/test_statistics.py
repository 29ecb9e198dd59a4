"""Intervals and comparisons: the card's cases, by hand, and what must not depend on the road."""

from __future__ import annotations

import time

import numpy as np
import pytest

from knowpatch.bench.statistics import (
    STREAM,
    Design,
    Resamples,
    bootstrap,
    holm,
    paired,
    paired_all,
    records_needed,
    wilson,
)


def values(*numbers: float) -> list[dict[str, float]]:
    return [{"value": number} for number in numbers]


def ratio(means: dict[str, float]) -> float | None:
    return means["hits"] / means["tries"] if means.get("tries") else None


def test_all_ones_are_not_certain():
    """Replicates of ones are ones; as shares they get Wilson's interval instead."""
    ones = values(*[1.0] * 100)
    certain = bootstrap(ones)
    assert (certain.mean, certain.low, certain.high, certain.n) == (1, 1, 1, 100)
    share = bootstrap(ones, share=True)
    assert share.low == pytest.approx(0.9630, abs=5e-5)
    assert share.high == 1
    none = bootstrap(values(*[0.0] * 100), share=True)
    assert (none.low, none.high) == (0, pytest.approx(0.0370, abs=5e-5))


def test_wilson_is_the_textbook_s():
    """8 of 10: .4902 to .9433."""
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_the_interval_is_that_of_the_normal_law():
    """Of 400 coin flips: .5 plus or minus .049; the same twice, another with another seed."""
    coins = values(*[float(i % 2) for i in range(400)])
    found = bootstrap(coins, share=True)
    assert found.mean == 0.5
    assert (found.low, found.high) == pytest.approx((0.451, 0.549), abs=0.006)
    assert found == bootstrap(coins, share=True)
    assert found != bootstrap(coins, share=True, seed=7)


def test_records_that_lack_a_column_do_not_count():
    """A missing value is not zero, and n says how many there were."""
    found = bootstrap([{"value": 1.0}, {}, None, {"value": 0.0}, {"other": 3.0}])
    assert (found.mean, found.n) == (0.5, 2)
    assert bootstrap([{}, None]) is None
    assert bootstrap([]) is None


def test_one_record_has_no_interval():
    """One record says nothing about others, unless it is a share that Wilson can bound."""
    assert bootstrap(values(0.4)).low is None
    assert bootstrap(values(1.0), share=True).low == pytest.approx(0.2065, abs=1e-4)


def test_a_ratio_is_computed_anew_in_each_replicate():
    """The ratio of means, not the mean of ratios; its interval holds it."""
    records = [{"hits": 1.0, "tries": 1.0}] * 30 + [{"hits": 0.0, "tries": 3.0}] * 30
    found = bootstrap(records, ratio)
    assert found.mean == pytest.approx(0.25)  # the mean of ratios is .5
    assert found.low < 0.25 < found.high
    shares = [ratio({"hits": k / 60, "tries": (180 - 2 * k) / 60}) for k in range(61)]
    assert shares[18] < found.low < shares[26]
    assert bootstrap([{"hits": 1.0}], ratio) is None


def test_records_of_a_subject_are_drawn_together():
    """Ten records of each of ten subjects, alike within a subject: as uncertain as ten records."""
    subjects = [float(i % 2) for i in range(10)]
    records = values(*[value for value in subjects for _ in range(10)])
    keys = tuple(i // 10 for i in range(100))
    clustered = bootstrap(records, design=Design(groups=keys))
    alone = bootstrap(values(*subjects))
    assert (clustered.low, clustered.high) == (alone.low, alone.high)
    loose = bootstrap(records)
    assert clustered.high - clustered.low > 2 * (loose.high - loose.low)


def test_a_stream_is_drawn_in_blocks():
    """Runs of equal values: blocks see that they hang together. Short streams get short blocks."""
    runs = values(*[float(i // 20 % 2) for i in range(200)])
    blocks, loose = bootstrap(runs, design=STREAM), bootstrap(runs)
    assert blocks.high - blocks.low > 2 * (loose.high - loose.low)
    assert [STREAM.length(n) for n in (3, 50, 100, 1000)] == [1, 5, 10, 20]


@pytest.mark.parametrize(
    "design", [Design(), STREAM, Design(groups=tuple(i % 7 for i in range(60)))]
)
def test_replicates_are_as_large_as_the_records(design: Design):
    """Every replicate holds as many units as there are; the first is the records themselves."""
    weights = Resamples(60, design, replicates=50).weights
    assert (weights[0] == 1).all()
    assert weights.shape == (51, 60)
    assert weights.sum(axis=1) == pytest.approx(60, abs=20 if design.groups else 0)


def test_paired_difference_by_hand():
    """The card's: (1,1,0,1) against (0,1,0,1) is .25; one record differs, so p is 1."""
    found = paired(values(1, 1, 0, 1), values(0, 1, 0, 1))
    assert (found.difference.mean, found.difference.n) == (0.25, 4)
    assert found.difference.low == 0
    assert found.p == 1
    assert paired(values(1.0), [None]) is None


def test_p_is_that_of_the_sign_test():
    """Eight records that all differ by one: 2 of 256 flips are as far from nothing."""
    found = paired(values(*[1.0] * 8), values(*[0.0] * 8))
    assert found.p == pytest.approx(2 / 256, abs=0.003)
    assert found == paired(values(*[1.0] * 8), values(*[0.0] * 8))


def test_under_no_difference_p_is_even():
    """Of 60 pairs of noise about a twentieth is below .05."""
    random = np.random.default_rng(3)
    noise = [tuple(values(*random.normal(size=30)) for _ in range(2)) for _ in range(60)]
    ps = [paired(a, b).p for a, b in noise]
    assert sum(p < 0.05 for p in ps) <= 8
    assert 0.35 < np.mean(ps) < 0.65


def test_only_records_that_both_have_are_compared():
    """What one of the two lacks is left out of both sides, ratios too."""
    a = [{"hits": 1.0, "tries": 2.0}, {"hits": 9.0, "tries": 9.0}, {"hits": 1.0, "tries": 2.0}]
    b = [{"hits": 1.0, "tries": 4.0}, None, {"hits": 1.0, "tries": 4.0}]
    found = paired(a, b, ratio)
    assert (found.difference.mean, found.difference.n) == (0.25, 2)


def test_several_at_once_are_as_one_by_one():
    """Comparisons that share their draws come out as they do alone."""
    a, b = values(1, 1, 0, 1, 0), values(0, 1, 0, 0, 1)
    other = [{"hits": float(i), "tries": 4.0} for i in range(5)]
    least = [{"hits": 1.0, "tries": 4.0}] * 5
    together = paired_all([(a, b, lambda m: m.get("value")), (other, least, ratio)])
    assert together == [paired(a, b), paired(other, least, ratio)]
    assert paired_all([]) == []


def test_holm_by_hand():
    """.01, .04, .03 of three: .03, .06, .06; never above 1, never out of order."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_records_needed():
    """The card's: 385 for .05 at one half."""
    assert records_needed(0.05) == 385


def test_ten_metrics_of_500_records_take_less_than_a_second():
    """The card's budget, with a ratio, which has to be called for each replicate."""
    records = [{"hits": float(i % 3), "tries": 3.0} for i in range(500)]
    start = time.perf_counter()
    resamples = Resamples(500)
    for _ in range(10):
        resamples.summary(records, ratio)
    assert time.perf_counter() - start < 1
