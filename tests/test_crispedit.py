"""CrispEdit: its curvature against the plain definition, and the self-checks of its card."""

from __future__ import annotations

import pytest
import tiny
import torch
from made import tuned_loss

from knowpatch.edited import EditedModel
from knowpatch.editing import choose, edit, prepare
from knowpatch.models.passes import Tap
from knowpatch.parts import moments
from knowpatch.parts.curvature import Curvature, Projected, Rotated, flat
from knowpatch.request import EditRequest

FACTS = [EditRequest(prompt=prompt, target=target) for prompt, target in tiny.EDITS.items()]
OPTIONS = {"layers": [1, 2], "tokens": 800, "learning_rate": 1e-2, "steps": 40, "eos": False}


@pytest.fixture
def factors():
    """Two symmetric matrices of full rank, (6, 6) and (4, 4)."""
    made = torch.Generator().manual_seed(0)
    wide, tall = (torch.randn(n, 2 * n, generator=made).double() for n in (6, 4))
    return wide @ wide.T, tall @ tall.T


def _quadratic(curvature, inputs_II, gradients_DD, change_DI):
    """tr(dW^T B dW A): what the quadratic form of the Fisher says a change costs."""
    return float((change_DI.T @ gradients_DD @ change_DI @ inputs_II).trace())


def test_gradient_statistics_are_the_definition(known):
    """B = mean over predicting tokens of g g^T, g from plain autograd, one row at a time."""
    view = known("llama").view
    taps = [Tap(view.roles.linear("mlp.out", layer).module, "output") for layer in (2, 0)]
    rows = [list(view.encode(f"{p} {a}.").ids) for p, a in tiny.FACTS.items()]
    found = moments.collect(view, taps, rows, gradients=True)
    for tap, moment in zip(taps, found, strict=True):
        kept = []

        def keep(module, args, output, kept=kept):
            output.retain_grad()
            kept.append(output)

        handle = view.model.get_submodule(tap.module).register_forward_hook(keep)
        for row in rows:
            ids = torch.tensor([row])
            view.model(ids, labels=ids).loss.mul(len(row) - 1).backward()
        handle.remove()
        view.model.zero_grad(set_to_none=True)
        g_ND = torch.cat([output.grad[0, :-1] for output in kept]).double()
        plain_DD = g_ND.T @ g_ND / len(g_ND)
        assert moment.count == len(g_ND)
        assert (moment.mean() - plain_DD).norm() <= 1e-4 * plain_DD.norm()


def test_gradient_statistics_add_up_and_go_on_after_a_kill(known, tmp_path, monkeypatch):
    """Two halves make the whole; a collection that was killed ends in the same bytes."""
    view = known("llama").view
    taps = [Tap(view.roles.linear("mlp.out", 1).module, "output")]
    rows = [list(view.encode(f"{p} {a}.").ids) for p, a in tiny.FACTS.items()]
    monkeypatch.setattr(moments, "BATCH_ROWS", 2)
    (whole,) = moments.collect(view, taps, rows, gradients=True)
    (one,), (two,) = (
        moments.collect(view, taps, half, gradients=True) for half in (rows[:3], rows[3:])
    )
    assert (one + two).count == whole.count
    assert ((one + two).sum_II - whole.sum_II).norm() <= 1e-5 * whole.sum_II.norm()
    monkeypatch.setattr(moments, "SAVE_SECONDS", 0.0)
    partial = tmp_path / "half"

    def stop(stage, done, count):
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moments.collect(view, taps, rows, gradients=True, partial=partial, progress=stop)
    (again,) = moments.collect(view, taps, rows, gradients=True, partial=partial)
    assert torch.equal(again.sum_II, whole.sum_II)


def test_the_projection_is_one(factors):
    """Idempotent; all directions free: nothing changes; none: nothing is left."""
    curvature = Curvature.of(*factors, 0.8)
    assert 0 < curvature.room < 1
    change_DI = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    once = curvature.project(change_DI)
    assert torch.allclose(curvature.project(once), once, atol=1e-12)
    masked = curvature.into(once)[~curvature.free_DI]
    assert masked.abs().max() < 1e-12
    for free, wanted in ((True, change_DI), (False, torch.zeros_like(change_DI))):
        every = torch.full((4, 6), free)
        same = Curvature(curvature.inputs_II, curvature.outputs_DD, every)
        assert torch.allclose(same.project(change_DI), wanted, atol=1e-10)


