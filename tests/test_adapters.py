"""The adapters' self-checks: factors, schedule, pruning, what a patch holds; PEFT: test_peft.py."""

from __future__ import annotations

import pytest
import tiny
import torch

from knowpatch.deltas import Address, LowRank, WeightDelta
from knowpatch.editing import choose, edit
from knowpatch.errors import ModelError, OptionError
from knowpatch.methods.merged.adalora import Allocator, Schedule, Triplets
from knowpatch.models.roles import LinearRole
from knowpatch.parts.adapters import Adapter
from knowpatch.parts.tuned import settled
from knowpatch.request import EditRequest

FACTS = [EditRequest(prompt=prompt, target=target) for prompt, target in tiny.EDITS.items()]
FAST = {"learning_rate": 2e-2, "layers": [1, 2]}


def _role(*, stored_in_out=False):
    return LinearRole("map", Address(parameter="map.weight"), stored_in_out)


def _drawn(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("stored_in_out", [False, True])
def test_self_check_lora_by_hand(stored_in_out):
    """A = [[1, 0]], B = [[0], [2]], scale .5: [[0, 0], [1, 0]], which adds (0, 3) for (3, 5)."""
    adapter = Adapter(_role(stored_in_out=stored_in_out), torch.zeros(2, 2), 1, 0.5, _drawn())
    with torch.no_grad():
        adapter.down_KI.copy_(torch.tensor([[1.0, 0.0]]))
        adapter.up_DK.copy_(torch.tensor([[0.0], [2.0]]))
    change = settled(adapter.delta())
    dense = change.left @ change.right
    wanted = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert torch.equal(dense.T if stored_in_out else dense, wanted)
    added = change.through(torch.tensor([[3.0, 5.0]]), stored_in_out)
    assert added.tolist() == [[0.0, 3.0]]


@pytest.mark.parametrize("kind", [Adapter, Triplets])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_self_check_an_untrained_adapter_is_the_base_bit_for_bit(known, kind, architecture):
    """B = 0, or E = 0, adds nothing; and a patch holds nothing of it."""
    view = known(architecture).view
    role = view.roles.linear("attn.v", 1)
    like = role.address.narrow(view.values(role.address.parameter))
    change = kind(role, like, 4, 8.0, _drawn()).delta()
    row = view.encode(FACTS[0].prompt).ids
    base = view.run([row], logits_at=[(0, 2)]).logits_MV
    with view.trying([WeightDelta(role.address, change)]):
        tried = view.run([row], logits_at=[(0, 2)]).logits_MV
    assert torch.equal(base, tried.detach())
    assert settled(change).rank == 0


@pytest.mark.parametrize("stored_in_out", [False, True])
def test_self_check_folding_triplets_is_lossless(stored_in_out):
    """B diag(E) A alpha / K as a plain adapter, zero triplets left out: the same to 1e-6."""
    each = Triplets(_role(stored_in_out=stored_in_out), torch.zeros(5, 5), 4, 8.0, _drawn())
    with torch.no_grad():
        each.value_K.copy_(torch.tensor([1.5, 0.0, -2.0, 0.3]))
        each.up_DK.normal_(generator=_drawn(1))
    whole = (each.up_DK @ torch.diag(each.value_K) @ each.down_KI) * 8.0 / (4 + 1e-5)
    change = settled(each.delta())
    assert change.rank == 3
    dense = change.left @ change.right
    assert torch.allclose(dense.T if stored_in_out else dense, whole.detach(), atol=1e-6)


def test_self_check_the_budget():
    """16 to 8 triplets in 4 steps: 11, 9, 8."""
    schedule = Schedule(begin=16, end=8, steps=4, initial=0, final=0, interval=1)
    assert [schedule.budget(step) for step in (0, 1, 2, 3, 4)] == [16, 11, 9, 8, 8]
    later = Schedule(begin=16, end=8, steps=20, initial=5, final=6, interval=4)
    assert later.budget(5) == 16
    assert [step for step in range(1, 21) if later.due(step)] == [8, 12, 14]


def _allocator(scores, end, **extra):
    """Two maps of two triplets each, with these gradients of E."""
    triplets = [Triplets(_role(), torch.zeros(4, 4), 2, 1.0, _drawn(seed)) for seed in (0, 1)]
    schedule = Schedule(begin=4, end=end, steps=2, initial=0, final=0, interval=1)
    made = Allocator(triplets, schedule, (0.85, 0.85))
    for each, some in zip(triplets, (scores[:2], scores[2:]), strict=True):
        for leaf in each.leaves:
            leaf.grad = torch.zeros_like(leaf)
        with torch.no_grad():
            each.value_K.fill_(1.0)
        each.value_K.grad = torch.tensor(some)
    return made, triplets


def test_scores_are_smoothed_importance_times_its_spread():
    """One step: .15 I and .15 |I - .15 I|; of all maps together the lowest lose their E."""
    allocator, triplets = _allocator([4.0, 1.0, 3.0, 2.0], end=2)
    allocator.after(1)
    found = torch.tensor([4.0, 1.0, 3.0, 2.0])
    assert torch.allclose(allocator.scores(), 0.15 * found * 0.15 * 0.85 * found)
    allocator.after(2)
    assert allocator.kept_N.tolist() == [True, False, True, False]
    assert [each.value_K.tolist() for each in triplets] == [[1.0, 0.0], [1.0, 0.0]]


def test_no_more_is_pruned_than_the_budget_says():
    """Equal scores: two of four go, not all; a budget for all prunes none."""
    allocator, _ = _allocator([1.0, 1.0, 1.0, 1.0], end=2)
    allocator.after(2)
    assert int(allocator.kept_N.sum()) == 2
    allocator, _ = _allocator([1.0, 1.0, 1.0, 1.0], end=4)
    allocator.after(2)
    assert bool(allocator.kept_N.all())


def test_scores_stay_from_the_last_allocation_on():
    """Later gradients change neither scores nor ranks."""
    allocator, triplets = _allocator([4.0, 1.0, 3.0, 2.0], end=2)
    allocator.after(1)
    before = allocator.scores()
    for step in (2, 3):
        triplets[0].value_K.grad = torch.tensor([0.0, 99.0])
        allocator.after(step)
        assert torch.equal(allocator.scores(), before)
        assert allocator.kept_N.tolist() == [True, False, True, False]


def test_ranks_are_shared_out_among_the_maps(known):
    """All steps up to the last allocation are made, and the target's triplets are in the patch."""
    model = known("llama")
    options = {**FAST, "modules": "attn.q,attn.v,mlp.out", "enough": 1e3}
    patch = edit(model, FACTS, method="adalora", options=options)
    ranks = [delta.change.rank for delta in patch.deltas]
    assert sum(ranks) == 4 * 6
    assert len(set(ranks)) > 1


def test_easyedits_settings_keep_all_ranks(known):
    """compat: twelve triplets stay in every map."""
    model = known("llama")
    options = {"preset": "gpt2-xl", "layers": [1, 2], "steps": 4}
    patch = edit(model, FACTS[0], method="adalora", options=options)
    assert [delta.change.rank for delta in patch.deltas] == [12] * 4
    assert patch.provenance.config["modules"] == ["attn.q", "attn.v"]


@pytest.mark.parametrize("name", ["lora", "adalora"])
def test_slices_of_a_fused_map_are_trained_alone(known, name):
    """GPT-2 holds queries, keys and values in one matrix: the keys' columns keep their bits."""
    model = known("gpt2")
    options = {**FAST, "modules": ["attn.q", "attn.v", "mlp.out"], "steps": 60}
    patch = edit(model, FACTS[0], method=name, options=options)
    assert all(isinstance(delta.change, LowRank) for delta in patch.deltas)
    keys = model.view.roles.linear("attn.k", 1).address
    stored = model.model.get_parameter(keys.parameter)
    before = stored.detach().clone()
    with model.applied(patch):
        assert torch.equal(keys.narrow(stored), keys.narrow(before))
        assert not torch.equal(stored, before)
        assert model.ask(FACTS[0].prompt, max_new_tokens=4).startswith(FACTS[0].target)
    with model.session([patch]):
        assert model.ask(FACTS[0].prompt, max_new_tokens=4).startswith(FACTS[0].target)


def test_each_map_draws_its_own_first_values(known):
    """By seed and map, so that no order of maps matters."""
    view = known("llama").view
    drawn = {}
    for seed in (0, 1):
        method = choose("lora", {"layers": [1, 2]}, seed=seed)
        for layer in (1, 2):
            role = view.roles.linear("mlp.out", layer)
            drawn[seed, layer] = method.change(view, role, None, None).down_KI
    again = choose("lora", {"layers": [2]}).change(
        view, view.roles.linear("mlp.out", 2), None, None
    )
    assert torch.equal(drawn[0, 2], again.down_KI)
    assert not torch.equal(drawn[0, 1], drawn[0, 2])
    assert not torch.equal(drawn[0, 1], drawn[1, 1])


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("lora", {"modules": "attn.q,attn.q"}, "each once"),
        ("lora", {"modules": []}, "one map at least"),
        ("adalora", {"initial_rank": 2}, "target_rank is above initial_rank"),
        ("adalora", {"steps": 12}, "more than initial and final together"),
    ],
)
def test_what_cannot_be_is_one_line(name, options, said):
    """Maps named twice, no map, and a schedule without room."""
    with pytest.raises(OptionError, match=said):
        choose(name, options)


def test_a_model_that_mixes_its_heads_is_refused(known):
    """Queries of GPT-NeoX are no slice; its MLP can be trained."""
    model = known("gpt_neox")
    with pytest.raises(ModelError, match=r"lora cannot edit GPTNeoX.*behind the other"):
        edit(model, FACTS[0], method="lora", options={"modules": "attn.q"})
    edit(model, FACTS[0], method="lora", options={"layers": [1], "steps": 1})
