"""One edit of the bundled model, shipped as an adapter and in its GGUF file."""

from __future__ import annotations

import pytest

from knowpatch.editing import edit
from knowpatch.export.ship import ship
from knowpatch.request import EditRequest

FACT = EditRequest(prompt="The capital of Australia is", subject="Australia", target="Canberra")


@pytest.fixture(scope="module")
def patch(model):
    """Of rank one."""
    return edit(model, FACT, method="rome")


@pytest.mark.filterwarnings("ignore")  # peft's, about what it does not find
def test_an_adapter_is_the_patch(model, patch, tmp_path):
    """Loaded by peft in float32, no logit differs by 1e-4, and the edit is answered."""
    parity = ship(model, [patch], "peft", tmp_path / "adapter").parity
    assert max(parity.edits_difference, parity.controls_difference) < 1e-4
    assert (parity.before, parity.after, parity.moved) == (1, 1, 0)


def test_half_precision_in_the_models_own_file(model, patch, tmp_path):
    """At F16 no logit differs by 1e-2, and the edit is answered; 271 tensors keep their bytes."""
    shipped = ship(model, [patch], "gguf", tmp_path / "edited.gguf")
    assert shipped.notes == ("1 of 272 tensors rewritten, as F16",)
    parity = shipped.parity
    assert 0 < max(parity.edits_difference, parity.controls_difference) < 1e-2
    assert (parity.before, parity.after, parity.moved) == (1, 1, 0)
