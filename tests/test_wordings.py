"""Other wordings: which relation a prompt is of, and what a value is then optimised behind."""

from __future__ import annotations

import json
from importlib import resources

import pytest

from knowpatch.editing import choose, edit
from knowpatch.parts.wordings import reworded, wordings_of
from knowpatch.request import EditRequest

FACT = EditRequest(prompt="The capital of France is", subject="France", target="Rome")


def test_the_catalogue_is_sound():
    """No relation twice; each wording has one slot for the subject and ends before the answer;
    whatever relation a wording is found to be of, it is its own."""
    file = resources.files("knowpatch").joinpath("assets", "wordings.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert len(set(row["wordings"])) == len(row["wordings"]) >= 3
        assert len(set(row["phrases"])) == len(row["phrases"])
        for text in row["wordings"]:
            assert text.count("{}") == 1
            assert text == text.strip()
            assert text[-1].isalpha()
            found = wordings_of(text)
            assert not found or {*found, text} == set(row["wordings"]), text


@pytest.mark.parametrize(
    ("template", "one"),
    [
        ("The capital of {} is", "{}'s capital city is"),
        ("What is the capital of {}?", "{}'s capital city is"),
        ("{}, the capital of", "The country whose capital is {} is"),
        ("The mother tongue of {} is", "{} grew up speaking"),
        ("{} is located in the continent of", "{} belongs to the continent"),
        ("The headquarter of {} is located in", "{} is based in"),
        ("The CEO of {} is", "{} is run by"),
    ],
)
def test_a_relation_is_told_by_its_phrases(template, one):
    """Also where one phrase is within another, and where the subject stands tells the direction."""
    found = wordings_of(template)
    assert one in found
    assert template not in found


def test_what_is_not_known_or_not_clear_has_no_other_wording():
    assert wordings_of("{}, the") == ()
    assert wordings_of("{} was born in the city whose mayor is") == ()
    assert wordings_of("The population of the capital of {} is") == ()
    assert "The author of {} is" not in wordings_of("{} is the author of")
    assert reworded(FACT.model_copy(update={"target": "1900"})) == ()


def test_given_rephrases_come_first_and_name_the_subject():
    request = FACT.model_copy(update={"rephrases": ("France is ruled from", "Its capital is")})
    found = reworded(request)
    assert found[0] == "France is ruled from"
    assert "Its capital is" not in found
    longer = FACT.model_copy(update={"rephrases": ("The capital of Franceville is",)})
    assert longer.rephrases[0] not in reworded(longer)
    assert "France's capital city is" in found
    assert FACT.prompt not in found
    assert reworded(FACT.model_copy(update={"subject": None})) == ()


@pytest.mark.parametrize("name", ["neuraldb", "rome", "memit", "bird"])
def test_a_value_is_optimised_behind_other_wordings(known, name):
    """Each, with and without a prefix; by a task of its own answers; and the edit is another."""
    model, options = known("llama"), {"contexts": 2, "steps": 4, "clamp": 4.0}
    options |= {} if name == "neuraldb" else {"tokens": 500, "ridge": 0.01}
    options |= {"layers": [0]} if name == "memit" else {"layer": 0}
    if name == "neuraldb":
        options |= {"threshold": 0.5}
    with_, without = (choose(name, {**options, "wordings": on}) for on in (True, False))
    contexts = with_.contexts(model.view)
    plain, more = (m.task(model.view, FACT, contexts) for m in (without, with_))
    texts = reworded(FACT)
    assert len(more.contexts) == len(plain.contexts) + 2 * len(texts)
    assert more.contexts[: len(plain.contexts)] == plain.contexts
    behind = more.contexts[len(plain.contexts)]
    read = model.view.decode(behind.ids[: behind.end])
    assert read == texts[0]
    assert model.view.decode([behind.ids[behind.position]]).strip() in "France"
    assert edit(model, FACT, method=with_).id != edit(model, FACT, method=without).id
