"""The table of residuals, and the method that fills it.

The reference beside the library's code is a loop over tokens and entries with plain cosines.
"""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from made import provenance
from torch.nn.functional import normalize

from knowpatch.ask import Ask
from knowpatch.edited import EditedModel
from knowpatch.editing import choose, edit, prepare
from knowpatch.errors import PatchError, RequestError
from knowpatch.models.passes import Tap
from knowpatch.models.sites import listening
from knowpatch.parts.kinds.residuals import Entry, Residuals, residuals, unit
from knowpatch.parts.spans import continuation
from knowpatch.parts.wraps import Tokens, join
from knowpatch.patch import Patch, Wrap
from knowpatch.request import EditRequest

FRANCE, JAPAN, NILE = (
    EditRequest(prompt=prompt, subject=subject, target=tiny.EDITS[prompt])
    for prompt, subject in zip(tiny.EDITS, ("France", "Japan", "Nile"), strict=True)
)
# The table itself is looked at, so without the keys that other wordings bring (test_wordings.py).
OPTIONS = {"clamp": 8.0, "layer": 0, "threshold": 0.9, "wordings": False}


def _wrap(rows, mean=None, module="m"):
    """A wrap from (key, residual, threshold, token, subject) rows."""
    entries = [
        Entry(
            torch.tensor(key, dtype=torch.float32),
            torch.tensor(value, dtype=torch.float32),
            *rest,
        )
        for key, value, *rest in rows
    ]
    size = len(rows[0][0])
    return residuals(module, entries, torch.zeros(size) if mean is None else mean)


def _tokens(inputs, ids=None, first=None):
    inputs_BTI = torch.tensor(inputs, dtype=torch.float32)
    shape = inputs_BTI.shape[:2]
    yes = torch.ones(shape, dtype=torch.bool)
    ids_BT = torch.ones(shape, dtype=torch.int64) if ids is None else torch.tensor(ids)
    return Tokens(inputs_BTI, ids_BT, yes, ~yes if first is None else torch.tensor(first))


def _put(kind, tokens, outputs):
    return kind.act(tokens, outputs, kind.decide(tokens))


def test_the_published_example():
    """Cosine .8 is above gamma .65 and adds the residual; .6 is not, and leaves every bit."""
    ((kind, _),) = join([_wrap([((1.0, 0.0), (0.0, 2.0), 0.65, 1, "a")])])
    inputs = [[[0.8, 0.6], [0.6, 0.8]]]
    outputs = torch.tensor(inputs)
    found = _put(kind, _tokens(inputs), outputs)
    assert found[0, 0].tolist() == pytest.approx([0.8, 2.6])
    assert torch.equal(found[0, 1], outputs[0, 1])


def test_neither_the_first_token_nor_another_id_fires():
    ((kind, _),) = join([_wrap([((1.0, 0.0), (0.0, 2.0), 0.65, 7, "a")])])
    inputs = [[[1.0, 0.0]] * 3]
    tokens = _tokens(inputs, ids=[[7, 7, 8]], first=[[True, False, False]])
    assert (kind.decide(tokens).entries >= 0).tolist() == [[False, True, False]]


def test_entries_are_found_as_by_a_loop():
    """Of those for the token the nearest, by the cosine of what is centred; several means."""
    draw = torch.Generator().manual_seed(0)
    means = [torch.zeros(24), torch.randn(24, generator=draw)]
    rows = [
        [
            (
                normalize(torch.randn(24, generator=draw), dim=0).tolist(),
                torch.randn(8, generator=draw).tolist(),
                0.2 + 0.1 * (i % 3),
                i % 4,
                f"{number} {i}",
            )
            for i in range(150)
        ]
        for number in range(3)
    ]
    wraps = [_wrap(mine, means[number % 2]) for number, mine in enumerate(rows)]
    ((kind, _),) = join(wraps)
    inputs = torch.randn(5, 9, 24, generator=draw)
    ids = torch.randint(0, 6, (5, 9), generator=draw)
    tokens = _tokens(inputs.tolist(), ids.tolist())
    outputs = torch.randn(5, 9, 8, generator=draw)
    decision, found = kind.decide(tokens), _put(kind, tokens, outputs)
    fired = 0
    for b in range(5):
        for t in range(9):
            best = (-1.0, None)
            for number, mine in enumerate(rows):
                query = normalize(inputs[b, t] - means[number % 2], dim=0)
                for row in mine:
                    if row[3] == ids[b, t]:
                        alike = float(query @ torch.tensor(row[0]))
                        best = max(best, (alike, (number, row)), key=lambda one: one[0])
            alike, entry = best
            assert float(decision.scores[b, t]) == pytest.approx(alike, abs=1e-5)
            wanted = outputs[b, t]
            if entry is not None:
                number, row = entry
                assert kind.owners_N[int(decision.nearest[b, t])] == number
                if alike > row[2]:
                    wanted, fired = wanted + torch.tensor(row[1]), fired + 1
            assert torch.allclose(found[b, t], wanted, atol=1e-6)
    assert 5 < fired < 40


