"""The plain statistics of the benchmark are ours, and the definition's."""

from __future__ import annotations

import torch
from plain.moments import second_moments

from knowpatch.models.passes import Tap
from knowpatch.parts.moments import collect

MAPS = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")


def test_plain_statistics_are_ours(known):
    """The same mean of k k^T for each map, to 1e-5, in batches of any size."""
    view = known("llama").view
    rows = torch.randint(300, (5, 16), generator=torch.Generator().manual_seed(0)).tolist()
    ours = collect(view, [Tap(name, "input") for name in MAPS], rows)
    for together in (2, 5):
        plain = second_moments(view.model, MAPS, rows, together)
        for one, other in zip(ours, plain, strict=True):
            assert torch.allclose(one.mean(), other.double(), rtol=1e-5, atol=1e-6)


def test_plain_statistics_leave_no_hook(known):
    """The model answers as before."""
    model = known("llama").model
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    second_moments(model, MAPS, [[1, 2, 3]], 1)
    assert torch.equal(model(ids).logits, before)
