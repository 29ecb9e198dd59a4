"""The codebook on the unit sphere, and the method that fills it.

The reference beside the library's code is the published step, over all keys, in a few lines.
"""

from __future__ import annotations

import math
import random

import pytest
import tiny
import torch
from made import provenance
from torch.nn.functional import normalize

from knowpatch.editing import choose, edit, prepare
from knowpatch.errors import PatchError
from knowpatch.models.passes import Tap
from knowpatch.parts.kinds.hopfield import Hopfield, hopfield, query, recalled
from knowpatch.parts.nearest import Index
from knowpatch.parts.spans import continuation
from knowpatch.parts.wraps import Tokens, join
from knowpatch.patch import Patch, Wrap
from knowpatch.request import EditRequest

FRANCE, JAPAN, NILE = (
    EditRequest(prompt=prompt, subject=subject, target=tiny.EDITS[prompt])
    for prompt, subject in zip(tiny.EDITS, ("France", "Japan", "Nile"), strict=True)
)
OTHER = FRANCE.model_copy(update={"target": "Tokyo"})


def _plain(keys, one, beta=20.0, step=0.1):
    """Cosines of the published step, over all keys."""
    weights = (beta * keys @ one).softmax(0)
    drawn = normalize(weights @ keys, dim=0)
    return keys @ normalize((1 - step) * one + step * drawn, dim=0)


def _decided(wraps, queries):
    """What prompts of one token, whose inputs are the queries, decide."""
    ((kind, _),) = join(wraps)
    yes = torch.ones(len(queries), 1, dtype=torch.bool)
    return kind.decide(Tokens(queries[:, None], yes.long(), yes, yes))


def test_the_published_example():
    """The step draws (.8, .6) to (.8343, .5513): above .82, which .8 is not; below .85."""
    keys, values = torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    one = torch.tensor([[0.8, 0.6]])
    cosines, near = recalled(one, Index(keys))
    assert cosines[0].tolist() == pytest.approx([0.83431, 0.55130], abs=1e-4)
    assert near[0].tolist() == [0, 1]
    outputs = torch.tensor([[[5.0, 5.0]]])
    yes = torch.ones(1, 1, dtype=torch.bool)
    tokens = Tokens(one[:, None], yes.long(), yes, yes)
    for threshold, added in ((0.82, [6.0, 7.0]), (0.85, [5.0, 5.0])):
        ((kind, _),) = join([hopfield("m", keys, values, torch.zeros(2), threshold)])
        found = kind.act(tokens, outputs, kind.decide(tokens))
        assert found[0, 0].tolist() == added
        assert torch.equal(found, outputs) == (threshold == 0.85)


def test_the_step_over_the_nearest_is_that_over_all():
    """Equal where all keys are near ones; with thousands, the same winner and nearly its score."""
    draw = torch.Generator().manual_seed(0)
    keys = normalize(torch.randn(3000, 96, generator=draw), dim=1)
    moved = normalize(keys[:40] + 0.05 * torch.randn(40, 96, generator=draw), dim=1)
    for count, slack in ((50, 1e-6), (3000, 2e-3)):
        cosines, near = recalled(moved, Index(keys[:count]))
        for row, one in enumerate(moved):
            plain = _plain(keys[:count], one)
            best = int(cosines[row].argmax())
            assert int(near[row, best]) == int(plain.argmax())
            assert float(cosines[row, best]) == pytest.approx(float(plain.max()), abs=slack)


def test_a_row_is_its_own():
    """What a row decides is, bit for bit, what it decides alone."""
    draw = torch.Generator().manual_seed(1)
    keys = normalize(torch.randn(500, 96, generator=draw), dim=1)
    queries = normalize(keys[:60] + 0.07 * torch.randn(60, 96, generator=draw), dim=1)
    wrap = hopfield("m", keys, torch.zeros(500, 4), torch.zeros(96), 0.83)
    whole = _decided([wrap], queries)
    assert 0 < int((whole.entries >= 0).sum()) < 60
    choice = random.Random(0)
    for _ in range(60):
        some = choice.choices(range(60), k=choice.randint(1, 9))
        mine = _decided([wrap], queries[some])
        assert torch.equal(mine.scores, whole.scores[some])
        assert torch.equal(mine.entries, whole.entries[some])


def test_of_one_prompts_entries_the_newest_answers():
    """Also where its key is rounded otherwise, in one wrap or in several, whatever their means."""
    key = normalize(torch.ones(1, 8), dim=1)
    again = normalize(key + 1e-6 * torch.arange(8.0), dim=1)
    far = normalize(torch.tensor([[1.0] + [-1.0] * 7]), dim=1)
    zero, values = torch.zeros(8), torch.zeros(1, 4)
    first, second, third = (hopfield("m", k, values, zero, 0.9) for k in (key, again, far))
    assert _decided([first, second, third], torch.cat([key, far])).entries.tolist() == [1, 2]
    assert _decided([second, first], key).entries.tolist() == [1]
    both = hopfield("m", torch.cat([key, again]), torch.zeros(2, 4), zero, 0.9)
    assert _decided([both], key).entries.tolist() == [1]
    shifted = hopfield("m", query(far, key[0]), values, key[0], 0.9)
    ((kind, _),) = join([first, shifted, second])
    assert list(kind.owners_N) == [0, 2, 1]
    found = _decided([first, shifted, second], torch.cat([key, far]))
    assert [kind.owners_N[i] for i in found.entries.tolist()] == [2, 1]


