"""Worked examples before a fact: how they are chosen, shown, gated, and made to fit."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from made import provenance

from knowpatch.ask import Ask
from knowpatch.editing import edit
from knowpatch.errors import DataError, PatchError
from knowpatch.models.sites import listening
from knowpatch.parts.demonstrations import Corpus, Record, file_records, pilot_records, shares
from knowpatch.parts.encoders import OWN, encoder_of
from knowpatch.patch import Patch, PromptRule
from knowpatch.request import EditRequest

FRANCE = EditRequest(prompt="The capital of France is", subject="France", target="Rome", id="f")
JAPAN = EditRequest(prompt="The capital of Japan is", subject="Japan", target="Paris", id="j")
SELF = "New Fact: The capital of France is Rome\nPrompt: The capital of France is Rome\n\n"
END = "New Fact: The capital of France is Rome\nPrompt: "
NAMES = ("Anna", "Berlin", "Cairo", "Lyon", "London", "Madrid", "Sudan", "Egypt", "Brazil", "Nile")
RECORDS = [
    Record(
        f"The colour of {name} is",
        name,
        "green",
        (f"{name} has the colour", f"Of {name} the colour is"),
        ((f"The colour of {other} is", "blue"), (f"The size of {other} is", "five")),
    )
    for name, other in zip(NAMES, (*NAMES[1:], "Spanish"), strict=True)
]


def _corpus(model, variant="paper", records=RECORDS):
    return Corpus.of(records, variant, encoder_of(OWN, model.view), model.view.fingerprint)


def _near(model, request, count, *, variant="paper", seed=0, records=RECORDS):
    corpus = _corpus(model, variant, records)
    (vector,) = encoder_of(OWN, model.view).encode([corpus.asked(request)])
    return corpus.near(request, vector, count, seed)


def _kind(shown):
    fact, prompt = shown.removeprefix("New Fact: ").rstrip("\n").split("\nPrompt: ")
    return "copy" if fact == prompt else "update" if prompt.endswith(" green") else "retain"


def _text(model, question, *patches, chat=False):
    with model.applied(*patches):
        return model.encode(question, chat=chat).text


def _edit(model, requests, **options):
    return edit(model, requests, method="ike", options={"encoder": OWN, **options})


def test_the_cards_shares():
    """One, three and four of eight."""
    for count in (8, 16, 32):
        parts = {"copy": count // 8, "update": 3 * count // 8, "retain": count // 2}
        assert Counter(shares(count)) == parts
    for count in range(40):
        assert len(shares(count)) == count
    assert shares(1) == ["copy"]


def test_eight_of_the_nearest(known):
    """The card's multiset, the most similar last; the same for a fact whatever the order, and
    another draw for another seed."""
    model = known("llama")
    shown = _near(model, FRANCE, 8)
    assert Counter(map(_kind, shown)) == {"copy": 1, "update": 3, "retain": 4}
    encoder = encoder_of(OWN, model.view)
    (asked,) = encoder.encode(["The capital of France is Rome"])
    facts = [record.fact for record in RECORDS]
    ranked = sorted(zip((encoder.encode(facts) @ asked).tolist(), facts, strict=True))[-8:]
    assert [text.split("\n")[0] for text in shown] == [f"New Fact: {fact}" for _, fact in ranked]
    assert _near(model, FRANCE, 8) == shown
    assert any(_near(model, FRANCE, 8, seed=seed) != shown for seed in (1, 2, 3))
    assert len(_near(model, FRANCE, 30)) == len(RECORDS)


def test_nothing_is_shown_about_the_edits_own_subject(known):
    """Neither a record of that subject, nor one that asks about it elsewhere."""
    model = known("llama")
    mine = EditRequest(prompt="The size of Cairo is", subject="Cairo", target="five")
    for variant in ("paper", "easyedit"):
        shown = _near(model, mine, 30, variant=variant)
        assert shown
        assert not any("Cairo" in text for text in shown)


def test_easyedits_variant_takes_the_nearest_texts(known):
    model = known("llama")
    corpus = _corpus(model, "easyedit")
    assert len(corpus.texts) == 3 * len(RECORDS)
    encoder = encoder_of(OWN, model.view)
    (asked,) = encoder.encode([END + FRANCE.prompt])
    scores = (encoder.encode(corpus.texts) @ asked).tolist()
    best = sorted(zip(scores, corpus.texts, strict=True))[-5:]
    assert _near(model, FRANCE, 5, variant="easyedit") == [text for _, text in best]


def test_what_stands_before_a_question(known):
    """Demonstrations, the fact's own, the fact, the question; through a chat in the user's turn."""
    model = known("llama", chat=True)
    patch = _edit(model, FRANCE, demonstrations=2, tokens=1000)
    question = "The language of Brazil is"
    text = _text(model, question, patch)
    assert text.endswith(SELF + END + question)
    assert text.count("New Fact: ") == 4
    framed = _text(model, question, patch, chat=True)
    assert framed == model.view.encode(text, chat=True).text
    bare = _text(model, question, _edit(model, FRANCE, demonstrations=2, variant="easyedit"))
    assert bare.endswith(END + question)
    assert SELF not in bare


def test_what_does_not_fit_is_left_out_from_the_far_end(known, caplog):
    """The nearest demonstrations stay, then the fact's own, and the question always; it is said."""
    model = known("llama")
    whole = _text(model, "Lyon is", _edit(model, FRANCE, demonstrations=4, tokens=10_000))
    for tokens in (120, 90, 60, 5):
        patch = _edit(model, FRANCE, demonstrations=4, tokens=tokens)
        caplog.clear()
        with listening() as heard:
            text = _text(model, "Lyon is", patch)
            _text(model, "Lyon is", patch)
        assert whole.endswith(text)
        assert text.startswith("New Fact: ")
        assert text.endswith(END + "Lyon is")
        count = len(model.view.tokenizer(text)["input_ids"])
        assert count <= tokens or text == END + "Lyon is"
        left = text.count("New Fact: ") - 1
        told = f"{left} of 5 demonstrations fit into {tokens} tokens"
        assert heard[0].what == f"The capital of France is Rome; {told}"
        assert caplog.text.count(told) == 1
    default = _edit(model, FRANCE, demonstrations=16)
    assert len(_text(model, "Lyon is", default)) > 0
    assert len(model.view.tokenizer(_text(model, "Lyon is", default))["input_ids"]) <= 256 - 64


