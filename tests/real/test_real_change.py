"""Locations on the bundled model: the lens, changes of weights, neurons, a trip there and back."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch

from knowpatch.editing import choose, edit
from knowpatch.locate import neurons, roundtrip
from knowpatch.locate.lens import before_and_after
from knowpatch.locate.neurons import knowledge_neurons
from knowpatch.locate.portrait import portrait
from knowpatch.locate.roundtrip import Trip, round_trip
from knowpatch.parts.attribution import Search
from knowpatch.parts.spans import continuation
from knowpatch.probes import controls
from knowpatch.request import EditRequest

PROMPT = "The capital of Australia is"
REQUEST = EditRequest(prompt=PROMPT, subject="Australia", target="Canberra", old="Sydney")


def _token(model, text):
    return continuation(model.tokenizer, model.encode(PROMPT), text)[0]


@pytest.fixture(autouse=True)
def fewer_controls(monkeypatch):
    """Twenty control prompts say as much here."""
    for module in (neurons, roundtrip):
        monkeypatch.setattr(module, "controls", lambda: controls()[:20])


@pytest.fixture(scope="module")
def patch(model):
    """The fact, written by fine-tuning: one matrix, one block."""
    return edit(model, REQUEST, method="ft")


def test_an_edit_moves_the_lens_from_its_block_on(model, patch):
    """The new answer comes first at the end; below the block that was edited nothing moves."""
    answers = {"new": _token(model, "Canberra"), "old": _token(model, "Sydney")}
    without, changed = before_and_after(model, PROMPT, [patch], answers)
    ids = model.encode(PROMPT).ids
    logits_V = model.view.run([ids], logits_at=[(0, len(ids) - 1)]).logits_MV[0]
    assert torch.allclose(
        without.p_LTA[-1, -1], logits_V.softmax(-1)[list(answers.values())], atol=1e-4
    )
    assert int(changed.rank_LTA[-1, -1, 0]) == 1
    block = portrait(model.view, patch).matrices[0].layer
    assert torch.equal(changed.p_LTA[: block + 1], without.p_LTA[: block + 1])
    assert not torch.equal(changed.p_LTA[block + 1], without.p_LTA[block + 1])


def test_fine_tuning_spreads_its_change_over_the_columns(model, patch):
    """One matrix; one percent of its columns hold little more than one percent of the change."""
    found = portrait(model.view, patch)
    (one,) = found.matrices
    assert one.shape == (576, 1536)
    assert one.sparsity.percent_columns < 0.1
    assert one.sparsity.hoyer_columns < 0.2
    assert found.projected["normed"][0].token.strip() == "Canberra"


def test_a_few_neurons_carry_a_fact(model):
    """Suppressed, the answer loses more than a quarter of its probability; control prompts keep
    theirs to a tenth, and random neurons do nothing."""
    found = knowledge_neurons(
        model.view,
        ["The capital of France is"],
        "Paris",
        Search(layers=range(20, 30), points=3, most=10),
    )
    tests = {(one.action, one.neurons): one for one in found.tests}
    assert tests["suppress", "found"].fact[0] < -0.25
    assert abs(fmean(tests["suppress", "found"].controls)) < 0.1
    assert abs(tests["suppress", "random"].fact[0]) < 0.05


def test_editing_back_does_not_return_and_dropping_does(model):
    """Of one fact, by fine-tuning."""
    back = EditRequest(prompt=PROMPT, subject="Australia", target="Sydney", old="Canberra")
    trip = Trip("one", REQUEST, back, (PROMPT,), ("Melbourne", "Perth"))
    row = round_trip(model, choose("ft"), trip)
    assert row["success"] == 1
    assert row["weights_left"] > 0.1
    assert row["edited_back"]["kl"] > 0
    assert row["dropped"]["kl"] == row["dropped"]["distortion"] == 0
    assert row["dropped"]["bytes_same"]
