"""CaliNET's slots and contrastive assessment: the card's self-checks and plain references."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from knowpatch.edited import EditedModel
from knowpatch.editing import choose, edit
from knowpatch.errors import EditError, PatchError
from knowpatch.models.activations import ACTIVATIONS, activation_of
from knowpatch.models.passes import Act
from knowpatch.parts.contrast import contrast, log_contrast
from knowpatch.parts.descent import Example, Passes
from knowpatch.parts.kinds.slots import Block, Slots
from knowpatch.patch import Patch, Wrap
from knowpatch.request import EditRequest

FACTS = [
    EditRequest(prompt=prompt, subject=subject, target=target)
    for (prompt, target), subject in zip(
        tiny.EDITS.items(), ("France", "Japan", "Nile"), strict=True
    )
]
OPTIONS = {"learning_rate": 1e-2, "steps": 80, "keep": 0.0}


def _edit(model, requests, **extra):
    return edit(model, requests, method="calinet", options={**OPTIONS, **extra})


def _logits(model, prompt):
    row = model.view.encode(prompt).ids
    return model.view.run([row], logits_at=[(0, i) for i in range(len(row))]).logits_MV


def test_the_cards_numbers():
    """P = .20 against a mean of .10 is known; .03 is a false fact."""
    others = [math.log(p) for p in (0.05, 0.10, 0.15)]
    assert log_contrast(math.log(0.20), others) == pytest.approx(math.log(2.0))
    assert log_contrast(math.log(0.03), others) == pytest.approx(math.log(0.3))
    assert log_contrast(-2000.0, [-1000.0, -1001.0]) < -999  # no underflow


def test_what_a_model_knows_is_held_and_the_rest_is_not(known):
    """With the subject in other sentences, and with other objects where no subject is given."""
    view = known("llama").view
    right = EditRequest(prompt="The capital of France is", subject="France", target="Paris")
    bare = [request.model_copy(update={"subject": None}) for request in (right, FACTS[0])]
    known_, false, known_bare, false_bare = contrast(view, [right, FACTS[0], *bare])
    assert false < 0 < known_ or false < known_ - 1
    assert known_bare > 0
    assert false_bare < known_bare


def test_slots_that_add_nothing_are_the_base(known):
    """At the start the logits equal the base's bit for bit, in a trained pass and as a wrap."""
    model = known("llama")
    view, module = model.view, model.view.roles.whole_mlp(2)
    draw = torch.Generator().manual_seed(0)
    ups, gates = torch.randn(2, 5, 48, generator=draw)
    block = Block("silu", ups, torch.zeros(5, 48), gates)
    prompt = FACTS[0].prompt
    base = _logits(model, prompt)
    patch = Patch(_edit(model, FACTS[0], steps=1).provenance, wraps=(block.wrap(module),))
    with model.applied(patch):
        assert torch.equal(_logits(model, prompt), base)
    row = view.encode(prompt).ids
    act = Act(module, lambda into, out, rows: out + block.added(into))
    passes = Passes(view, [Example(row, (5,))], lowest=2, acts=[act])
    assert torch.allclose(passes.logits([0])[0], base[-1], atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_slots_are_added_as_written(known, architecture):
    """A plain hook with the equation gives the same, gated or not, with the model's activation."""
    model = known(architecture)
    patch = _edit(model, FACTS, layer=2)
    (wrap,) = patch.wraps
    assert ("gates" in wrap.tensors) == (architecture != "gpt2")
    act = {"llama": "silu", "gpt2": "gelu-tanh", "gemma2": "gelu-tanh"}[architecture]
    assert wrap.data["act"] == act == activation_of(model.model)

    def add(module, args, output):
        inner = args[0] @ wrap.tensors["ups"].T
        if "gates" in wrap.tensors:
            inner = ACTIVATIONS[act](args[0] @ wrap.tensors["gates"].T) * inner
        else:
            inner = ACTIVATIONS[act](inner)
        return output + inner @ wrap.tensors["downs"]

    handle = model.model.get_submodule(wrap.module).register_forward_hook(add)
    plain = _logits(model, FACTS[0].prompt)
    handle.remove()
    with model.session([patch]):
        assert torch.allclose(_logits(model, FACTS[0].prompt), plain, atol=1e-4)


def test_rephrases_are_learned_with_the_prompt(known):
    """By default, each as an example of its own."""
    model = known("llama")
    other = "The colour of the sky is"
    fact = EditRequest(prompt=FACTS[0].prompt, target="Rome", rephrases=(other,))
    with model.applied(_edit(model, fact)):
        assert model.ask(other, max_new_tokens=3).startswith("Rome")
    counts = [
        len(choose("calinet", {"rephrases": wanted}).examples(model.view, fact))
        for wanted in (True, False)
    ]
    assert counts == [2, 1]


def test_blocks_of_several_patches_add_up(known):
    """One set of slots for both, each patch's own; dropping one leaves the other's bits."""
    model = known("llama")
    first = _edit(model, FACTS[0])
    model.apply(first)
    second = _edit(model, FACTS[1])
    kind = Slots.join([*first.wraps, *second.wraps])
    assert kind.owners_N == (0,) * 64 + (1,) * 64
    inputs = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0))
    apart = sum(Block.of([wrap]).added(inputs) for wrap in (*first.wraps, *second.wraps))
    (block,) = kind.blocks
    assert torch.allclose(block.added(inputs), apart, atol=1e-4)
    model.apply(second)
    assert model.ask(FACTS[1].prompt, max_new_tokens=3).startswith(FACTS[1].target)
    with_second = EditedModel.of(*tiny.trained("llama"))
    with_second.apply(second)
    model.drop(first.id)
    assert torch.equal(_logits(model, "The"), _logits(with_second, "The"))


