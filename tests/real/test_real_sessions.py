"""GRACE and sessions on the bundled model and real CounterFact records."""

from __future__ import annotations

import pytest

from knowpatch.ask import Ask
from knowpatch.editing import choose, edit_each
from knowpatch.parts.spans import continuation
from knowpatch.request import EditRequest

COUNT = 40


@pytest.fixture(scope="module")
def cases(counterfact):
    return counterfact[:COUNT]


@pytest.fixture(scope="module")
def codebook(model, cases):
    """One GRACE patch for each record, made together."""
    requests = [
        EditRequest(prompt=r["prompt"], subject=r["subject"], target=r["target_new"]) for r in cases
    ]
    return edit_each(model, requests, method=choose("grace"))


def _leading(model, prompt, answer):
    """The most likely token at each place where a token of the answer is predicted."""
    encoded = model.encode(prompt)
    ids = continuation(model.tokenizer, encoded, answer)
    places = [(0, len(encoded.ids) - 1 + i) for i in range(len(ids))]
    run = model.view.run([[*encoded.ids, *ids[:-1]]], logits_at=places, prompts=[len(encoded.ids)])
    return run.logits_MV.argmax(-1).tolist()


def test_grace_on_forty_records(model, cases, codebook):
    """Each edited alone: success at least 0.98, locality at least 0.98 (rephrase is printed)."""
    success, locality, rephrase = [], [], []
    for case, patch in zip(cases, codebook, strict=True):
        asked = case["locality_prompt"], case["locality_ground_truth"]
        before = _leading(model, *asked)
        with model.session([patch]):
            after = _leading(model, *asked)
            ask = Ask(model)
            wanted = ask.score(case["prompt"], case["target_new"])
            success.append(wanted.result().accuracy)
            rephrase.append(
                ask.score(case["rephrase_prompt"], case["target_new"]).result().accuracy
            )
        locality.append(sum(a == b for a, b in zip(before, after, strict=True)) / len(before))
    means = [sum(scores) / len(scores) for scores in (success, locality, rephrase)]
    print(
        "grace, {} records: success {:.3f}, locality {:.3f}, rephrase {:.3f}".format(COUNT, *means)
    )
    assert means[0] >= 0.98
    assert means[1] >= 0.98


def test_forty_entries_live_at_once(model, cases, codebook):
    """All patches applied: one wrap, every fact still there; all dropped: the base again."""
    row = model.encode(cases[0]["prompt"]).ids
    place = [(0, len(row) - 1)]
    base = model.view.run([row], logits_at=place).logits_MV
    with model.applied(*codebook):
        ask = Ask(model)
        asked = [ask.score(case["prompt"], case["target_new"]) for case in cases]
        correct = sum(score.result().accuracy for score in asked) / len(cases)
    assert correct >= 0.98
    assert model.view.run([row], logits_at=place).logits_MV.equal(base)


def test_one_batch_of_many_patches(model, cases, codebook):
    """Eight rows, each with its own patch, in one generation: what each says alone."""
    prompts = [model.encode(case["prompt"]).ids for case in cases[:8]]
    with model.session(codebook[:8]):
        together = model.view.generate(prompts, max_new_tokens=6)
    for prompt, patch, said in zip(prompts, codebook[:8], together, strict=True):
        with model.session([patch]):
            assert model.view.generate([prompt], max_new_tokens=6) == [said]
