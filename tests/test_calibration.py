"""Calibration: thresholds from a model's own scores, and how they are told."""

from __future__ import annotations

import pytest
import torch

from knowpatch.parts import calibration
from knowpatch.parts.calibration import Calibration, calibrate, kept_at
from knowpatch.parts.pilots import pilots
from knowpatch.probes import LEAD_INS, controls, rephrased


def test_one_in_a_hundred_passes():
    outside = tuple(number / 1000 for number in range(200))
    near = Calibration("similarity", (0.9, 0.1, 0.95, 0.199), outside)
    assert near.threshold() == 0.197
    assert near.share(near.outside, near.threshold()) == 0.01
    assert near.share(near.inside, near.threshold()) == 0.75
    far = Calibration("distance", (0.001, 0.5), outside)
    assert far.threshold() == 0.002
    assert far.share(far.outside, far.threshold()) == 0.01
    assert "passed by 50 % of 2 reworded prompts" in far.told(0.002)
    assert "by 1.0 % of 200 prompts out of scope" in far.told(0.002)


def test_every_threshold_has_its_rate():
    """However many are tied, never more than the rate passes."""
    for outside in ((0.5,), (0.5, 0.5, 0.5), (0.1, 0.9), tuple([0.3] * 99 + [0.8])):
        for measure in ("similarity", "distance"):
            found = Calibration(measure, (0.0,), outside)
            assert found.share(outside, found.threshold()) <= calibration.RATE


@pytest.mark.parametrize("measure", ["similarity", "distance"])
def test_own_key_inside_best_of_all_outside(measure):
    """Reworded prompts are held against their own key, prompts out of scope against every key."""
    asked = []

    def keys(prompts):
        asked.append([one.prompt for one in prompts])
        return prompts

    def scores(queries, bank):
        words = [set(one.prompt.split()) for one in bank]
        rows = [[len(set(q.prompt.split()) & each) / len(each) for each in words] for q in queries]
        close = torch.tensor(rows)
        return close if measure == "similarity" else 1 - close

    found = calibrate("a model", {"method": measure}, measure, keys, scores)
    bank, reworded, outside = asked
    assert bank == [fact.prompt for fact in pilots(60)]
    assert len(reworded) == len(found.inside) == 60 * (1 + len(LEAD_INS))
    assert len(outside) == len(found.outside) == 120 + len(controls())
    assert all(text.startswith(LEAD_INS) for text in reworded[60:])
    assert tuple(reworded[:60]) == rephrased()
    assert not set(outside) & set(bank)
    value = found.inside[0]
    words = set(bank[0].split())
    own = len(set(reworded[0].split()) & words) / len(words)
    assert value == pytest.approx(own if measure == "similarity" else 1 - own)
    again = calibrate("a model", {"method": measure}, measure, pytest.fail, pytest.fail)
    assert again == found
    assert kept_at("a model", {"method": measure}).is_file()
    assert kept_at("another", {"method": measure}) != kept_at("a model", {"method": measure})


def test_prompts_in_other_words_name_the_subject_and_are_no_others():
    facts = pilots(60)
    assert len(set(rephrased())) == len(facts)
    for text, fact in zip(rephrased(), facts, strict=True):
        assert fact.subject.casefold() in text.casefold()
        assert text != fact.prompt
        assert fact.target not in text
    others = calibration.other_questions()
    assert len(others) > 40
    assert {one.subject for one in others} <= {fact.subject for fact in facts}
    assert not {one.prompt for one in others} & {fact.prompt for fact in facts}


def test_the_parting_threshold_loses_least():
    found = Calibration("similarity", (0.9, 0.8, 0.7, 0.4), (0.5, 0.3, 0.2, 0.75))
    assert found.parting() == 0.5
    assert found.share(found.inside, 0.5) - found.share(found.outside, 0.5) == 0.5
    apart = Calibration("distance", (0.1, 0.2), (0.7, 0.9))
    assert apart.share(apart.inside, apart.parting()) == 1
    assert apart.share(apart.outside, apart.parting()) == 0