def test_one_fact_is_always_shown_and_several_are_gated(known):
    model = known("llama")
    one, other = (_edit(model, fact, demonstrations=1) for fact in (FRANCE, JAPAN))
    both = _edit(model, [FRANCE, JAPAN], demonstrations=1)
    sky = "Two plus two equals"
    assert _text(model, sky, one) != sky
    for patches in ([both], [one, other]):
        assert _text(model, sky, *patches) == sky
        with listening() as heard:
            shown = _text(model, JAPAN.prompt, *patches)
        assert shown == _text(model, JAPAN.prompt, other)
        assert heard[0].patch == patches[-1]
        assert heard[0].score == pytest.approx(1.0)
    always = _edit(model, [FRANCE, JAPAN], demonstrations=1, gate="always")
    assert _text(model, sky, always) != sky
    row = model.view.encode(sky).ids
    plain = model.view.run([row], logits_at=[(0, len(row) - 1)]).logits_MV
    with model.applied(both):
        ids = model.encode(sky).ids
        assert torch.equal(model.view.run([ids], logits_at=[(0, len(ids) - 1)]).logits_MV, plain)
    newer = _edit(model, FRANCE.model_copy(update={"target": "Lyon"}), demonstrations=1)
    assert "Lyon" in _text(model, FRANCE.prompt, both, newer)
    assert "Lyon" not in _text(model, FRANCE.prompt, newer, both)


