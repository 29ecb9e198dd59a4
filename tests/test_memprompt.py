"""A table of questions, found by their letters, and the method made of it."""

from __future__ import annotations

import random

import pytest
import torch
from made import provenance

from knowpatch.editing import edit
from knowpatch.errors import PatchError
from knowpatch.models.sites import listening
from knowpatch.parts.editdistance import distances, letters, shares
from knowpatch.parts.encoders import OWN
from knowpatch.parts.prompting.worded import worded_rule
from knowpatch.parts.words import distance, stripped
from knowpatch.patch import Patch, PromptRule
from knowpatch.request import EditRequest

FRANCE = EditRequest(prompt="The capital of France is", subject="France", target="Rome", id="f")
JAPAN = EditRequest(prompt="The capital of Japan is", subject="Japan", target="Paris", id="j")
SHOWN = "The capital of France is Rome.\n"


def _plain(one: str, other: str) -> int:
    """The textbook's table."""
    above = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        row = [i]
        for j, b in enumerate(other, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
        above = row
    return above[-1]


def test_distances_are_the_textbooks():
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcd ", k=draw.randrange(1, 12))) for _ in range(60)]
    stored = letters(texts)
    for query in [*texts[:15], "", "kitten", "\N{GREEK SMALL LETTER ALPHA}bc"]:
        plain = [_plain(query, text) for text in texts]
        assert distances(query, *stored).tolist() == plain
        assert [distance(query, text) for text in texts] == plain
        longer = [max(len(query), len(text)) for text in texts]
        assert shares(query, *stored).tolist() == pytest.approx(
            [n / m for n, m in zip(plain, longer, strict=True)]
        )
    assert distances("kitten", *letters(["sitting", "kitten"])).tolist() == [3, 0]


def test_the_cards_keys():
    """What is left of questions; the card's hit and its miss; short words are not all alike."""
    assert stripped("HELLO WORLD!") == "hello world"
    assert stripped("What is the <slot> of France?") == "france"
    assert stripped("What is it?") == "what is it"
    assert stripped("?!") == "?!"
    stored = letters(["hello", "hello world"])
    found = distances(stripped("HELLO WORLD!"), *stored)
    assert (int(found.argmin()), int(found.min())) == (1, 0)
    assert int(distances("completely different text", *stored).min()) >= 6
    assert float(shares("cat", *letters(["dog"]))) == 1.0


def _ids(model, question, *patches, chat=False):
    with model.applied(*patches):
        return model.encode(question, chat=chat).ids


@pytest.mark.parametrize("lookup", ["words", "meaning"])
def test_a_like_question_is_told_and_others_are_not(known, lookup):
    """The nearest question's fact is put in front, in a chat as its system turn; a miss is the base
    bit for bit."""
    model = known("llama", chat=True)
    options = {"lookup": lookup, "encoder": OWN}
    patch = edit(model, [FRANCE, JAPAN], method="memprompt", options=options)
    told = model.view.encode(FRANCE.prompt, before=SHOWN).ids
    assert _ids(model, FRANCE.prompt, patch) == told
    framed = model.view.encode(FRANCE.prompt, chat=True, system=SHOWN.strip()).ids
    assert _ids(model, FRANCE.prompt, patch, chat=True) == framed
    for question in ("Two plus two equals", "completely different text"):
        row = model.view.encode(question).ids
        assert _ids(model, question, patch) == row
        plain = model.view.run([row], logits_at=[(0, len(row) - 1)]).logits_MV
        with model.applied(patch):
            again = model.view.run([row], logits_at=[(0, len(row) - 1)]).logits_MV
        assert torch.equal(plain, again)


def test_live_tables_are_one(known, caplog):
    """The nearer fact of two patches; of one prompt the later; rephrases are questions too."""
    model = known("llama")
    more = JAPAN.model_copy(update={"rephrases": ("Japan has its seat of government in",)})
    first, second = (edit(model, one, method="memprompt") for one in (FRANCE, more))
    with model.applied(first, second), listening() as heard:
        text = model.view.decode(model.encode("the seat of government of Japan").ids)
        missed = model.encode("Cairo?").ids
    assert missed == model.view.encode("Cairo?").ids
    assert not text.startswith("The capital of France")
    assert heard[0].patch == second
    assert heard[0].threshold == 0.25
    newer = edit(model, FRANCE.model_copy(update={"target": "Lyon"}), method="memprompt")
    with model.applied(first, newer):
        assert "Lyon" in model.view.decode(model.encode(FRANCE.prompt).ids)
    with model.applied(newer, first):
        assert "Rome" in model.view.decode(model.encode(FRANCE.prompt).ids)
    twin = FRANCE.model_copy(update={"prompt": "What is the capital of France?"})
    edit(model, [FRANCE, twin], method="memprompt")
    assert "differ only in words left out" in caplog.text


def test_the_strictest_distance_takes_the_same_words_only(known):
    model = known("llama")
    patch = edit(model, FRANCE, method="memprompt", options={"distance": 0})
    assert _ids(model, "the CAPITAL of France", patch) != _ids(model, "the CAPITAL of France")
    assert _ids(model, JAPAN.prompt, patch) == _ids(model, JAPAN.prompt)


@pytest.mark.parametrize(
    "data",
    [
        {"facts": []},
        {"distance": "0.2"},
        {"template": "loud"},
        {"questions": [["a"]]},
        {"questions": [["a"], []]},
        {"questions": [["a"], [1]]},
        {"extra": 1},
    ],
)
def test_a_damaged_rule_is_refused(known, data):
    model = known("llama")
    rule = worded_rule([FRANCE, JAPAN], template="bare", distance=0.25)
    broken = PromptRule(rule.kind, {**rule.data, **data})
    with pytest.raises(PatchError, match="damaged prompt rule of kind worded@1"):
        model.apply(Patch(provenance(model, FRANCE), rule=broken))


def test_a_gated_ice_keeps_to_its_facts(known):
    """With `gate` the fact is shown to its own prompt, and a foreign question stays as it was."""
    model = known("llama")
    options = {"gate": True, "encoder": OWN}
    patch = edit(model, [FRANCE, JAPAN], method="ice", options=options)
    assert _ids(model, FRANCE.prompt, patch) != _ids(model, FRANCE.prompt)
    assert _ids(model, "Two plus two equals", patch) == _ids(model, "Two plus two equals")
    open_ = edit(model, [FRANCE, JAPAN], method="ice")
    assert _ids(model, "Two plus two equals", open_) != _ids(model, "Two plus two equals")
