"""The benchmarks of locations: what their reports make of rows."""

from __future__ import annotations

import change
import layers
import numpy as np
import pytest

from knowpatch.locate.pilot import Place

PLACES = [Place((2,), {}), Place((0,), {"layer": 0}), Place((3,), {"layer": 3})]


def _rows(scores, curve):
    """Rows of ten records: edits come to `scores` by place, and each has the same curve."""
    rows = [
        {"case": case, "blocks": list(place.blocks), "scores": scores[place.blocks[0]]}
        for place in PLACES
        for case in range(10)
    ]
    return rows + [{"case": case, "locator": "x", "curve": curve} for case in range(10)]


def _record(rate):
    return {"success": 1.0, "paraphrase": rate, "kept": 1.0, "norm": 0.0}


def test_what_is_located_where_edits_take_predicts_it(capsys):
    """Rank correlation 1 where curve and scores rise together; the choices by their names."""
    scores = {0: _record(0.1), 2: _record(0.5), 3: _record(0.9)}
    layers.report(PLACES, _rows(scores, [0.1, 0.9, 0.5, 1.0]), "x", PLACES[1])
    told = capsys.readouterr().out
    assert "10 records, 10 of them located by x" in told
    assert "mean over records: +1.00 (+1.00 to +1.00), 10 records" in told
    assert "score of means: +1.00 (+1.00 to +1.00)" in told
    assert "| 2 (own) | 100 % | 50 % | 100 % | 0 % | 0.75 (0.75 to 0.75) | 0.50 |" in told
    assert "nearest to the located peak: blocks [3], score 0.96" in told
    assert "the pilot's suggestion: blocks [0], score 0.25" in told
    assert "less own -0.50 (-0.50 to -0.50)" in told
    assert "the best in hindsight: blocks [3]" in told
    opposite = {0: _record(0.9), 2: _record(0.5), 3: _record(0.1)}
    layers.report(PLACES, _rows(opposite, [0.1, 0.9, 0.5, 1.0]), "x", PLACES[1])
    assert "mean over records: -1.00" in capsys.readouterr().out


def test_a_score_that_is_the_same_everywhere_is_predicted_by_nothing(capsys):
    """No correlation is claimed, and none crashes."""
    scores = dict.fromkeys((0, 2, 3), _record(0.5))
    layers.report(PLACES, _rows(scores, [0.1, 0.9, 0.5, 1.0]), "x", PLACES[0])
    assert "Spearman" not in capsys.readouterr().out
    assert layers.spearman([1.0, 2.0], [3.0, 3.0]) is None
    assert layers.spearman([1.0, 2.0, 9.0], [2.0, 3.0, 4.0]) == pytest.approx(1)


def test_changes_are_compared_over_what_all_methods_learned(capsys):
    """A record that one did not learn counts for none."""

    def row(method, case, took, share):
        numbers = dict.fromkeys(change.NUMBERS, share)
        ranks = {"before": 60, "after": 7, "random": [60, 8], "change": 1, "direction": 1}
        new = dict.fromkeys(change.WAYS, ranks)
        return {"method": method, "case": case, "took": took, "numbers": numbers, "new": new,
                "telling": True}  # fmt: skip

    rows = [row("a", 1, True, 0.5), row("a", 2, True, 0.9), row("b", 1, True, 0.2)]
    rows += [row("a", 3, True, 0.7), row("b", 2, False, 0.9), row("b", 3, True, 0.4)]
    change.table(rows, ["a", "b"])
    told = capsys.readouterr().out
    assert "2 records that all of a, b learned" in told
    assert "| mass in 5 columns, % | 60 (50 to 70) | 30 (20 to 40) |" in told
    assert "| Hit@10 after, normed, % | 100 (34.2 to 100) | 100 (34.2 to 100) |" in told
    assert "| Hit@10 random, normed, % | 50 (50 to 50) | 50 (50 to 50) |" in told
    assert np.isfinite(change.hit(rows[0]["new"]["normed"], 50, "random"))
