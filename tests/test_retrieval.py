"""Facts found by meaning: the book, the gate, rules that join, and the method made of them."""

from __future__ import annotations

import pytest
import tiny
import torch
from made import provenance

from knowpatch.ask import Ask
from knowpatch.editing import edit
from knowpatch.errors import OptionError, PatchError
from knowpatch.models.sites import listening
from knowpatch.parts import factbook
from knowpatch.parts.encoders import OWN, encoder_of
from knowpatch.parts.factbook import Factbook, best_keys, names, readings
from knowpatch.parts.prompting.retrieved import Gate, confirmations, retrieved_rule
from knowpatch.patch import Patch, PromptRule
from knowpatch.request import EditRequest

FRANCE = EditRequest(prompt="The capital of France is", subject="France", target="Rome", id="f")
JAPAN = EditRequest(prompt="The capital of Japan is", subject="Japan", target="Paris", id="j")
NILE = EditRequest(prompt="The Nile flows through", subject="Nile", target="Tokyo")
GATE = Gate("newfact", 1, named=0.6, unnamed=0.9)


class Words:
    """An encoder for tests: one axis for each word that it has been told."""

    name = "words"

    def __init__(self, *texts):
        self.words = sorted({word for text in texts for word in text.lower().split()})

    def encode(self, texts, progress=None):
        rows = [[float(w in text.lower().split()) for w in self.words] for text in texts]
        return torch.nn.functional.normalize(torch.tensor(rows) + 1e-9, dim=1)


@pytest.fixture
def worded(known, monkeypatch):
    """A model whose facts are read by their words."""
    model = known("llama")
    texts = [*tiny.FACTS, "now say which big city Lyon is of in near"]
    model.view.kept.encoders["words"] = Words(*texts)
    return model


def _patch(model, *requests, gate=GATE, encoder="words", seed=0):
    book = Factbook.of(requests, encoder_of(encoder, model.view))
    origin = provenance(model, requests[0], seed=seed)
    return Patch(origin, rule=retrieved_rule(book, encoder, gate))


def _ids(model, question, *patches, chat=False):
    with model.applied(*patches):
        return model.encode(question, chat=chat).ids


def test_a_question_is_read_whole_and_by_its_end():
    assert readings("The capital of France is") == ["The capital of France is"]
    text = "It rained. It was cold!\nThe capital of France is"
    assert readings(text) == [text, "The capital of France is"]
    assert names("What of france's capital?", "France")
    assert not names("The Frances of this world", "France")
    assert not names("anything", None)
    assert names("C++ (a language) is", "C++")


def test_search_is_the_plain_search():
    """Nearest first, whatever else is asked beside it; every fact by its best key."""
    draw = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(300, 24, generator=draw), dim=1)
    queries = torch.nn.functional.normalize(torch.randn(7, 24, generator=draw), dim=1)
    values, numbers = best_keys(queries, keys, 5)
    for row, query in enumerate(queries):
        plain = sorted(((float(key @ query), n) for n, key in enumerate(keys)), reverse=True)[:5]
        assert numbers[row].tolist() == [n for _, n in plain]
        assert torch.equal(best_keys(query[None], keys, 5)[0][0], values[row])
    pytest.importorskip("faiss")
    factbook.MANY, many = 10, factbook.MANY
    try:
        assert torch.equal(best_keys(queries, keys, 5)[1], numbers)
    finally:
        factbook.MANY = many


def test_a_book_holds_each_prompt_once(worded):
    """Of one prompt the newest fact stays, rephrases are keys too, facts can be taken out."""
    encoder = encoder_of("words", worded.view)
    old = FRANCE.model_copy(update={"target": "Lyon"})
    more = JAPAN.model_copy(update={"rephrases": ("Which city is the capital of Japan",)})
    book = Factbook.of([old, more, FRANCE], encoder)
    assert [fact["target"] for fact in book.facts] == ["Rome", "Paris"]
    assert book.fact_N.tolist() == [0, 1, 1]
    both = Factbook.joined([Factbook.of([old, NILE], encoder), book])
    assert [(f["prompt"], n) for f, n in zip(both.facts, both.owner_F, strict=True)] == [
        (FRANCE.prompt, 1),
        (NILE.prompt, 0),
        (JAPAN.prompt, 1),
    ]
    assert both.facts[0]["target"] == "Rome"
    asked = "which city is the capital of japan"
    assert both.nearest(asked, encoder, 1)[0][0] == 2
    left = both.without([0])
    assert [fact["prompt"] for fact in left.facts] == [NILE.prompt, JAPAN.prompt]
    assert left.nearest(asked, encoder, 1)[0] == (1, both.nearest(asked, encoder, 1)[0][1])
    assert torch.equal(left.keys_NE, both.keys_NE[both.fact_N != 0])


def test_the_cards_gate(worded):
    """Near and named: shown; near and not named: not; nearer than any: shown without the name."""
    patch = _patch(worded, FRANCE)
    shown = "New Fact: The capital of France is Rome\nPrompt: "
    for question, fires in {
        "now say the capital of France": True,
        "The capital of Japan is": False,
        "The colour of the sky is": False,
    }.items():
        base = _ids(worded, question)
        ids = _ids(worded, question, patch)
        assert (ids == worded.view.encode(question, before=shown).ids) == fires
        assert (ids == base) == (not fires)
    nameless = _patch(worded, FRANCE.model_copy(update={"subject": None}))
    assert _ids(worded, FRANCE.prompt, nameless) != _ids(worded, FRANCE.prompt)
    asked = "now say the capital of France"
    assert _ids(worded, asked, nameless) == _ids(worded, asked)


