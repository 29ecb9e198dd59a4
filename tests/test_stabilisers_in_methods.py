"""Restraints as options of the methods: RECT, SPHERE, NAS, PRUNE and ENCORE's early stop."""

from __future__ import annotations

import pytest
import tiny
import torch

from knowpatch.deltas import Dense, LowRank
from knowpatch.editing import choose, edit, prepare
from knowpatch.errors import EditError
from knowpatch.parts import located, stabilise, valued
from knowpatch.parts.located import traced
from knowpatch.parts.values import optimise
from knowpatch.request import EditRequest

SMALL = {"clamp": 4.0, "kl_factor": 0.0, "tokens": 1000, "ridge": 0.01}
SMALL |= {"steps": 8, "precision": "model"}
OPTIONS = {"memit": {**SMALL, "layers": [0]}, "rome": {**SMALL, "layer": 0}}
FRANCE, JAPAN, NILE = FACTS = [
    EditRequest(prompt=prompt, subject=subject, target=tiny.EDITS[prompt])
    for prompt, subject in zip(tiny.EDITS, ("France", "Japan", "Nile"), strict=True)
]
both = pytest.mark.parametrize("name", OPTIONS)


def _method(name, **more):
    return choose(name, {**OPTIONS[name], **more})


def _dense(delta):
    change = delta.change
    return (change.left @ change.right if isinstance(change, LowRank) else change.delta).double()


def _normal(*shape, seed):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=made, dtype=torch.float64)


# -- RECT and SPHERE -------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_sparse_change_keeps_its_share_of_entries(known, architecture, name):
    """A dense change, a fifth of its entries not zero; these are as they are without the option."""
    model = known(architecture)
    (whole,) = edit(model, FRANCE, method=_method(name)).deltas
    patch = edit(model, FRANCE, method=_method(name, sparse=0.2))
    (delta,) = patch.deltas
    assert isinstance(delta.change, Dense)
    assert patch.rank is None
    kept = _dense(delta) != 0
    assert abs(int(kept.sum()) - 0.2 * kept.numel()) <= 1
    assert torch.allclose(_dense(delta)[kept], _dense(whole)[kept], rtol=1e-5, atol=1e-8)


@both
def test_protected_directions_are_not_read(known, name):
    """The change reads nothing of the directions that hold most of the map; else it would."""
    model, method = known(), _method(name, protect=0.3)
    role = method.role(model.view, 0)
    leading_IR = stabilise.leading(model.view.base(role), 0.3)
    assert leading_IR.shape[1] > 0
    (delta,) = edit(model, FRANCE, method=method).deltas
    (plain,) = edit(model, FRANCE, method=_method(name)).deltas
    kept, before = (d.change.right.double() for d in (delta, plain))
    assert (kept @ leading_IR).norm() <= 1e-6 * kept.norm()
    assert (before @ leading_IR).norm() > 1e-3 * before.norm()


# -- NAS -------------------------------------------------------------------------------------------


def _values(method, view, requests):
    tasks = [method.task(view, request, ("",)) for request in requests]
    values = optimise(view, method.value_modules(view), tasks, method.settings(view))
    outputs = torch.stack(method._mlp_outputs(view, tasks))
    deltas = torch.stack([value.delta_D.double() for value in values])
    return tasks, values, outputs, deltas


@both
def test_an_anchored_value_has_the_norm_of_the_anchor(known, name):
    """|m0 + delta'| is the anchor, in the direction of m0 + delta; a cap enlarges nothing."""
    view, method = known().view, _method(name, anchor="scale")
    tasks, values, outputs_ND, deltas_ND = _values(method, view, FACTS)
    wanted_ND = outputs_ND + deltas_ND
    norm = 0.8 * float(wanted_ND.norm(dim=1).max())
    found_ND = outputs_ND + torch.stack(method.anchored(view, FACTS, tasks, values, norm))
    assert found_ND.norm(dim=1).tolist() == pytest.approx([norm] * 3, rel=1e-4)
    assert torch.cosine_similarity(found_ND, wanted_ND).tolist() == pytest.approx([1] * 3)

    method = _method(name, anchor="cap")
    capped_ND = outputs_ND + torch.stack(method.anchored(view, FACTS, tasks, values, norm))
    sizes_N = wanted_ND.norm(dim=1).clamp(max=norm)
    assert capped_ND.norm(dim=1).tolist() == pytest.approx(sizes_N.tolist(), rel=1e-4)


