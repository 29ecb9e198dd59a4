"""T-Patcher's neurons: the card's self-checks, plain references, undo, sequences."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from knowpatch.edited import EditedModel
from knowpatch.editing import choose as chosen
from knowpatch.editing import edit, edit_each, load, prepare, unable
from knowpatch.errors import ModelError, PatchError
from knowpatch.models.passes import Tap
from knowpatch.parts.kinds.neurons import Neurons, neurons
from knowpatch.parts.patching import Cluster, Scale, activation_loss, first_key, memory_losses
from knowpatch.parts.states import ordinary_states
from knowpatch.parts.text import find_text
from knowpatch.parts.wraps import kind_of
from knowpatch.patch import Patch, Wrap
from knowpatch.request import EditRequest

FACTS = [
    EditRequest(prompt=prompt, subject=subject, target=target)
    for (prompt, target), subject in zip(
        tiny.EDITS.items(), ("France", "Japan", "Nile"), strict=True
    )
]
OPTIONS = {"memory": 400, "text": "self"}


def _edit(model, requests, **extra):
    return edit(model, requests, method="t_patcher", options={**OPTIONS, **extra})


def _logits(model, prompt):
    row = model.view.encode(prompt).ids
    return model.view.run([row], logits_at=[(0, i) for i in range(len(row))]).logits_MV


def test_the_cards_numbers():
    """q = (3, 4) begins with the key (.12, .16); a memory at a right angle costs e^3 and e^2."""
    query = torch.tensor([3.0, 4.0])
    key = first_key(query)
    assert key.tolist() == pytest.approx([0.12, 0.16])
    assert float(key @ query) == pytest.approx(1.0)
    memory = torch.tensor([[4.0, -3.0]])
    silence, apart = memory_losses((key @ query)[None], (memory @ key)[None], 1000)
    assert float(silence) == pytest.approx(20.09, abs=0.01)
    assert float(apart) == pytest.approx(math.exp(2), abs=1e-3)
    assert float(activation_loss(torch.tensor([0.0]))) == pytest.approx(1.0)


def test_losses_do_not_overflow():
    silence, apart = memory_losses(torch.tensor([0.0]), torch.tensor([[1e4, 0.0]]), 2)
    assert torch.cat([silence, apart]).isfinite().all()


def test_only_the_loudest_states_count():
    """Of a small memory all count; of a large one the loudest."""
    others = torch.tensor([[0.0, -3.0, -100.0]])
    few, _ = memory_losses(torch.tensor([0.0]), others, 1)
    more, _ = memory_losses(torch.tensor([0.0]), others, 1000)
    assert float(few) == pytest.approx(math.exp(3), rel=1e-5)
    assert float(more) == pytest.approx((math.exp(3) + 1) / 3, rel=1e-5)


def test_what_is_trained_on_relative_states_acts_on_states_as_they_are():
    draw = torch.Generator().manual_seed(0)
    states = 3 * torch.randn(50, 6, generator=draw) + 1
    scale = Scale.of(states)
    cluster = Cluster(scale.relative(states[:2]), 4, 1.0, 0.1)
    cluster.step([torch.randn(leaf.shape, generator=draw) for leaf in cluster.leaves], 5.0)
    keys, biases, _ = cluster.settled(scale)
    plain = states @ keys.T + biases
    assert torch.allclose(plain.T, cluster.excited(scale.relative(states)), atol=1e-4)


def test_neurons_are_added_as_written(known):
    """The MLP's output is what a plain hook with the equation gives, on every row and token."""
    model = known("gpt2")
    patch = _edit(model, FACTS)
    (wrap,) = patch.wraps
    keys, biases, values = (wrap.tensors[name] for name in ("keys", "biases", "values"))
    assert wrap.module == model.view.roles.whole_mlp(3)

    def add(module, args, output):
        return output + (args[0] @ keys.T + biases).relu() @ values

    handle = model.model.get_submodule(wrap.module).register_forward_hook(add)
    plain = _logits(model, FACTS[0].prompt)
    handle.remove()
    with model.session([patch]):
        assert torch.allclose(_logits(model, FACTS[0].prompt), plain, atol=1e-4)


def test_the_memory_stays_silent(known, tmp_path):
    """After training no state of the memory excites a neuron, and its own state does."""
    model = known("llama")
    (tmp_path / "a.txt").write_text(tiny.OTHER_WORDS * 20)
    text = str(tmp_path / "a.txt")
    patch = _edit(model, FACTS[0], text=text)
    (wrap,) = patch.wraps
    view = model.view
    states = ordinary_states(view, 3, 400, find_text(text), seed=0)
    kind = Neurons.join([wrap])
    row, tap = view.encode(FACTS[0].prompt).ids, Tap(wrap.module, "input")
    own = view.run([row], taps=[tap]).at(tap, [(0, len(row) - 1)])
    others = states[(states - own).norm(dim=1) > 0.2 * own.norm()]
    assert len(others) > 390
    assert float(kind.excited(others).max()) <= 1e-4
    assert float(kind.excited(own).max()) > 0.4
    assert wrap.data["against"] == 400