@pytest.mark.parametrize(
    "changed",
    [
        {"mean": torch.zeros(3)},
        {"keys": torch.zeros(2, 2)},
        {"thresholds": torch.zeros(1, 1)},
        {"values": torch.zeros(0, 2)},
    ],
)
def test_a_damaged_wrap_is_refused(changed):
    good = hopfield("m", torch.eye(2)[:1], torch.zeros(1, 2), torch.zeros(2), 0.5)
    assert Hopfield.check(good) == (2, 2)
    with pytest.raises(PatchError, match="damaged wrap of kind hopfield@1"):
        Hopfield.check(Wrap("m", good.kind, {}, {**good.tensors, **changed}))


# -- the method ------------------------------------------------------------------------------------


def _said(model, prompt):
    return model.ask(prompt, max_new_tokens=1)


def _all_logits(model):
    rows = [model.view.encode(prompt).ids for prompt in [*tiny.FACTS, "The", "As everyone knows"]]
    places = [(i, column) for i, row in enumerate(rows) for column in range(len(row))]
    return model.view.run(rows, logits_at=places).logits_MV


def test_the_key_is_the_mean_of_the_prompts_last_part(known):
    """Of its last 60 % of tokens, rounded up, centred, of length 1; no noise in the value."""
    model = known("llama")
    options = {"layer": 2, "threshold": 0.5}
    (wrap,) = edit(model, FRANCE, method="horen", options=options).wraps
    ready = prepare(model, choose("horen", options)).prepared
    row, tap = model.view.encode(FRANCE.prompt).ids, Tap(wrap.module, "input")
    count = math.ceil(0.6 * len(row))
    places = [(0, column) for column in range(len(row) - count, len(row))]
    inputs = model.view.run([row], taps=[tap]).at(tap, places)
    wanted = normalize(inputs.mean(0) - ready.mean_I, dim=0)
    assert torch.allclose(wrap.tensors["keys"][0], wanted, atol=1e-5)
    assert wrap.tensors["thresholds"].tolist() == [0.5]


def test_dropping_in_any_order_gives_the_others_alone(known):
    model = known("llama")
    first, second, third = (edit(model, r, method="horen") for r in (FRANCE, JAPAN, NILE))
    base = _all_logits(model)
    with model.applied(first, third):
        both = _all_logits(model)
        assert _said(model, FRANCE.prompt) == FRANCE.target
        assert _said(model, NILE.prompt) == NILE.target
    for patch in (first, second, third):
        model.apply(patch)
    for request in (FRANCE, JAPAN, NILE):
        assert _said(model, request.prompt) == request.target
    model.drop(second.id)
    assert torch.equal(_all_logits(model), both)
    model.drop(first.id)
    model.drop(third.id)
    assert torch.equal(_all_logits(model), base)


def test_a_second_edit_of_a_prompt_wins(known):
    """On top, or in one batch, the newer target is said; it was trained as if alone."""
    model = known("llama")
    first = edit(model, FRANCE, method="horen")
    alone = edit(model, OTHER, method="horen")
    with model.applied(first):
        assert _said(model, FRANCE.prompt) == "Rome"
        second = edit(model, OTHER, method="horen")
        with model.applied(second):
            assert _said(model, FRANCE.prompt) == "Tokyo"
        assert _said(model, FRANCE.prompt) == "Rome"
    assert torch.allclose(
        second.wraps[0].tensors["values"], alone.wraps[0].tensors["values"], atol=1e-4
    )
    with model.applied(edit(model, [FRANCE, OTHER], method="horen")):
        assert _said(model, FRANCE.prompt) == "Tokyo"


def test_saved_and_loaded_it_is_the_same(known, tmp_path):
    model = known("llama")
    patch = edit(model, [FRANCE, JAPAN], method="horen")
    again = Patch.load(patch.save(tmp_path / "a"))
    assert again.id == patch.id
    with model.applied(patch):
        wanted = _all_logits(model)
    with model.applied(again):
        assert torch.equal(_all_logits(model), wanted)


def test_each_is_as_if_alone(known):
    model, method = known("llama"), choose("horen")
    ready = prepare(model, method)
    each = method.edit_each(model.view, [FRANCE, JAPAN], ready.prepared, None)
    for patch, request in zip(each, (FRANCE, JAPAN), strict=True):
        alone = edit(model, request, method="horen")
        for name, tensor in alone.wraps[0].tensors.items():
            assert torch.allclose(patch.wraps[0].tensors[name], tensor, atol=2e-2), name
        encoded = model.view.encode(request.prompt)
        target = continuation(model.tokenizer, encoded, request.target)
        with model.session([patch]):
            assert model.view.score([(encoded.ids, target)])[0].accuracy == 1


def test_the_threshold_is_calibrated_and_shown(known):
    model, method = known("llama"), choose("horen")
    ready = prepare(model, method).prepared
    (line,) = method.shown(ready)
    assert line.startswith("threshold ")
    assert ready.calibration.share(ready.calibration.outside, ready.threshold) <= 0.01
    (wrap,) = edit(model, FRANCE, method=method).wraps
    assert wrap.tensors["thresholds"].tolist() == pytest.approx([ready.threshold])
    assert method.shown(prepare(model, choose("horen", {"threshold": 0.5})).prepared) == []
    assert provenance(model, FRANCE).fingerprint == model.view.fingerprint
