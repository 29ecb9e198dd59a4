"""Tracing on the bundled model: the plain program's numbers, in bfloat16 the same map."""

from __future__ import annotations

import random

import pytest
import torch
from plain import trace as plain

from knowpatch.editing import load
from knowpatch.locate.attribution import attribute
from knowpatch.locate.averages import correlation
from knowpatch.locate.facts import Fact
from knowpatch.locate.noise import Noise
from knowpatch.locate.tracing import Tracing, corrupt
from knowpatch.models.restorations import STATE, outputs_of

FACT = Fact("Trento is located in the country of", "Trento", "Italy")
SOME = 8
"""States that the plain program restores."""


@pytest.fixture(scope="module")
def noise(model):
    return Noise.of(model.view, draws=2)


@pytest.fixture(scope="module")
def trace(model, noise):
    return Tracing(model.view, FACT, noise).trace()


def test_states_equal_the_plain_program(model, noise, trace):
    """Some of them, in every draw, to 1e-4; and the noise takes the answer away."""
    view = model.view
    prompt = corrupt(view, FACT, noise).prompt
    setup = plain.Setup(
        view.model, view.roles.embedding, prompt.ids, prompt.first, prompt.noise_SKD
    )
    base_BV = setup.run({})
    answer = int(base_BV[0].argmax())
    assert trace.answer.strip() == "Italy"
    assert trace.enough
    assert torch.allclose(trace.low_S, base_BV[1:, answer], atol=1e-5)
    blocks = outputs_of(view.roles, STATE)
    drawn = random.Random(0)
    for _ in range(SOME):
        position, layer = drawn.randrange(len(prompt.ids)), drawn.randrange(len(blocks))
        scores_S = setup.scores({blocks[layer]: plain.restoring(position)}, answer)
        effects_S = scores_S - base_BV[1:, answer]
        assert torch.allclose(trace.effects_TLS[position, layer], effects_S, atol=1e-4)


def test_bfloat16_gives_the_same_map(noise, trace):
    """Ranks of the cells agree."""
    view = load(dtype="bfloat16").view
    coarse = Tracing(view, FACT, noise).trace()
    assert coarse.answer == trace.answer
    assert correlation(coarse.facts(), trace.facts()) > 0.95


def test_attribution_orders_the_cells_as_tracing_does(model, noise, trace):
    """Not quite, but far from by chance."""
    estimate = attribute(model.view, FACT, noise)
    assert estimate.low == pytest.approx(trace.low, abs=1e-4)
    assert correlation(estimate.facts(), trace.facts()) > 0.4
