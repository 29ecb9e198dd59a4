"""MEMOIR's residual memory: masks, whose is used, what is summed, and how an edit is trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from made import provenance

from knowpatch.editing import choose, edit
from knowpatch.errors import PatchError
from knowpatch.models.sites import listening
from knowpatch.parts.kinds.residual import (
    RESIDUAL,
    Residual,
    overlap,
    residual,
    stands_out,
    written,
)
from knowpatch.parts.readings import behind_first
from knowpatch.parts.wraps import Tokens
from knowpatch.patch import Patch, Wrap
from knowpatch.request import EditRequest

OPTIONS = {"layer": 1, "share": 0.5, "rate": 0.25, "steps": 80}
FRANCE, JAPAN, NILE = (EditRequest(prompt=p, target=t) for p, t in tiny.EDITS.items())


def _mask(*columns, width=6):
    return torch.tensor([[column in columns for column in range(width)]])


def _tokens(rows_BI, length=3):
    """Rows of one text token each, behind a first token that says nothing, padded on the right."""
    inputs_BTI = torch.full((len(rows_BI), length, rows_BI.shape[1]), 9.0)
    inputs_BTI[:, 1] = rows_BI
    real_BT = torch.tensor([[True, True, False]] * len(rows_BI))
    first_BT = torch.tensor([[True, False, False]] * len(rows_BI))
    return Tokens(inputs_BTI, torch.zeros(len(rows_BI), length).long(), real_BT, first_BT)


def test_the_published_example():
    """I=6, k=2: which columns stand out, and whose mask is used at which threshold (self-check)."""
    blank = torch.zeros(6)
    assert torch.equal(stands_out(torch.tensor([[3.0, -5, 1, 0, 2, 0]]), blank, 2), _mask(0, 1))
    query = torch.tensor([[4.0, 0, 0, 5, 0, 0]])
    assert torch.equal(stands_out(query, blank, 2), _mask(0, 3))
    assert overlap(_mask(0, 3), _mask(0, 1)).item() == 0.5
    rows = torch.tensor([[1.0, 0], [0, 1]])
    tokens, outputs = _tokens(query), torch.randn(1, 3, 2)
    for threshold, fires in ((0.4, True), (0.6, False)):
        kind = Residual.join([residual("m", _mask(0, 1), rows, blank, threshold)])
        decision = kind.decide(tokens)
        assert (decision.scores.item(), decision.entries.item() >= 0) == (0.5, fires)
        acted = kind.act(tokens, outputs, decision)
        wanted = outputs + tokens.inputs_BTI[..., :2] if fires else outputs
        assert torch.equal(acted, wanted)


def test_the_stored_mask_is_used_and_the_newest_of_equals():
    """Sums over shared columns, masks of different sizes and backgrounds, ties."""
    draw = torch.Generator().manual_seed(0)
    usual = torch.tensor([1.0, 0, 0, 0, 0, 0])
    wraps = [
        residual("m", _mask(0, 1), torch.randn(2, 2, generator=draw), torch.zeros(6), 0.3),
        residual("m", _mask(1, 2, 3), torch.randn(3, 2, generator=draw), torch.zeros(6), 0.3),
        residual("m", _mask(0, 1), torch.randn(2, 2, generator=draw), torch.zeros(6), 0.3),
        residual("m", _mask(4, 5), torch.randn(2, 2, generator=draw), usual, 0.3),
    ]
    kind = Residual.join(wraps)
    total = torch.zeros(6, 2)
    for wrap, columns in zip(wraps, ([0, 1], [1, 2, 3], [0, 1], [4, 5]), strict=True):
        total[columns] += wrap.tensors["rows"]
    assert torch.allclose(kind.rows_UD, total[kind.columns_U])
    assert torch.allclose(written(wraps[:3]) + written(wraps[3:]), total)
    queries = torch.tensor(
        [[5.0, 4, 0, 0, 0, 0], [0, 4, 5, 3, 0, 0], [1.0, 0, 0, 0, 2, 2], [0, 0, 3, 1, 0, 0.5]]
    )
    tokens = _tokens(queries)
    decision = kind.decide(tokens)
    assert decision.entries.tolist() == [2, 1, 3, 1]
    for row, entry in enumerate(decision.entries.tolist()):
        alone = kind.decide(tokens.of(torch.tensor([row])))
        assert alone.entries.item() == entry
        assert alone.scores.item() == decision.scores[row].item()
    outputs = torch.randn(4, 3, 2)
    acted = kind.act(tokens, outputs, decision)
    kept = tokens.inputs_BTI * kind.masks_NI[decision.entries][:, None]
    assert torch.allclose(acted, outputs + kept @ total, atol=1e-6)


def test_the_first_token_does_not_count_unless_it_is_all():
    tokens = _tokens(torch.ones(2, 6))
    assert behind_first(tokens).mean_BI().tolist() == [[1.0] * 6] * 2
    single = replace(tokens, prompt_BT=tokens.first_BT)
    assert behind_first(single).mean_BI().tolist() == [[9.0] * 6] * 2


def test_damaged_wraps_are_refused(known):
    model = known("llama")
    good = residual("m", _mask(0, 1), torch.zeros(2, 2), torch.zeros(6), 0.3)
    assert Residual.check(good) == (6, 2)
    for name, tensor in {
        "masks.index": torch.tensor([[0, 6]]),
        "rows": torch.zeros(3, 2),
        "background": torch.zeros(1),
    }.items():
        bad = Wrap("m", RESIDUAL, good.data, {**good.tensors, name: tensor})
        with pytest.raises(PatchError, match=r"damaged wrap of kind residual@1"):
            model.apply(Patch(provenance(model, FRANCE), wraps=(bad,)))
    twice = {**good.tensors, "masks.index": torch.tensor([[1, 1]]), "rows": torch.zeros(1, 2)}
    with pytest.raises(PatchError, match="damaged"):
        Residual.check(Wrap("m", RESIDUAL, good.data, twice))


def test_a_later_edit_stands_on_what_is_written(known):
    """Columns are shared: the second edit, made on the first, leaves both said; each alone says its
    own, and what is left after an undo is as if the other had never been."""
    model = known("llama")
    method = choose("memoir", {**OPTIONS, "share": 0.9, "threshold": 0.95})
    first = edit(model, FRANCE, method=method)
    model.apply(first)
    second = edit(model, NILE, method=method)
    model.apply(second)
    assert _said(model, FRANCE)
    assert _said(model, NILE)
    (state,) = model.ready.state.values()
    assert torch.equal(state, written(first.wraps))
    rows = [model.view.encode(prompt).ids for prompt in tiny.FACTS]
    ends = [(i, len(row) - 1) for i, row in enumerate(rows)]
    model.drop(first.id)
    dropped = model.view.run(rows, logits_at=ends).logits_MV
    model.drop(second.id)
    model.apply(second)
    assert torch.equal(model.view.run(rows, logits_at=ends).logits_MV, dropped)


def _said(model, request):
    encoded = model.encode(request.prompt)
    (answer,) = model.view.generate([encoded.ids], max_new_tokens=1)
    return model.view.decode(answer).strip() == request.target


def test_its_own_writes_do_not_move_what_it_decides_by(known):
    """A question's score is the same whatever has been written, and is what `--why` tells."""
    model = known("llama")
    patch = edit(model, FRANCE, method=choose("memoir", OPTIONS))
    (wrap,) = patch.wraps
    louder = Wrap(
        wrap.module, wrap.kind, wrap.data, {**wrap.tensors, "rows": 50 * wrap.tensors["rows"]}
    )
    other = Patch(patch.provenance, wraps=(louder,))
    rows = [model.view.encode(prompt).ids for prompt in tiny.FACTS]
    heard = {}
    for each in (patch, other):
        with model.session([each]), listening() as firings:
            model.view.generate(rows, max_new_tokens=3)
        heard[each.id] = [(f.row, f.score, f.fired) for f in firings]
    assert heard[patch.id] == heard[other.id]
    own = list(tiny.FACTS).index(FRANCE.prompt)
    assert (own, 1.0, True) in heard[patch.id]


def test_a_batch_has_a_mask_for_each(known):
    """Requests of one patch are trained in one sum, each through its own mask."""
    model = known("llama")
    patch = edit(model, [FRANCE, JAPAN, NILE], method=choose("memoir", OPTIONS))
    (wrap,) = patch.wraps
    index = wrap.tensors["masks.index"]
    assert index.shape == (3, 48)
    assert len(wrap.tensors["rows"]) == len(index.unique())
    with model.applied(patch):
        assert all(_said(model, request) for request in (FRANCE, JAPAN, NILE))


def test_the_calibration_is_shown(known):
    model = known("llama")
    method = choose("memoir", OPTIONS)
    prepared = method.prepare(model.view)
    (line,) = method.shown(prepared)
    assert line.startswith("threshold ")
    assert "(similarity)" in line
    given = choose("memoir", {**OPTIONS, "threshold": 0.7})
    assert given.shown(given.prepare(model.view)) == []
