"""Restorations in growing batches, against a full pass for each; and what they leave."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch
from made import state
from plain import trace as plain

from knowpatch.deltas import Address, LowRank, WeightDelta
from knowpatch.edited import EditedModel
from knowpatch.models import growing
from knowpatch.models.growing import Growing
from knowpatch.models.restorations import Corrupted, Put, logprobs_of
from knowpatch.models.restoring import Whole, restoring

PROMPT = "The capital of France is"
DRAWS = 3


@pytest.fixture(scope="module")
def view_of():
    """The view of a trained model of an architecture, made once; for tests that only read it."""
    kept = {}

    def get(architecture):
        if architecture not in kept:
            kept[architecture] = EditedModel.of(*tiny.trained(architecture)).view
        return kept[architecture]

    return get


def parts(view):
    """Paths of the blocks, the MLPs' outputs and the attentions' outputs."""
    layers = range(len(view.roles.blocks))
    return (
        [block.module for block in view.roles.blocks],
        [view.roles.linear("mlp.out", layer).module for layer in layers],
        [view.roles.linear("attn.out", layer).module for layer in layers],
    )


def corrupted(view, first=2, tokens=2, draws=DRAWS, seed=0):
    ids = view.encode(PROMPT).ids
    made = torch.Generator().manual_seed(seed)
    scale = float(view.embedding.detach().std())
    noise = torch.randn(draws, tokens, view.roles.hidden_size, generator=made)
    return Corrupted(ids, first, 3 * scale * noise)


def setup_of(view, prompt):
    return plain.Setup(view.model, view.roles.embedding, prompt.ids, prompt.first, prompt.noise_SKD)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_restoration_equals_a_full_pass(view_of, architecture):
    """States, windows and severed states, at every token and layer, to 1e-4."""
    view = view_of(architecture)
    blocks, mlps, attentions = parts(view)
    prompt = corrupted(view)
    way = restoring(view, prompt, [*mlps, *attentions])
    assert isinstance(way, Growing)
    token = int(way.logits_BV[0].argmax())
    setup = setup_of(view, prompt)
    base = setup.run({})
    assert torch.allclose(way.logits_BV.softmax(-1), base, atol=1e-5)
    places = [(t, layer) for t in range(len(prompt.ids)) for layer in range(len(blocks))]

    def scores(restorations):
        return way.logprobs(restorations, token).exp().view(len(prompt.ids), len(blocks), -1)

    for width, modules in ((1, blocks), (2, mlps), (3, attentions)):
        ours = scores(
            [
                tuple(Put(modules[i], t) for i in plain.window(layer, width, len(blocks)))
                for t, layer in places
            ]
        )
        theirs = plain.trace(setup, modules, width, token)
        assert torch.allclose(ours, theirs, atol=1e-4)
        assert float((theirs - base[1:, token]).abs().max()) > 1e-3  # there is something to see
    for modules in (mlps, attentions):
        ours = scores(
            [
                (Put(blocks[i], t), *(Put(path, t, "corrupted") for path in modules[i + 1 :]))
                for t, i in places
            ]
        )
        theirs = plain.severed(setup, blocks, modules, 3, token)
        assert torch.allclose(ours[3], theirs, atol=1e-4)


def some(view):
    """Restorations of every kind, some of several outputs at several positions."""
    blocks, mlps, attentions = parts(view)
    last = len(view.encode(PROMPT).ids) - 1
    return [
        (Put(blocks[2], last), Put(blocks[1], 2), Put(mlps[1], 3)),
        (Put(blocks[3], 2),),
        (Put(blocks[0], 3), Put(blocks[2], 3)),
        (Put(attentions[0], 2), Put(attentions[3], 4)),
        (Put(mlps[3], last),),
        (Put(blocks[3], last),),
        (Put(mlps[3], 2),),
        (Put(blocks[1], 0),),
        (Put(mlps[2], 2), Put(blocks[2], 2, "corrupted")),
    ]


@pytest.mark.parametrize("together", [1, 20, 4096])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3", "gpt2", "gptj"])
def test_both_ways_agree_on_anything(view_of, architecture, together, monkeypatch):
    """Several outputs at several positions, however many run together, in any order."""
    monkeypatch.setattr(growing, "TOGETHER", together)
    view = view_of(architecture)
    _, mlps, attentions = parts(view)
    prompt = corrupted(view)
    whole = Whole(view, prompt, [*mlps, *attentions])
    part = restoring(view, prompt, [*mlps, *attentions])
    assert isinstance(part, Growing)
    assert torch.allclose(whole.logits_BV, part.logits_BV, atol=1e-4)
    mine = some(view)
    expected = whole.logprobs(mine, 5)
    assert torch.allclose(part.logprobs(mine, 5), expected, atol=1e-4)
    assert torch.allclose(part.logprobs(mine[::-1], 5), expected.flip(0), atol=1e-4)


def test_restoring_everything_gives_the_clean_run_back(view_of):
    """All states of the subject at a block, and the last block's state at the last token."""
    view = view_of("llama")
    blocks, _, _ = parts(view)
    prompt = corrupted(view)
    way = restoring(view, prompt, [])
    clean = way.logits_BV[0].log_softmax(-1)
    last = len(prompt.ids) - 1
    token = int(clean.argmax())
    whole = (Put(blocks[0], 2), Put(blocks[0], 3), Put(blocks[0], 4))
    found = way.logprobs([whole, (Put(blocks[-1], last),)], token)
    assert torch.allclose(found, clean[token].expand_as(found), atol=1e-4)