def test_slots_of_different_makes_join(known):
    """Plain and gated slots on one module are summed too."""
    draw = torch.Generator().manual_seed(0)
    ups, gates, downs = torch.randn(3, 4, 48, generator=draw)
    module = known("llama").view.roles.whole_mlp(1)
    blocks = [Block("silu", ups, downs, gates), Block("relu", ups, downs)]
    kind = Slots.join([block.wrap(module) for block in blocks])
    assert len(kind.blocks) == 2
    assert kind.owners_N == (0, 0, 0, 0, 1, 1, 1, 1)


def test_only_what_is_false_is_learned(known):
    """What the model holds is left out; if that is all, it is said in one line."""
    model = known("llama")
    held = EditRequest(prompt="The capital of France is", subject="France", target="Paris")
    with pytest.raises(EditError, match="holds all 1 facts already"):
        _edit(model, held, only_false=True)
    words = [*tiny.FACTS.values(), *tiny.EDITS.values(), "green", "Madrid", "London"]
    facts = [fact.model_copy(update={"target": word}) for fact in FACTS for word in words]
    by_contrast = dict(zip(contrast(model.view, facts), facts, strict=True))
    assert min(by_contrast) < 0
    false = by_contrast[min(by_contrast)]
    patch = _edit(model, [held, false], only_false=True)
    assert torch.equal(
        patch.wraps[0].tensors["downs"], _edit(model, false).wraps[0].tensors["downs"]
    )


def test_ordinary_text_is_held(known):
    """With `keep` other prompts drift less."""
    model = known("llama")
    base = _logits(model, "Imagine a short description").log_softmax(-1)
    drifts = []
    for keep in (0.0, 5.0):
        with model.applied(_edit(model, FACTS, keep=keep, pieces=8, text="self", layer=1)):
            now = _logits(model, "Imagine a short description").log_softmax(-1)
        drifts.append(float((base.exp() * (base - now)).sum(-1).mean()))
    assert drifts[1] < drifts[0]


@pytest.mark.parametrize("fault", ["act", "rows", "gates"])
def test_damaged_slots_are_refused(known, fault):
    model = known("llama")
    module = model.view.roles.whole_mlp(1)
    good = Block("silu", torch.ones(2, 48), torch.ones(2, 48), torch.ones(2, 48)).wrap(module)
    tensors, data = dict(good.tensors), dict(good.data)
    if fault == "act":
        data["act"] = "sin"
    if fault == "rows":
        tensors["downs"] = torch.ones(3, 48)
    if fault == "gates":
        tensors["gates"] = torch.ones(2, 40)
    patch = Patch(
        _edit(model, FACTS[0], steps=1).provenance,
        wraps=(Wrap(module, good.kind, data, tensors),),
    )
    with pytest.raises(PatchError, match="damaged"):
        model.apply(patch)
