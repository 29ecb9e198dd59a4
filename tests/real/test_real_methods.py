"""The methods on the bundled model and the first records of a KnowEdit set.

`pytest -m real -s` shows each record.
"""

from __future__ import annotations

import math
import os

import pytest

from knowpatch.data.case import REWRITE, Probe, accepted
from knowpatch.editing import choose, edit
from knowpatch.effects import measure, took
from knowpatch.models.fingerprint import tensor_digest
from knowpatch.parts.pilots import pilots
from knowpatch.parts.spans import continuation
from knowpatch.request import EditRequest

FILE = "wiki_counterfact/test_cf.json"
AUSTRALIA = EditRequest(
    prompt="The capital of Australia is", subject="Australia", target="Canberra", old="Sydney"
)


def _perplexity(model, text):
    ids = model.view.encode(text).ids
    pieces = [ids[i : i + 192] for i in range(0, len(ids), 192)]
    scored = model.view.score([(p[:1], p[1:]) for p in pieces if len(p) > 1])
    logprobs = [value for piece in scored for value in piece.logprobs]
    return math.exp(-sum(logprobs) / len(logprobs))


def _run(model, text, records, name):
    """Teacher-forced token accuracy and relative perplexity of each record, edited alone."""
    weights = {n: tensor_digest(p) for n, p in model.model.named_parameters()}
    base = _perplexity(model, text)
    accuracies, perplexities = [], []
    for record in records:
        request = EditRequest(
            prompt=record["prompt"], subject=record["subject"], target=record["target_new"]
        )
        patch = edit(model, request, method=name)
        encoded = model.encode(request.prompt)
        target = continuation(model.tokenizer, encoded, request.target)
        with model.applied(patch):
            accuracies.append(model.view.score([(encoded.ids, target)])[0].accuracy)
            perplexities.append(_perplexity(model, text) / base)
        for changed in patch.deltas:
            parameter = changed.address.parameter
            assert tensor_digest(model.view.parameter(parameter)) == weights[parameter]
        print(f"{name} {accuracies[-1]:.3f} {perplexities[-1]:.4f} {request.target!r}")
    assert {n: tensor_digest(p) for n, p in model.model.named_parameters()} == weights
    mean = sum(accuracies) / len(accuracies)
    perplexity = sum(perplexities) / len(perplexities)
    print(f"{name}, {len(accuracies)} records: success {mean:.4f}, perplexity {perplexity:.4f}")
    return mean, perplexity


def test_ft_m_on_twenty_records(model, text, records):
    """FT-M: success at least 0.98, perplexity at most 1.05 of the base's, every byte undone."""
    success, perplexity = _run(model, text, records(FILE)[:20], "ft")
    assert success >= 0.98
    assert perplexity <= 1.05


def test_rome(model, text, records):
    """ROME: success at least 0.95, every byte undone (20 records in the soak, else six)."""
    rows = records(FILE)[:20] if os.environ.get("KNOWPATCH_SOAK") else records(FILE)[4:10]
    success, perplexity = _run(model, text, rows, "rome")
    assert success >= 0.95
    assert perplexity <= 1.05


@pytest.mark.skipif(not os.environ.get("KNOWPATCH_SOAK"), reason="long; run by `make soak`")
def test_grace_on_twenty_records(model, text, records):
    """GRACE: a text that no entry knows is left alone; long answers outlast its one position."""
    success, perplexity = _run(model, text, records(FILE)[:20], "grace")
    assert success >= 0.7
    assert perplexity == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", ["ft", "ice"])
def test_a_batch_takes(model, name):
    """Two facts in one patch: both answers are the most likely ones."""
    requests = [
        AUSTRALIA,
        EditRequest(
            prompt="LeBron James plays the sport of", subject="LeBron James", target="basketball"
        ),
    ]
    method = choose(name)
    patch = edit(model, requests, method=method)
    probes = [
        Probe(REWRITE, request.prompt, accepted(request.target), request=number)
        for number, request in enumerate(requests)
    ]
    effects = measure(model, [patch], probes)
    assert took(effects, requests, [r.target for r in requests], chat=False) == [True, True]


def test_twenty_answers_in_one_patch_stop_where_they_should(model, text):
    """Generated to their ends, 19 of 20 at least are the targets, and with the facts the other way
    round the same but for one; ordinary text stays as likely as it was."""
    twenty, base = pilots()[:20], _perplexity(model, text)
    for requests, least in ((twenty, 19), (twenty[::-1], 18)):
        with model.applied(edit(model, requests, method="locft_bf")):
            said = [model.ask(one.prompt, max_new_tokens=16).strip() for one in requests]
            perplexity = _perplexity(model, text) / base
        right = sum(text == one.target for text, one in zip(said, requests, strict=True))
        print(f"locft_bf, 20 facts: {right} stop where they should, perplexity {perplexity:.4f}")
        assert right >= least
        assert perplexity < 1.05


def test_erasing_teaches_not_to_know(model):
    """By default the model learns to say that it does not know, and the old answer is gone."""
    request = EditRequest(prompt="The capital of Australia is", old="Sydney", kind="erase")
    with model.applied(edit(model, request, method="ft")):
        said = model.ask(request.prompt)
    assert said.startswith("I don't know.")
    assert "Sydney" not in said


def test_unlikelihood_makes_the_old_answer_go_away(model):
    """The unlikelihood objective promises no new answer, only that the old one is not said."""
    request = EditRequest(prompt="The capital of Australia is", old="Sydney", kind="erase")
    method = choose("ft", {"objective": "unlikelihood"})
    patch = edit(model, request, method=method)
    assert method.expected(request) is None
    with model.applied(patch):
        assert "Sydney" not in model.ask(request.prompt, max_new_tokens=8)
        assert "Paris" in model.ask("The capital of France is", max_new_tokens=8)


def test_editing_through_the_chat_template(model):
    """Edited as a chat, the answer in the chat is the new one."""
    patch = edit(model, AUSTRALIA, method="ft", options={"chat": True})
    assert "Canberra" not in model.ask(AUSTRALIA.prompt, chat=True)
    with model.applied(patch):
        assert model.ask(AUSTRALIA.prompt, chat=True) == "Canberra"  # and it stops there


def test_it_is_an_ordinary_transformers_model(model):
    """`generate` and a pipeline work on the edited model, prompt rules included."""
    from transformers import pipeline

    tokens = model.tokenizer("The capital of Australia is", return_tensors="pt")
    for name in ("ft", "ice"):
        with model.applied(edit(model, AUSTRALIA, method=name)):
            out = model.generate(**tokens, max_new_tokens=4, do_sample=False)
            text = model.tokenizer.decode(out[0], skip_special_tokens=True)
            assert text.startswith("The capital of Australia is Canberra")
    with model.applied(edit(model, AUSTRALIA, method="ft")):
        pipe = pipeline("text-generation", model=model.model, tokenizer=model.tokenizer)
        said = pipe("The capital of Australia is", max_new_tokens=4, do_sample=False)
    assert "Canberra" in said[0]["generated_text"]
