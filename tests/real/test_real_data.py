"""The published files: each is read whole, and holds what was counted in it by other means."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from time import process_time

import pytest

from knowpatch.data.dataset import DATASETS
from knowpatch.data.draft import tally
from knowpatch.data.jsonl import read_cases, write_cases
from knowpatch.data.source import Loaded, load, present

DATA = Path(os.environ.get("KNOWPATCH_DATA", Path(__file__).parents[3] / "shared" / "data"))
SECONDS = 5
REPEATED = "a rephrase repeats the prompt or another rephrase"
PLAIN = "answers are plain text, without aliases"

CASES = {
    "wiki_recent:train": 570,
    "wiki_recent:test": 1266,
    "wiki_counterfact:train": 1428,
    "wiki_counterfact:test": 885,
    "zsre:test": 1301,
    "zsre:structured": 500,
    "zsre:inverse": 385,
    "wikibio:train": 464,
    "wikibio:test": 306,
    "convsent:val": 799,
    "convsent:test": 800,
    "sanitation:train": 5,
    "sanitation:test": 5,
    "counterfact:edit": 10_000,
    "counterfact:train": 10_000,
    "counterfact:val": 1919,
    "counterfact:distracting": 804,
    "counterfact:subject_replace": 213,
    "mquake:hard": 429,
    "conflict:easy": 2500,
    "conflict:hard": 2500,
    "conflict:reverse": 2500,
    "personality:train": 1600,
    "personality:dev": 200,
    "personality:test": 200,
    "known_facts:all": 600,
}

ODD = {
    "wiki_recent:train": {"no portability": 467, "no locality": 155, "empty answer": 14},
    "wiki_recent:test": {"same prompt as case N": 2},
    "wiki_counterfact:train": {
        PLAIN: 1428,
        "same as case N": 11,
        "no portability": 8,
        "target equals the old answer": 6,
        "empty answer": 2,
        "no old answer": 1,
    },
    "wiki_counterfact:test": {
        "no portability": 81,
        "no locality": 46,
        "empty answer": 38,
        "same prompt as case N": 21,
    },
    "zsre:test": {
        "target equals the old answer": 43,
        "same prompt as case N": 10,
        "same as case N": 8,
    },
    "zsre:structured": {"no portability": 500, REPEATED: 28, "target equals the old answer": 23},
    "zsre:inverse": {"subject is not in the prompt": 5, "target equals the old answer": 3},
    "convsent:val": {"same prompt as case N": 1},
    "counterfact:edit": {"same prompt as case N": 79, REPEATED: 15, "same as case N": 4},
    "counterfact:train": {"same prompt as case N": 74, REPEATED: 13, "same as case N": 3},
    "counterfact:val": {"same prompt as case N": 7, REPEATED: 1},
    "mquake:hard": {"same as case N": 6},
    "conflict:easy": {"same prompt as case N": 5},
    "conflict:hard": {"same prompt as case N": 16},
}
"""Cases with each oddity; a split that is not named has none."""


def loaded(name: str) -> Loaded:
    stem, _, split = name.partition(":")
    if not DATA.is_dir() or not present(DATASETS.get(stem), split, DATA):
        pytest.skip(f"no data: {name} is not below {DATA} (set KNOWPATCH_DATA)")
    return load(name, data=DATA)


def probes(found: Loaded) -> dict[str, int]:
    return dict(Counter(probe.kind for case in found.cases for probe in case.probes))


@pytest.mark.parametrize("name", CASES)
def test_a_published_file_is_read_whole(name: str):
    """The number of records, what is odd about them, none of them unusable; within seconds."""
    start = process_time()
    found = loaded(name)
    assert process_time() - start < SECONDS
    assert len(found.cases) == CASES[name]
    assert dict(tally(found.cases)) == ODD.get(name, {})
    assert not [case.unusable for case in found.cases if case.unusable]


def test_every_split_is_counted():
    """A split that is added is added here; one file is not to be had but from the hub."""
    splits = {f"{name}:{split}" for name in DATASETS.names() for split in DATASETS.get(name).files}
    assert splits - set(CASES) == {"convsent:train"}


def test_questions_by_sub_kind():
    """Questions per sub-kind; of the ones without any answer none is asked."""
    assert probes(loaded("wiki_recent:test")) == {
        "rewrite": 1266,
        "portability.Subject_Aliasing": 1243,
        "portability.Reasoning": 9689,
        "portability.Logical_Generalization": 769,
        "locality.Relation_Specificity": 5363,
        "locality.Forgetfulness": 842,
    }
    assert probes(loaded("wiki_counterfact:test")) == {
        "rewrite": 885,
        "portability.Subject_Aliasing": 2408,
        "portability.Reasoning": 2226 - 5,
        "portability.Logical_Generalization": 483 - 20,
        "locality.Relation_Specificity": 5488 - 2,
        "locality.Forgetfulness": 468,
    }
    assert probes(loaded("counterfact:distracting"))["locality.distracting"] == 8040
    assert probes(loaded("mquake:hard")) == {"rewrite": 1716, "multihop": 1287, "hop": 1716}


def test_answers_to_forget():
    """Five answers with sixteen questions on either side, and 453 to keep."""
    cases = loaded("sanitation:test").cases
    assert {case.id for case in cases} == {"cheese", "birds", "paris", "julius caesar", "finland"}
    for case in cases:
        assert len(case.requests) == len(case.of("forget")) == 16
        assert len(case.of("retain")) == 453
        assert all(request.subject for request in case.requests)


def test_both_sentiments_are_drawn():
    """About half of the entities get either sentiment."""
    cases = loaded("convsent:test").cases
    first = sum(len(case.of("sentiment.same")[0].answers) for case in cases)
    both = first + sum(len(case.of("sentiment.opposite")[0].answers) for case in cases)
    assert both == 16_000
    assert 0.4 < first / both < 0.6


def test_published_cases_survive_as_json_lines(tmp_path: Path):
    """Real text of many scripts is read as it was written."""
    cases = loaded("wiki_recent:train").cases
    assert tuple(read_cases(write_cases(cases, tmp_path / "cases.jsonl"))) == cases
