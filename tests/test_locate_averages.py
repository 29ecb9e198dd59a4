"""Averages over facts by token role, rank correlation, and studies that go on after a kill."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny

from knowpatch.errors import InputError
from knowpatch.locate import studies
from knowpatch.locate.averages import correlation, curves, design_of, means, role_curves
from knowpatch.locate.facts import Fact
from knowpatch.locate.noise import Noise
from knowpatch.locate.rows import Rows, write_rows
from knowpatch.locate.token_roles import TOKEN_ROLES, by_role, token_roles

FIRST, MIDDLE, LAST, AFTER, FURTHER, END, ENDING = TOKEN_ROLES


# -- roles -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "tokens", "expected"),
    [
        ((1, 5), 9, [None, FIRST, MIDDLE, MIDDLE, LAST, AFTER, FURTHER, FURTHER, END]),
        ((0, 2), 4, [FIRST, LAST, AFTER, END]),
        ((0, 1), 3, [LAST, AFTER, END]),
        ((0, 2), 3, [FIRST, LAST, END]),
        ((2, 4), 4, [None, None, FIRST, ENDING]),
        ((0, 1), 1, [ENDING]),
    ],
)
def test_each_token_plays_one_part(subject, tokens, expected):
    """Short subjects, short ends, and subjects that end the prompt."""
    assert token_roles(subject, tokens) == expected


def test_tokens_of_one_role_are_averaged_within_the_prompt():
    """So that a fact with many of them counts once."""
    effects = [[9.0, 9.0], [1.0, 0.0], [2.0, 4.0], [4.0, 8.0], [5.0, 5.0], [6.0, 7.0]]
    found = by_role(effects, [1, 5])
    assert found[FIRST].tolist() == [1.0, 0.0]
    assert found[MIDDLE].tolist() == [3.0, 6.0]
    assert found[LAST].tolist() == [5.0, 5.0]
    assert found[END].tolist() == [6.0, 7.0]
    assert AFTER not in found


# -- averages --------------------------------------------------------------------------------------


def row(effects, subject=(0, 1), name="a", high=0.8, low=0.1):
    return {
        "subject": name,
        "subject_tokens": list(subject),
        "effects": effects,
        "high": high,
        "low": low,
    }


def test_facts_count_once_each():
    """The mean over facts of what each has of a role; a role counts where there is one."""
    one = row([[0.2, 0.6], [0.0, 0.1]], name="a")
    two = row([[0.0, 0.0], [0.4, 0.2], [0.0, 0.0], [0.0, 0.3]], (0, 2), name="b")
    found = role_curves([one, two])
    assert list(found) == [FIRST, LAST, AFTER, END]
    assert found[LAST].mean_L == pytest.approx([0.3, 0.4])
    assert found[LAST].n == 2
    assert found[LAST].peak == 1
    assert found[FIRST].n == 1
    assert np.isnan(found[FIRST].low_L).all()
    assert found[FIRST].facts()["low"] is None


def test_intervals_are_those_of_the_normal_law():
    """Of many facts: the mean plus and minus 1.96 standard errors, and a peak that is known."""
    made = np.random.default_rng(0)
    values = made.normal([0.1, 0.5, 0.2], 0.2, (200, 3))
    design = design_of([{"subject": str(i)} for i in range(200)])
    found = curves([{"x": one} for one in values], design)["x"]
    error = 1.96 * values.std(0, ddof=1) / np.sqrt(200)
    assert found.mean_L == pytest.approx(values.mean(0))
    assert found.low_L == pytest.approx(values.mean(0) - error, abs=0.005)
    assert found.high_L == pytest.approx(values.mean(0) + error, abs=0.005)
    assert (found.peak, found.peak_low, found.peak_high) == (1, 1, 1)


def test_facts_of_one_subject_are_drawn_together():
    """Twice the same is no more certain than once."""
    values = [0.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    apart = [row([[v], [v]], name=str(i)) for i, v in enumerate(values)]
    twice = [one for one in apart for _ in range(2)]
    once, again = (role_curves(rows)[LAST].at_peak() for rows in (apart, twice))
    assert again.mean == pytest.approx(once.mean)
    assert again.high - again.low == pytest.approx(once.high - once.low, abs=0.05)


def test_total_effects():
    """The clean probability less the corrupted one."""
    found = means([row([[0.0]], name="a", high=0.5), row([[0.0]], name="b", high=0.9, low=0.3)])
    assert found["high"].mean == pytest.approx(0.7)
    assert found["total_effect"].mean == pytest.approx(0.5)


def test_what_cannot_be_felt_does_not_count():
    """Cells that are zero in both maps are left out."""
    one = row([[0, 0], [1.0, 0], [2.0, 3.0]], (1, 2))
    two = row([[0, 0], [2.0, 0], [1.0, 5.0]], (1, 2))
    assert correlation(one, two) == pytest.approx(0.5)


# -- rows and studies ------------------------------------------------------------------------------

FACT = Fact("The capital of France is", "France", "Paris", "7")


def test_rows_are_kept_and_a_torn_one_is_made_again(tmp_path, monkeypatch):
    """By the settings; under the id that the fact has now."""
    monkeypatch.setenv("KNOWPATCH_CACHE", str(tmp_path))
    rows = Rows({"kind": "state"})
    assert rows.of(FACT) is None
    rows.add(FACT, {"id": "7", "prompt": FACT.prompt, "subject": "France", "effects": [[1.0]]})
    other = Fact(FACT.prompt, FACT.subject, None, "other")
    assert Rows({"kind": "state"}).of(other)["id"] == "other"
    assert Rows({"kind": "mlps"}).of(FACT) is None
    rows.path.write_bytes(rows.path.read_bytes() + b'{"prompt": "The capital of Ja')
    again = Rows({"kind": "state"})
    assert again.of(FACT)["effects"] == [[1.0]]
    again.add(other, {"prompt": "x", "subject": "y"})
    assert [json.loads(line)["prompt"] for line in rows.path.read_text().splitlines()] == [
        FACT.prompt,
        "x",
    ]


def test_rows_in_a_file(tmp_path):
    """The settings, and a line for each."""
    path = write_rows(tmp_path / "rows.jsonl", {"seed": 1}, [{"effects": [[0.5]]}, {"id": "b"}])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"settings": {"seed": 1}}, {"effects": [[0.5]]}, {"id": "b"}]


@pytest.fixture
def studied(known, tmp_path, monkeypatch):
    """A model, its facts (one of them wrong), and a study that counts what it finds."""
    monkeypatch.setenv("KNOWPATCH_CACHE", str(tmp_path))
    model = known("llama")
    subjects = ("France", "Japan", "Italy", "Egypt", "Brazil", "sky", "Nile", "plus")
    facts = [Fact(p, s, a, p) for (p, a), s in zip(tiny.FACTS.items(), subjects, strict=True)]
    facts.insert(1, Fact("The capital of France is", "capital", "Tokyo"))
    return model, facts, Noise.of(model.view, scale=9, draws=2)


def test_a_study_of_what_a_model_knows(studied):
    """Wrong facts are not traced, weak ones left out, and enough is enough."""
    model, facts, noise = studied
    found = studies.run(model, facts, studies.tracing(model.view, noise))
    assert (found.asked, found.known) == (9, 8)
    assert len(found.rows) + len(found.dropped) == 8
    ids = [one["id"] for one in found.rows]
    assert ids == [fact.id for fact in facts if fact.id in ids]
    assert 2 < len(ids) < 8
    assert all("effects" not in one for one in found.dropped)
    few = studies.run(model, facts, studies.tracing(model.view, noise), most=2)
    assert few.rows == found.rows[:2]
    assert few.asked < 9


def test_a_killed_study_goes_on(studied):
    """What was found is not found again, and the end is the same."""
    model, facts, noise = studied
    whole = studies.run(model, facts, studies.severed(model.view, noise))
    study = studies.severed(model.view, noise)
    study.rows.path.unlink()
    study = studies.severed(model.view, noise)
    calls = []
    find = study.find

    def dying(fact, **how):
        calls.append(fact)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return find(fact, **how)

    study.find = dying
    with pytest.raises(KeyboardInterrupt):
        studies.run(model, facts, study)
    again = studies.severed(model.view, noise)
    again.find = dying
    assert studies.run(model, facts, again) == whole
    assert len(calls) == 4 + 8 - 3


def test_attribution_is_held_against_exact_maps(studied):
    """Their rank correlation, from maps that tracing may have left there."""
    model, facts, noise = studied
    exact = studies.run(model, facts, studies.tracing(model.view, noise, kind="mlp", window=2))
    study = studies.attribution(model.view, noise, kind="mlp", window=2, exact=True)
    found = studies.run(model, facts, study)
    assert [one["id"] for one in found.rows] == [one["id"] for one in exact.rows]
    for one, other in zip(found.rows, exact.rows, strict=True):
        assert one["correlation"] == pytest.approx(correlation(one, other), abs=1e-5)
    assert np.mean([one["correlation"] for one in found.rows]) > 0.3


def test_nothing_to_average(studied):
    """One line that says why."""
    model, facts, _ = studied
    quiet = Noise.of(model.view, draws=2, scale=0.001)
    found = studies.run(model, facts[:3], studies.tracing(model.view, quiet))
    with pytest.raises(InputError, match="of 3 facts the model knows 2, and of 2 the noise takes"):
        found.check()