def test_what_cannot_be_felt_is_left_as_it_is(view_of):
    """Before the noise, and above the last attention, nothing changes: exactly."""
    view = view_of("llama")
    blocks, mlps, _ = parts(view)
    prompt = corrupted(view)
    way = restoring(view, prompt, mlps)
    low = logprobs_of(way.logits_BV[1:], 7)
    found = way.logprobs([(Put(blocks[-1], 2),), (Put(mlps[-1], 3),)], 7)
    assert torch.equal(found, low.expand(2, -1))


def test_severing_both_leaves_the_restored_state(view_of):
    """At the last token with MLP and attention cut above: the head's reading of that state."""
    view = view_of("llama")
    blocks, mlps, attentions = parts(view)
    prompt = corrupted(view)
    last = len(prompt.ids) - 1
    way = restoring(view, prompt, [*mlps, *attentions])
    cut = [Put(path, last, "corrupted") for pair in (mlps, attentions) for path in pair[2:]]
    found = way.logprobs([(Put(blocks[1], last), *cut)], 9)
    setup = setup_of(view, prompt)
    kept = {}

    def keep(name):
        def change(output):
            kept.setdefault(name, output.clone())
            return output

        return change

    setup.run({path: keep(path) for path in (blocks[1], *mlps, *attentions)})
    added = sum(kept[path][1:, last] for pair in (mlps, attentions) for path in pair[2:])
    state_SD = kept[blocks[1]][:1, last] + added
    model = view.model
    expected = model.lm_head(model.model.norm(state_SD)).log_softmax(-1)[:, 9]
    assert torch.allclose(found[0], expected, atol=1e-4)


def test_trials_count(view_of):
    """What is tried within a block is in force in every restoration."""
    view = view_of("llama")
    blocks, mlps, _ = parts(view)
    name = view.roles.linear("mlp.out", 1).address.parameter
    out, into = view.parameter(name).shape
    made = torch.Generator().manual_seed(1)
    left, right = torch.randn(out, 1, generator=made), torch.randn(1, into, generator=made)
    delta = WeightDelta(Address(parameter=name), LowRank(0.3 * left, right), "")
    mine = [(Put(blocks[0], 3),), (Put(mlps[0], 2),)]
    prompt = corrupted(view)
    before = restoring(view, prompt, mlps).logprobs(mine, 5)
    with view.trying([delta]):
        part = restoring(view, prompt, mlps).logprobs(mine, 5)
        whole = Whole(view, prompt, mlps).logprobs(mine, 5)
    assert torch.allclose(part, whole, atol=1e-4)
    assert float((part - before).abs().max()) > 1e-2


def test_the_model_is_left_as_it_was(known):
    """Weights, gradients, modes, hooks, the generator: all as found."""
    model = known("llama")
    before = state(model)
    view = model.view
    _, mlps, _ = parts(view)
    restoring(view, corrupted(view), mlps).logprobs(some(view)[:3], 5)
    assert state(model) == before


def test_where_growing_does_not_hold_passes_are_whole(known, monkeypatch, caplog):
    """One log line, and the right numbers."""
    model = known("llama")
    view = model.view
    _, mlps, attentions = parts(view)
    modules = [*mlps, *attentions]
    monkeypatch.setattr(
        Growing,
        "logprobs",
        lambda self, restorations, token, **how: torch.zeros(99, 2)[: len(restorations)],
    )
    with caplog.at_level(logging.WARNING):
        way = restoring(view, corrupted(view), modules)
        again = restoring(view, corrupted(view), modules)
    assert isinstance(way, Whole)
    assert isinstance(again, Whole)
    assert len(caplog.records) == 1
    assert "runs whole for each restoration" in caplog.text


def test_near_a_sliding_window_passes_are_whole(view_of, monkeypatch):
    """What attention cannot see any more is not read on from."""
    view = view_of("gemma2")
    _, mlps, _ = parts(view)
    monkeypatch.setattr(view.model.config, "sliding_window", 9)
    assert isinstance(restoring(view, corrupted(view), mlps), Whole)