def test_the_planner_reads_a_context_once(known):
    """Several questions of one edit score as each does alone with its whole context."""
    model = known("llama")
    patch = _edit(model, FRANCE, demonstrations=3)
    questions = [FRANCE.prompt, JAPAN.prompt, "Two plus two equals", "The colour of the sky is"]
    with model.applied(patch):
        ask = Ask(model)
        asked = [ask.score(question, "Rome") for question in questions]
        for question, future in zip(questions, asked, strict=True):
            ids = model.encode(question).ids
            (plain,) = model.view.score([(ids, future.result().ids)])
            assert future.result().logprobs == pytest.approx(plain.logprobs, abs=1e-4)


def test_pilot_records_have_the_models_own_answers(known):
    """Rephrases of the same fact, and answers that are kept, word for word."""
    model = known("llama")
    records = pilot_records(model.view)
    assert records
    assert pilot_records(model.view) == records
    assert all(record.rephrases and record.neighbours for record in records)
    record = next(record for record in records if record.subject == "Albert Einstein")
    assert record.rephrases == ("The scientific discipline of Albert Einstein was",)
    assert not any("Albert Einstein" in text for text, _ in record.neighbours)


def _case(name, **more):
    probes = [
        {"kind": "rephrase", "prompt": f"Of {name} the colour is", "answers": "green"},
        {"kind": "locality.near", "prompt": "The colour of grass is", "answers": "blue"},
        {"kind": "locality.open", "prompt": "Grass"},
    ]
    subject = {"prompt": f"The colour of {name} is", "subject": name, "target": "green"}
    return {**subject, "probes": probes, **more}


def test_records_from_a_file(known, tmp_path, caplog):
    """Cases that can be shown in all three ways; the others are counted."""
    path = tmp_path / "cases.jsonl"
    path.write_text("\n".join(json.dumps(c) for c in (_case("Anna"), _case("Lyon", probes=[]))))
    (record,) = file_records(path, 10)
    assert record.rephrases == ("Of Anna the colour is",)
    assert record.neighbours == (("The colour of grass is", "blue"),)
    assert "1 of 2 cases are used" in caplog.text
    model = known("llama")
    patch = _edit(model, FRANCE, demonstrations=4, corpus=str(path))
    assert "Anna" in _text(model, "Lyon is", patch)
    path.write_text(json.dumps(_case("Lyon", probes=[])))
    with pytest.raises(DataError, match="no case can be demonstrated; each needs one request"):
        _edit(model, FRANCE, corpus=str(path))


def test_a_file_gives_the_same_context(known, tmp_path):
    model = known("llama")
    patch = _edit(model, [FRANCE, JAPAN], demonstrations=3)
    again = Patch.load(patch.save(tmp_path / "memory"))
    assert again.id == patch.id
    assert _text(model, FRANCE.prompt, again) == _text(model, FRANCE.prompt, patch)
    plain = Patch.load(_edit(model, FRANCE, demonstrations=0).save(tmp_path / "none"))
    assert _text(model, "Lyon is", plain) == f"{SELF}{END}Lyon is"


@pytest.mark.parametrize(
    ("data", "tensors"),
    [
        ({"facts": []}, {}),
        ({"own": 1}, {}),
        ({"tokens": 0}, {}),
        ({"named": None}, {}),
        ({"blocks": [1]}, {}),
        ({"blocks": []}, {}),
        ({"extra": 1}, {}),
        ({}, {"block.index": torch.zeros(5, 1, dtype=torch.int64)}),
        ({}, {"more": torch.zeros(1)}),
    ],
)
def test_a_damaged_rule_is_refused(known, data, tensors):
    model = known("llama")
    rule = _edit(model, [FRANCE, JAPAN], demonstrations=2).rule
    broken = PromptRule(rule.kind, {**rule.data, **data}, {**rule.tensors, **tensors})
    with pytest.raises(PatchError, match="damaged prompt rule of kind demonstrations@1"):
        model.apply(Patch(provenance(model, FRANCE), rule=broken))