def test_entries_about_one_subject_act_together():
    """Where two patches' keys recognise each other, residuals are added; dropped, they are not."""
    near = (math.cos(0.3), math.sin(0.3))
    first = _wrap([((1.0, 0.0), (1.0, 0.0), 0.9, 1, "Lyon")])
    second = _wrap([(near, (0.0, 1.0), 0.9, 1, "Lyon")])
    other = _wrap([(near, (0.0, 5.0), 0.9, 1, "Nice")])
    far = _wrap([((0.0, 1.0), (0.0, 9.0), 0.9, 1, "Lyon")])

    def added(*wraps):
        ((kind, _),) = join(wraps)
        return _put(kind, _tokens([[[1.0, 0.0], [*near]]]), torch.zeros(1, 2, 2))[0].tolist()

    assert added(first) == [[1, 0], [1, 0]]
    assert added(first, second) == [[1, 1], [1, 1]]
    assert added(first, second, far) == [[1, 1], [1, 1]]
    assert added(second) == [[0, 1], [0, 1]]
    assert added(first, other) == [[1, 0], [0, 5]]


@pytest.mark.parametrize(
    "changed",
    [
        {"mean": torch.zeros(3)},
        {"keys": torch.zeros(2, 2)},
        {"thresholds": torch.zeros(1, 1)},
        {"residuals": torch.zeros(0, 2)},
    ],
)
def test_a_damaged_wrap_is_refused(changed):
    good = _wrap([((1.0, 0.0), (0.0, 2.0), 0.65, 1, "a")])
    Residuals.check(good)
    with pytest.raises(PatchError, match="damaged wrap of kind residuals@1"):
        Residuals.check(Wrap("m", good.kind, good.data, {**good.tensors, **changed}))
    for data in ({"tokens": [1]}, {"tokens": [1, 2], "subjects": ["a"]}, {"subjects": ["a"]}):
        with pytest.raises(PatchError, match="damaged wrap of kind residuals@1"):
            Residuals.check(Wrap("m", good.kind, data, good.tensors))


# -- the method ------------------------------------------------------------------------------------


def _edit(model, requests, **extra):
    return edit(model, requests, method="neuraldb", options={**OPTIONS, **extra})


def _scores(model, requests, patch):
    pairs = []
    for request in requests:
        encoded = model.view.encode(request.prompt)
        pairs.append((encoded.ids, continuation(model.tokenizer, encoded, request.target)))
    with model.session([patch]):
        return [one.probability for one in model.view.score(pairs)]


def test_the_key_is_the_centred_input_at_the_subjects_end(known):
    model = known("llama")
    patch = _edit(model, FRANCE, contexts=0)
    (wrap,) = patch.wraps
    ready = prepare(model, choose("neuraldb", {**OPTIONS, "contexts": 0})).prepared
    tap = Tap(wrap.module, "input")
    row = model.view.encode(FRANCE.prompt).ids
    place = [model.view.decode([i]).strip() for i in row].index("France")
    inputs = model.view.run([row], taps=[tap]).at(tap, [(0, place)])
    assert wrap.data == {"tokens": [row[place]], "subjects": ["France"]}
    assert torch.allclose(wrap.tensors["keys"], unit(inputs, ready.mean_I), atol=1e-5)
    assert torch.allclose(wrap.tensors["thresholds"], torch.tensor([0.9]))


