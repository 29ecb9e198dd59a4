"""Readout: any states, read as a model reads what leaves its last block."""

from __future__ import annotations

import pytest
import tiny
import torch

from knowpatch.deltas import Address, Dense, WeightDelta
from knowpatch.edited import EditedModel
from knowpatch.models.passes import Tap
from knowpatch.models.readout import Readout

NORMS = ("model.norm", "ln_f", "final_layer_norm")


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_last_blocks_states_give_the_models_own_logits(architecture):
    """Of all architectures, final norm, projection and caps included."""
    model = EditedModel.of(*tiny.fresh(architecture))
    view, rows = model.view, [[5, 9, 17, 30], [8, 2]]
    tap = Tap(view.roles.blocks[-1].module, "output")
    places = [(0, 1), (0, 3), (1, 1)]
    run = view.run(rows, taps=[tap], logits_at=places)
    assert torch.allclose(Readout(view).logits(run.at(tap, places)), run.logits_MV, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_the_gain_is_what_the_final_norm_multiplies_by(architecture):
    """A state's entries, centred where the norm centres, over its scale, times the gain."""
    model = EditedModel.of(*tiny.fresh(architecture))
    norm = [m for name, m in model.model.named_modules() if name.endswith(NORMS)][-1]
    with torch.no_grad():  # fresh norms multiply by one, which would be no test
        norm.weight.copy_(torch.rand(48) + 0.5)
    expected = norm.weight + 1 if architecture == "gemma2" else norm.weight
    assert torch.allclose(Readout(model.view).gain(), expected, atol=1e-4)


def test_what_is_tried_is_read_out(known):
    """A readout made within a trial has its head."""
    model = known("gpt2")
    view = model.view
    address = Address(parameter=f"{view.roles.head}.weight")
    states = torch.randn(2, 48)
    plain = Readout(view).logits(states)
    zero = Dense(-view.values(address.parameter))
    with view.trying([WeightDelta(address, zero)]):
        assert float(Readout(view).logits(states).abs().max()) == 0
    assert torch.equal(Readout(view).logits(states), plain)