@both
def test_a_value_that_is_far_too_long_is_refused_by_name(known, name):
    """More than twice the anchor: one line with the prompt."""
    view, method = known().view, _method(name, anchor="scale")
    tasks, values, outputs_ND, deltas_ND = _values(method, view, [FRANCE])
    norm = float((outputs_ND + deltas_ND).norm()) / 2.1
    with pytest.raises(EditError, match=f"{FRANCE.prompt!r} is more than twice") as caught:
        method.anchored(view, [FRANCE], tasks, values, norm)
    assert "\n" not in str(caught.value)


def test_the_anchor_is_found_once(known, tmp_path, monkeypatch):
    """Pilots are optimised once for a model and its options, and the norm is kept on disk."""
    monkeypatch.setenv("KNOWPATCH_CACHE", str(tmp_path))
    monkeypatch.setattr(located, "ANCHORS", 6)
    asked = []

    def counted(view, modules, tasks, *more):
        asked.append(len(tasks))
        return optimise(view, modules, tasks, *more)

    monkeypatch.setattr(valued, "optimise", counted)
    norms = [_method("rome", anchor="scale", steps=3).anchor(known().view) for _ in range(2)]
    assert norms[0] == norms[1] > 0
    assert asked == [6]
    _method("rome", anchor="scale", steps=3, clamp=2.0).anchor(known().view)
    assert asked == [6, 6]
    assert _method("rome").anchor(known().view) is None


# -- PRUNE -----------------------------------------------------------------------------------------


@both
def test_the_sum_of_changes_is_restrained_once(known, name):
    """Changes far above the map's norm, one after the other: their sum is the restrained sum."""
    view, method = known().view, _method(name, restrain=1.5)
    base_DI = view.base(method.role(view, 0)).double()
    largest = stabilise.largest_singular(base_DI)
    changes = [
        (50 * largest * _normal(len(base_DI), 1, seed=i), _normal(1, base_DI.shape[1], seed=9 + i))
        for i in range(3)
    ]
    earlier, added_DI = None, torch.zeros_like(base_DI)
    for change in changes:
        added_DI += _dense(method.change(view, 0, change, earlier=earlier, guard_IR=None))
        earlier = stabilise.joined(earlier, change)
        wanted = stabilise.restrained(*earlier, largest, 1.5)
        assert wanted[0] is not earlier[0]
        assert (added_DI - wanted[0] @ wanted[1]).norm() <= 1e-5 * added_DI.norm()


@both
def test_edits_in_a_row_are_restrained_together(known, name):
    """The live changes add up to the restrained sum of what the traces say was computed."""
    model, method = known(), _method(name, restrain=1.5, clamp=60.0, learning_rate=2.0)
    base_DI = model.view.base(method.role(model.view, 0)).double()
    total, added_DI = None, torch.zeros_like(base_DI)
    for request in (FRANCE, NILE):
        patch = edit(model, request, method=method)
        assert {"left.0", "right.0"} <= set(patch.traces)
        total = stabilise.joined(total, traced(patch, 0))
        added_DI += sum(_dense(delta) for delta in patch.deltas)
        model.apply(patch)
    wanted = stabilise.restrained(*total, stabilise.largest_singular(base_DI), 1.5)
    wanted_DI = wanted[0] @ wanted[1]
    assert (added_DI - wanted_DI).norm() <= 1e-5 * wanted_DI.norm()
    state = prepare(model, method).state
    kept = state if name == "rome" else state.sums[0]
    assert all(torch.equal(mine, other) for mine, other in zip(kept, total, strict=True))


def test_nothing_to_restrain_is_no_change(known):
    """A small edit is the same with the option as without it, and says what it computed."""
    model, found = known(), []
    for options in ({}, {"restrain": 1.5}):
        found.append(edit(model, FRANCE, method=_method("memit", clamp=0.1, **options)))
    plain_DI, held_DI = (_dense(patch.deltas[0]) for patch in found)
    base_DI = model.view.base(_method("memit").role(model.view, 0))
    assert stabilise.largest_singular(plain_DI) < stabilise.largest_singular(base_DI)
    assert torch.equal(plain_DI, held_DI)
    assert set(found[1].traces) - set(found[0].traces) == {"left.0", "right.0"}


# -- ENCORE ----------------------------------------------------------------------------------------


@both
def test_hits_stop_no_later(known, name):
    """With hits=1 each value is done at the first step in which its target leads everywhere."""
    view, steps = known().view, []
    for hits in (1, None):
        method = _method(name, hits=hits, steps=20, enough=1e-6)
        steps.append([value.steps for value in _values(method, view, FACTS)[1]])
    assert all(one <= other for one, other in zip(*steps, strict=True))
    assert sum(steps[0]) < sum(steps[1])