def test_a_miss_is_the_base_bit_for_bit(worded):
    patch, question = _patch(worded, FRANCE, JAPAN), "Two plus two equals"
    row = worded.view.encode(question).ids
    plain = worded.view.run([row], logits_at=[(0, len(row) - 1)]).logits_MV
    with worded.applied(patch):
        ids = worded.encode(question).ids
        assert torch.equal(worded.view.run([ids], logits_at=[(0, len(ids) - 1)]).logits_MV, plain)


def test_live_memories_are_one(worded):
    """Two patches: one fact is shown, the nearer; of one prompt the later patch's; undo by drop."""
    first, second = _patch(worded, FRANCE, JAPAN), _patch(worded, NILE)
    newer = _patch(worded, FRANCE.model_copy(update={"target": "Lyon"}), seed=1)
    with worded.applied(first, second), listening() as heard:
        text = worded.view.decode(worded.encode(JAPAN.prompt).ids)
    assert text == f"New Fact: {JAPAN.prompt} Paris\nPrompt: {JAPAN.prompt}"
    (firing,) = heard
    assert (firing.patch, firing.fired, firing.what) == (first, True, f"{JAPAN.prompt} Paris")
    assert firing.score == pytest.approx(1.0)
    assert firing.threshold == 0.6
    with worded.applied(first, newer):
        assert "Lyon" in worded.view.decode(worded.encode(FRANCE.prompt).ids)
    with worded.applied(newer, first):
        assert "Rome" in worded.view.decode(worded.encode(FRANCE.prompt).ids)
    other = Patch(provenance(worded, NILE), rule=_patch(worded, NILE, encoder=OWN).rule)
    with worded.applied(first, other), pytest.raises(PatchError, match="different encoders"):
        worded.encode(FRANCE.prompt)


def test_a_file_gives_the_same_route(worded, tmp_path):
    patch = _patch(worded, FRANCE, JAPAN, NILE)
    again = Patch.load(patch.save(tmp_path / "memory"))
    assert again.id == patch.id
    for question in tiny.FACTS:
        assert _ids(worded, question, again) == _ids(worded, question, patch)


@pytest.mark.parametrize(
    ("data", "tensors"),
    [
        ({"facts": []}, {}),
        ({"limit": 0}, {}),
        ({"named": "0.5"}, {}),
        ({"template": "loud"}, {}),
        ({"extra": 1}, {}),
        ({}, {"keys": torch.zeros(1, 4)}),
        ({}, {"fact.index": torch.tensor([0, 5])}),
        ({}, {"more": torch.zeros(1)}),
    ],
)
def test_a_damaged_rule_is_refused(worded, data, tensors):
    rule = _patch(worded, FRANCE, JAPAN).rule
    broken = PromptRule(rule.kind, {**rule.data, **data}, {**rule.tensors, **tensors})
    patch = Patch(provenance(worded, FRANCE), rule=broken)
    with pytest.raises(PatchError, match="damaged prompt rule of kind retrieved@1"):
        worded.apply(patch)


def test_own_states_are_vectors_of_length_one(known):
    """A text's vector does not depend on the texts beside it; unknown encoders are refused."""
    view = known("llama").view
    own = encoder_of(OWN, view)
    texts = list(tiny.FACTS)
    vectors = own.encode(texts)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(len(texts)))
    for text, vector in zip(texts, vectors, strict=True):
        assert torch.allclose(own.encode([text])[0], vector, atol=1e-4)
    with pytest.raises(OptionError, match="is no folder here"):
        encoder_of("nothing-like-this", view)


def test_the_model_can_be_asked_to_confirm(known):
    """Odds are those of two plain scores; what it denies is not shown."""
    model = known("llama")
    (odd,) = confirmations(model.view, [("The sky is blue", "The colour of the sky is")])
    assert isinstance(odd, float)
    patch = edit(model, FRANCE, method="scr", options={"encoder": OWN, "confirm": "model"})
    assert patch.rule.data["odds"] == 0.0
    denied = PromptRule(patch.rule.kind, {**patch.rule.data, "odds": 1e9}, patch.rule.tensors)
    base = _ids(model, FRANCE.prompt)
    assert _ids(model, FRANCE.prompt, Patch(patch.provenance, rule=denied)) == base


def test_scr_finds_its_own_prompt(known):
    model = known("llama")
    patch = edit(model, [FRANCE, JAPAN, NILE], method="scr", options={"encoder": OWN})
    for request in (FRANCE, JAPAN, NILE):
        with model.applied(patch):
            text = model.view.decode(model.encode(request.prompt).ids)
        assert text.startswith(f"New Fact: {request.prompt} {request.target}\n")
    ask = Ask(model)
    said = ask.score(FRANCE.prompt, "Rome", patches=[patch])
    alone = model.view.encode(
        FRANCE.prompt, before="New Fact: The capital of France is Rome\nPrompt: "
    )
    (plain,) = model.view.score([(alone.ids, said.result().ids)])
    assert said.result().logprobs == pytest.approx(plain.logprobs, abs=1e-4)