def test_it_answers_wherever_the_subject_stands_in_texts_being_written_too(known):
    """Steps of a generation give what whole passes give; other subjects' texts stay bit for bit."""
    model = known("llama")
    patch = _edit(model, FRANCE)
    row = model.view.encode("The capital of Japan is").ids
    france = model.view.encode(f"Two plus. {FRANCE.prompt}").ids
    ends = [(0, len(row) - 1)]
    base = model.view.run([row], logits_at=ends).logits_MV
    with model.session([patch]), listening() as heard:
        assert torch.equal(model.view.run([row], logits_at=ends).logits_MV, base)
        assert not any(firing.fired for firing in heard)
        whole = model.view.run([france], logits_at=[(0, len(france) - 1)]).logits_MV
        assert any(firing.fired for firing in heard)
        cut = len(france) - 3  # the subject is read on top of a cache
        out = model(torch.tensor([france[:cut]]), use_cache=True)
        for token in france[cut:]:
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values)
        assert torch.allclose(out.logits[0, -1], whole[0], atol=1e-3)
        said = Ask(model).generate(f"Two plus. {FRANCE.prompt}", max_new_tokens=1)
        assert said.result().ids[0] == int(whole.argmax())


LANGUAGE = EditRequest(prompt="The language of France is", subject="France", target="Cairo")


def test_two_facts_about_one_subject(known):
    """In one call they share a residual; one after the other they add, and drop exactly."""
    model = known("llama")
    together = _edit(model, [FRANCE, LANGUAGE], steps=60)
    assert set(together.wraps[0].data["subjects"]) == {"France"}
    assert len(together.wraps[0].tensors["residuals"].unique(dim=0)) == 1
    before = _scores(model, [FRANCE, LANGUAGE], None)
    after = _scores(model, [FRANCE, LANGUAGE], together)
    assert all(new > 3 * old for old, new in zip(before, after, strict=True))
    first = _edit(model, FRANCE)
    alone = _scores(model, [FRANCE], first)
    with model.applied(first):
        second = _edit(model, LANGUAGE)
    model.apply(first)
    model.apply(second)
    assert _scores(model, [LANGUAGE], None)[0] > 3 * before[1]
    model.drop(second.id)
    assert _scores(model, [FRANCE], None) == alone
    model.drop(first.id)
    assert _scores(model, [FRANCE, LANGUAGE], None) == before


def test_saved_and_loaded_it_is_the_same(known, tmp_path):
    model = known("llama")
    patch = _edit(model, [FRANCE, JAPAN, NILE])
    again = Patch.load(patch.save(tmp_path / "a"))
    requests = [FRANCE, JAPAN, NILE]
    assert again.id == patch.id
    assert _scores(model, requests, again) == _scores(model, requests, patch)


def test_each_is_as_if_alone(known):
    """`edit_each` gives the entries of single edits."""
    model, method = known("llama"), choose("neuraldb", OPTIONS)
    ready = prepare(model, method)
    each = method.edit_each(model.view, [FRANCE, JAPAN], ready.prepared, None)
    for patch, request in zip(each, (FRANCE, JAPAN), strict=True):
        alone = _edit(model, request)
        for name, tensor in alone.wraps[0].tensors.items():
            assert torch.allclose(patch.wraps[0].tensors[name], tensor, atol=2e-2), name


def test_a_subject_that_opens_its_text(known):
    """It is known by the token behind it, and by nothing that only looks like that."""
    model = known("llama")
    request = EditRequest(prompt="France is", subject="France", target="Rome")
    (row,) = [model.view.encode(request.prompt).ids]
    start = [i for i, token in enumerate(row) if model.view.decode([token]).strip() == "France"]
    if start == [0]:
        (wrap,) = _edit(model, request, contexts=0).wraps
        assert wrap.data["tokens"] == [row[1]]
        assert wrap.tensors["thresholds"].tolist() == pytest.approx([0.99])
        with pytest.raises(RequestError, match="one token has nothing to know it by"):
            _edit(model, request.model_copy(update={"prompt": "France"}), contexts=0)


def test_the_threshold_is_calibrated_and_shown(known):
    model = known("llama")
    method = choose("neuraldb", {"layer": 0})
    ready = prepare(model, method).prepared
    (line,) = method.shown(ready)
    assert line.startswith("threshold ")
    assert ready.calibration.share(ready.calibration.outside, ready.threshold) <= 0.01
    patch = edit(model, FRANCE, method=method)
    assert patch.wraps[0].tensors["thresholds"].tolist() == pytest.approx(
        [ready.threshold] * len(patch.wraps[0].data["tokens"])
    )
    assert provenance(model, FRANCE).fingerprint == patch.provenance.fingerprint


def test_values_in_one_model_leave_it_alone():
    model = EditedModel.of(*tiny.trained("gpt2"))
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    _edit(model, FRANCE)
    assert all(torch.equal(before[n], t) for n, t in model.model.state_dict().items())
