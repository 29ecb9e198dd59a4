"""Passes from one block up, and token gradients, against the plain full pass."""

from __future__ import annotations

import gc
import weakref

import pytest
import tiny
import torch

from knowpatch.editing import edit
from knowpatch.models.above import Above
from knowpatch.models.passes import Shift, Tap
from knowpatch.parts.gradients import Gradients
from knowpatch.request import EditRequest

ARCHITECTURES = sorted(tiny.ARCHITECTURES)


def _rows(view, lengths=(9, 5, 7)):
    made = torch.Generator().manual_seed(1)
    top = min(view.vocabulary, 400)
    return [torch.randint(top, (n,), generator=made).tolist() for n in lengths]


def _changed(view, layer):
    """A map's weight with a little noise, as stored."""
    role = view.roles.linear("mlp.out", layer)
    weight = view.values(role.address.parameter).float()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    changed = weight + 0.05 * weight.std() * noise
    changed.requires_grad_()
    return role.address.parameter, weight, changed


def _plain(model, ids, name, weight, places, labels):
    """The NLL from the model's own full forward, row by row, with one other parameter."""
    total = torch.zeros(())
    for (row, at), label in zip(places, labels, strict=True):
        out = torch.func.functional_call(
            model, {name: weight}, (torch.tensor([ids[row][: at + 1]]),), {"use_cache": False}
        )
        total = total - out.logits[0, -1].float().log_softmax(-1)[label]
    return total


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layer", [0, 2])
def test_blocks_above_give_what_the_whole_model_gives(known, architecture, layer):
    """Loss and the weight's gradient, for rows of several lengths in any order, to 1e-4."""
    view = known(architecture).view
    ids = _rows(view)
    above = Above(view, layer, ids)
    assert above.skips == (layer > 0)
    name, _, changed = _changed(view, layer)
    places, labels = [(0, 8), (0, 3), (1, 6), (2, 4)], [5, 6, 7, 8]
    order = [0, 2, 1]
    logits = above.run(order, weights={name: changed}, logits_at=places).logits_MV
    found = -logits.log_softmax(-1)[range(4), labels].sum()
    (mine,) = torch.autograd.grad(found, changed)
    plain = _plain(view.model, [ids[i] for i in order], name, changed, places, labels)
    (theirs,) = torch.autograd.grad(plain, changed)
    assert float(found.detach()) == pytest.approx(float(plain.detach()), rel=1e-4)
    assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


def test_the_model_is_left_as_it_was(known):
    """After a pass with another weight the next pass has the model's own again."""
    view = known("llama").view
    ids = _rows(view)
    above = Above(view, 2, ids)
    name, _, changed = _changed(view, 2)
    before = above.run([0], logits_at=[(0, 8)]).logits_MV
    moved = above.run([0], weights={name: changed}, logits_at=[(0, 8)]).logits_MV
    after = above.run([0], logits_at=[(0, 8)]).logits_MV
    assert torch.equal(before, after)
    assert not torch.equal(before, moved)
    whole = view.run([ids[0]], logits_at=[(0, 8)]).logits_MV
    assert torch.allclose(after, whole, atol=1e-4)


def test_what_enters_the_block_can_be_moved(known):
    """A shift of the block below is one of the full pass, and has its gradient."""
    view = known("llama").view
    ids = _rows(view)
    module = view.roles.blocks[1].module
    delta = torch.randn(1, view.roles.hidden_size, generator=torch.Generator().manual_seed(3))
    delta.requires_grad_()
    shift, tap = Shift(module, [(0, 3)], delta), Tap(view.roles.blocks[3].module, "output")
    part = Above(view, 2, ids).run([1], shifts=[shift], taps=[tap], logits_at=[(0, 4)])
    whole = view.run([ids[1]], shifts=[shift], taps=[tap], logits_at=[(0, 4)], grad=True)
    for one, other in ((part.logits_MV, whole.logits_MV), (part.tapped[tap], whole.tapped[tap])):
        assert torch.allclose(one, other, atol=1e-4)
    mine, theirs = (torch.autograd.grad(run.logits_MV[0, 3], delta)[0] for run in (part, whole))
    assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


def test_too_many_rows_to_keep_run_whole(known, monkeypatch):
    """Without room for states all blocks run, with the same numbers."""
    view = known("llama").view
    ids = _rows(view)
    kept = Above(view, 2, ids).run([0, 1], logits_at=[(1, 4)]).logits_MV
    monkeypatch.setattr("knowpatch.models.above.HELD", 0)
    above = Above(view, 2, ids)
    assert not above.skips
    assert torch.allclose(above.run([0, 1], logits_at=[(1, 4)]).logits_MV, kept, atol=1e-5)


def test_a_memory_in_a_lower_block_acts(known):
    """A live wrap below the block counts in what is known; one above it acts in every pass."""
    model = known("llama")
    request = EditRequest(prompt="The capital of France is", target="Rome")
    ids = [list(model.encode(request.prompt).ids)]
    for layer in (0, 3):
        patch = edit(model, request, method="grace", options={"layer": layer})
        plain = model.view.run(ids, logits_at=[(0, len(ids[0]) - 1)]).logits_MV
        with model.applied(patch):
            above = Above(model.view, 2, ids)
            part = above.run([0], logits_at=[(0, len(ids[0]) - 1)]).logits_MV
            whole = model.view.run(ids, logits_at=[(0, len(ids[0]) - 1)]).logits_MV
        assert torch.allclose(part, whole, atol=1e-4)
        assert not torch.allclose(part, plain, atol=1e-2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_token_gradients_make_the_weights_gradients(known, architecture):
    """sum_t g_t x_t^T of two maps is what autograd gives for their weights, to 1e-4."""
    view = known(architecture).view
    ids = _rows(view)
    roles = [view.roles.linear("mlp.out", layer) for layer in (1, 2)]
    # At every place of the rows, so that nothing of a weight's gradient is missing.
    places = [(row, at) for row, one in enumerate(ids) for at in range(len(one) - 1)]
    labels = [ids[row][at + 1] for row, at in places]
    gradients = Gradients(view, [role.module for role in roles])
    loss, found = gradients.of(ids, places, labels, [0.5] * len(places))
    for role in roles:
        name = role.address.parameter
        weight = view.values(name).clone()
        weight.requires_grad_()
        plain = 0.5 * _plain(view.model, ids, name, weight, places, labels)
        (theirs,) = torch.autograd.grad(plain, weight)
        each = found[role.module]
        mine = role.oriented(each.gradients_MO.T @ each.inputs_MI)
        assert float(plain.detach()) == pytest.approx(loss, rel=1e-4)
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


def test_a_twin_goes_with_the_last_who_uses_it(known):
    """A twin may hold all weights a second time: it must not wait for the collector of cycles."""
    view = known("llama").view
    gc.disable()
    try:
        above = Above(view, 2, _rows(view), dtype=torch.bfloat16)
        block = above._twin.get_submodule(view.roles.blocks[0].module)
        weight = weakref.ref(block.mlp.up_proj.weight)
        del above, block
        assert weight() is None
    finally:
        gc.enable()