def test_the_sharpest_directions_are_masked(factors):
    """By hand: the fewest products that hold the share are not free, all others are."""
    bends = torch.tensor([[8.0, 4.0], [2.0, 1.0]])
    assert flat(bends, 0.5).tolist() == [[False, True], [True, True]]
    assert flat(bends, 0.6).tolist() == [[False, False], [True, True]]
    assert flat(bends, 0.99).tolist() == [[False, False], [False, False]]
    ties = torch.tensor([[3.0, 3.0], [1.0, 1.0]])
    assert flat(ties, 0.3).tolist() == [[False, False], [True, True]]
    assert flat(torch.zeros(2, 2), 0.9).all()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_change_has_no_part_in_what_is_masked(architecture):
    """<U_b^T dW U_a, 1 - mask> = 0 to 1e-6 with the change constrained; not with the gradient."""
    model = EditedModel.of(*tiny.trained(architecture))
    for constrain, inside in (("change", True), ("gradient", False)):
        method = choose("crispedit", {**OPTIONS, "constrain": constrain})
        ready = prepare(model, method, FACTS)
        patch = edit(model, FACTS, method=method)
        for delta, layer in zip(patch.deltas, (1, 2), strict=True):
            role = model.view.roles.linear("mlp.out", layer)
            assert delta.address == role.address
            curvature = ready.prepared.curvatures[layer]
            change_DI = role.oriented(delta.change.delta).double()
            outside = curvature.into(change_DI)[~curvature.free_DI].norm() / change_DI.norm()
            assert (outside < 1e-6) == inside


def test_text_is_disturbed_less_than_by_plain_training():
    """At an equal loss on the facts the Fisher's quadratic form is smaller than FT's."""
    model = EditedModel.of(*tiny.trained("llama"))
    both = {"learning_rate": 3e-3, "steps": 400, "enough": 0.02, "weight_decay": 0.0}
    method = choose("crispedit", {**OPTIONS, **both, "layers": [1], "energy": 0.95})
    plain = choose("ft", {**both, "layer": 1, "others": 0})
    factors = prepare(model, method, FACTS).prepared.factors[1]
    costs, losses = [], []
    for one in (method, plain):
        patch = edit(model, FACTS, method=one)
        with model.applied(patch):
            losses.append(tuned_loss(model, plain, FACTS)[0])
        change = patch.deltas[0].change.delta.double()
        costs.append(_quadratic(None, factors.inputs.mean(), factors.gradients.mean(), change))
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert costs[0] < 0.5 * costs[1]


def test_the_published_way_projects_the_gradient(factors, known):
    """What Adam is given has no part in what is masked."""
    role = known("llama").view.roles.linear("mlp.out", 0)
    curvature = Curvature.of(*factors, 0.8)
    weights = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    for kind in (Rotated, Projected):
        change = kind(role, curvature)
        (grad,) = torch.autograd.grad((change.delta().delta * weights).sum(), change.leaves[0])
        rotated = grad if kind is Rotated else curvature.into(grad)
        assert rotated[~curvature.free_DI].abs().max() < 1e-6
        assert rotated[curvature.free_DI].abs().max() > 1e-2


def test_earlier_edits_count_as_text():
    """The factors of the state are those of text and of the edits' rows; undoing takes them out."""
    model = EditedModel.of(*tiny.trained("llama"))
    method = choose("crispedit", OPTIONS)
    prepared = prepare(model, method, FACTS).prepared
    patches = []
    for fact in FACTS:
        patches.append(edit(model, fact, method=method))
        model.apply(patches[-1])
    state = prepare(model, method, FACTS).state
    rows = [[*model.encode(f.prompt).ids] for f in FACTS]
    counts = sum(int(patch.traces["count"]) for patch in patches)
    assert counts >= sum(map(len, rows))
    assert state.factors[1].inputs.count == prepared.factors[1].inputs.count + counts
    key_NI = patches[0].traces["inputs.1"].double()
    first = method.fold(prepared, None, patches[0])
    added = first.factors[1].inputs.sum_II - prepared.factors[1].inputs.sum_II
    assert torch.allclose(added, key_NI.T @ key_NI, atol=1e-9)
    model.drop(patches[1].id)
    after = prepare(model, method, FACTS).state
    both = method.fold(prepared, first, patches[2])
    assert torch.equal(after.factors[2].gradients.sum_II, both.factors[2].gradients.sum_II)