def test_undo_is_dropping_rows(known):
    """Two patches are one set of neurons; without the first it is the second alone, bit for bit."""
    model = known("llama")
    before = _logits(model, "Two plus two equals")
    first, second = (_edit(model, fact) for fact in FACTS[:2])
    kind = Neurons.join([*first.wraps, *second.wraps])
    assert kind.owners_N == (0,) * len(first.wraps[0].tensors["biases"]) + (1,) * len(
        second.wraps[0].tensors["biases"]
    )
    with model.applied(second):
        alone = _logits(model, FACTS[1].prompt)
    model.apply(first)
    model.apply(second)
    model.drop(first.id)
    assert torch.equal(_logits(model, FACTS[1].prompt), alone)
    model.drop(second.id)
    assert torch.equal(_logits(model, "Two plus two equals"), before)


def test_later_edits_are_silent_at_earlier_ones(known):
    """What earlier neurons are for is memory of the later ones, and follows an undo."""
    model = known("llama")
    first = _edit(model, FACTS[0])
    model.apply(first)
    method = chosen("t_patcher", OPTIONS)
    state = prepare(model, method).state
    assert torch.equal(state, first.traces["queries"])
    second = edit(model, FACTS[1], method=method)
    scale = prepare(model, method).prepared.scale
    states = first.traces["queries"] * scale.spread_I + scale.mean_I
    assert float(Neurons.join(second.wraps).excited(states).max()) <= 1e-3
    model.apply(second)
    for fact in FACTS[:2]:
        assert model.ask(fact.prompt, max_new_tokens=4).startswith(fact.target)
    model.drop(first.id)
    assert torch.equal(prepare(model, method).state, second.traces["queries"])


def test_only_wrong_tokens_get_neurons(known):
    """An answer that is right already gets one guard, or none; the cap holds."""
    model = known("llama")
    right = EditRequest(prompt="The capital of Italy is", target="Rome")
    assert len(_edit(model, right).wraps[0].tensors["biases"]) == 1
    assert not _edit(model, right, guard=False).wraps
    long = EditRequest(prompt="Two plus two equals", target="Madrid Sudan Lyon green Berlin")
    assert len(_edit(model, long, neurons=2).wraps[0].tensors["biases"]) == 2
    two = EditRequest(prompt=long.prompt, target="Madrid Sudan")
    with model.applied(_edit(model, two, neurons=20)):
        assert model.ask(two.prompt, max_new_tokens=20).startswith(two.target)


def test_edits_made_together_do_not_see_each_other(known):
    """A patch of `edit_each` is that of the request alone, neuron by neuron."""
    model = known("llama")
    method = chosen("t_patcher", OPTIONS)
    together = edit_each(model, FACTS, method=method)
    for fact, patch in zip(FACTS, together, strict=True):
        alone = edit(model, fact, method=method)
        for name, tensor in alone.wraps[0].tensors.items():
            assert torch.allclose(patch.wraps[0].tensors[name], tensor, atol=2e-2), name


def test_a_model_without_an_mlp_of_its_own_is_refused(tmp_path):
    """OPT keeps its maps in the block: said in one line before any work, and when it is loaded."""
    model = EditedModel.of(*tiny.fresh("opt"))
    for name in ("t_patcher", "calinet"):
        with pytest.raises(ModelError, match=f"{name} cannot edit OPT.*not one module"):
            edit(model, FACTS[0], method=name)
    assert {"t_patcher", "calinet"} <= set(unable(model.view))
    assert not unable(EditedModel.of(*tiny.fresh("llama")).view)
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    load(str(tmp_path))


@pytest.mark.parametrize("fault", ["axes", "rows", "data", "size"])
def test_damaged_neurons_are_refused(known, fault):
    model = known("llama")
    module, size = model.view.roles.whole_mlp(3), 47 if fault == "size" else 48
    wrap = neurons(module, torch.ones(2, size), torch.ones(2), torch.ones(2, 48), 9)
    tensors, data = dict(wrap.tensors), dict(wrap.data)
    if fault == "axes":
        tensors["keys"] = torch.ones(2)
    if fault == "rows":
        tensors["biases"] = torch.ones(3)
    if fault == "data":
        data["against"] = "all"
    broken = Wrap(module, wrap.kind, data, tensors)
    good = _edit(model, FACTS[0])
    assert kind_of(wrap) is Neurons
    with pytest.raises(PatchError):
        model.apply(Patch(good.provenance, wraps=(broken,)))
