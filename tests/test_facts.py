"""Facts to locate: reading them from files and datasets, and which of them a model knows."""

from __future__ import annotations

import json

import pytest
import samples
import tiny

from knowpatch.errors import DataError, OptionError, RequestError
from knowpatch.locate import facts
from knowpatch.locate.facts import Fact, read_facts
from knowpatch.parts.spans import subject_span

FRANCE = Fact("The capital of France is", "France", "Paris", "1")


def written(path, items):
    lines = [json.dumps(item) for item in items]
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]")
    return path


@pytest.mark.parametrize("name", ["facts.json", "facts.jsonl"])
def test_facts_of_a_file(tmp_path, name):
    """Blanks around what is given do not count; answer and id may be left out."""
    fields = {"prompt": "The capital of France is ", "subject": " France", "answer": " Paris"}
    other = {"prompt": "The Nile flows through", "subject": "Nile", "id": "b"}
    found = read_facts(written(tmp_path / name, [fields, other]))
    assert found == [FRANCE, Fact("The Nile flows through", "Nile", None, "b")]


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([{"prompt": "A is", "subject": "B"}], "entry 1: subject 'B' is not in the prompt 'A is'"),
        ([{"prompt": "A is"}], "entry 1: 'subject' is missing"),
        ([{"prompt": " ", "subject": "B"}], "entry 1: the prompt is empty"),
        ([{"prompt": "A is", "subject": "A", "answer": " "}], "entry 1: the answer is empty"),
        ([{"prompt": "A is", "subjekt": "A"}], "unknown field 'subjekt': did you mean 'subject'"),
        ([3], "entry 1: expected an object, got a number"),
        ([], "holds no fact"),
    ],
)
def test_a_file_that_holds_no_facts(tmp_path, items, said):
    """One line with the file, the place and what is wrong."""
    path = written(tmp_path / "facts.json", items)
    with pytest.raises(DataError) as refused:
        read_facts(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert said in str(refused.value)


def test_files_that_are_not_there(tmp_path):
    """A path leads nowhere, or is the name of no dataset."""
    with pytest.raises(DataError, match="no such file"):
        read_facts(tmp_path / "facts.json")
    with pytest.raises(OptionError, match="unknown dataset 'nothing'"):
        read_facts("nothing")


def test_facts_of_a_dataset(tmp_path):
    """By its name, or by the path of its file."""
    (path,) = samples.place(tmp_path, "known_facts", samples.CONTENTS["known_facts"])
    found = read_facts("known_facts", data=tmp_path)
    assert found == [Fact("Norland's capital is", "Norland", "Orm", "4")]
    assert read_facts(path) == found


def test_facts_that_edits_replace(tmp_path):
    """Of a dataset of edits, the old answers are the facts."""
    samples.place(tmp_path, "counterfact", samples.CONTENTS["counterfact"])
    (found, *_) = read_facts("counterfact", data=tmp_path)
    (case, *_) = samples.CONTENTS["counterfact"][0]
    assert (found.prompt, found.answer) == (case["prompt"], case["ground_truth"])


def test_a_dataset_without_subjects(tmp_path):
    """It is refused, and the line says what to give."""
    samples.place(tmp_path, "zsre", [[{**samples.RIVER, "subject": " "}]])
    with pytest.raises(DataError, match="zsre: no case names a subject"):
        read_facts("zsre", data=tmp_path)


def test_a_model_knows_what_it_says(known):
    """Every token of the answer counts, and asking ends when there are enough."""
    model = known("llama")
    told = [Fact(p, p.split()[-2], a, p) for p, a in tiny.FACTS.items()]
    wrong = Fact("The capital of France is", "France", "Paris Tokyo", "wrong")
    silent = Fact("The capital of France is", "France", None, "silent")
    asked = [wrong, silent, *told]
    assert facts.known(model, asked) == ([silent, *told], 2 + len(told))
    assert facts.known(model, asked, most=2) == ([silent, told[0]], 3)
    assert [knows for _, knows in facts.asked(model, asked)] == [False, *[True] * (1 + len(told))]


def test_an_empty_subject_is_refused():
    """As one line, before any model is asked."""
    with pytest.raises(RequestError, match="the subject is empty"):
        Fact.of("The capital of France is", " ")


def test_the_last_occurrence_of_a_subject():
    """A whole word before a part of one, from either end."""
    text = "Ann saw Ann and Anna"
    assert subject_span(text, "Ann") == (0, 3)
    assert subject_span(text, "Ann", last=True) == (8, 11)
