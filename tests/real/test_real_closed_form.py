"""The closed-form methods on the bundled model and the first records of CounterFact."""

from __future__ import annotations

import math

import pytest

from knowpatch.editing import edit, edit_in_turn
from knowpatch.method import METHODS
from knowpatch.models.fingerprint import tensor_digest
from knowpatch.parts.spans import continuation
from knowpatch.request import EditRequest


@pytest.fixture(scope="module")
def facts(counterfact):
    return [
        EditRequest(prompt=r["prompt"], subject=r["subject"], target=r["target_new"])
        for r in counterfact[:10]
    ]


def _success(model, facts):
    pairs = []
    for fact in facts:
        encoded = model.encode(fact.prompt)
        pairs.append((encoded.ids, continuation(model.tokenizer, encoded, fact.target)))
    return sum(scored.accuracy for scored in model.view.score(pairs)) / len(pairs)


def _nll(model, text):
    ids = model.view.encode(text).ids[:192]
    (scored,) = model.view.score([(ids[:1], ids[1:])])
    return -sum(scored.logprobs) / len(scored.logprobs)


@pytest.mark.parametrize(("name", "most"), [("memit", 1.05), ("alphaedit", 1.1)])
def test_a_batch_of_ten(model, text, facts, name, most):
    """Success 0.95, perplexity close to the base's, rank of at most ten, every byte undone."""
    weights = {n: tensor_digest(p) for n, p in model.model.named_parameters()}
    before, plain = _success(model, facts), _nll(model, text)
    patch = edit(model, facts, method=name)
    assert all(delta.change.rank <= len(facts) for delta in patch.deltas)
    with model.applied(patch):
        after, perplexity = _success(model, facts), math.exp(_nll(model, text) - plain)
    print(f"{name}, 10 records at once: success {after:.3f}, perplexity {perplexity:.4f}")
    assert before < 0.3
    assert after >= 0.95
    assert perplexity <= most
    assert {n: tensor_digest(p) for n, p in model.model.named_parameters()} == weights


def test_one_after_the_other(model, facts, tmp_path):
    """Five facts, each on top of the earlier ones: all of them hold at the end."""
    method = METHODS.get("memit")()
    patches = edit_in_turn(model, facts[:5], tmp_path, method=method)
    with model.applied(*patches):
        assert _success(model, facts[:5]) >= 0.95
    assert not model.live
