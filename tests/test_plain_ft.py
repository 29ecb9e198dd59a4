"""The plain FT-M loop that ours is timed against learns the same."""

from __future__ import annotations

import tiny
import torch
from plain import ft

from knowpatch.editing import choose, edit
from knowpatch.parts.spans import continuation
from knowpatch.request import EditRequest


def test_ours_is_the_plain_loop(known):
    """One request, the same matrix, rate and stop: the same change to 1e-3; the model untouched."""
    model = known("llama")
    prompt, target = next(iter(tiny.EDITS.items()))
    encoded = model.encode(prompt)
    pair = (tuple(encoded.ids), continuation(model.tokenizer, encoded, target))
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    options = {"steps": 6, "learning_rate": 1e-3, "enough": 1e-6, "layer": 2}
    method = choose("ft", {**options, "precision": "model", "others": 0})
    (delta,) = edit(model, EditRequest(prompt=prompt, target=target), method=method).deltas
    name = delta.address.parameter
    plain = ft.train(model.model, name, pair, ft.Settings(6, 1e-3, 1e-6))
    assert (delta.change.delta - plain).norm() <= 1e-3 * plain.norm()
    ft.once(model.model, [name], [pair, pair], 2)
    for name, parameter in model.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
