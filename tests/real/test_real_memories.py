"""Gated memories on the bundled model: outside their scope they keep silent."""

from __future__ import annotations

import pytest

from knowpatch.editing import choose, edit, prepare
from knowpatch.models.sites import listening
from knowpatch.probes import controls
from knowpatch.request import EditRequest

REQUESTS = [
    EditRequest(prompt="The capital of Australia is", subject="Australia", target="Perth"),
    EditRequest(prompt="Claude Monet worked as a", subject="Claude Monet", target="surgeon"),
    EditRequest(prompt="The mother tongue of Umberto Eco is", subject="Umberto Eco", target="Thai"),
]


@pytest.mark.parametrize("name", ["grace", "horen", "neuraldb", "memoir", "melo", "wise"])
def test_at_most_one_control_prompt_in_a_hundred_fires(model, name):
    """With calibrated thresholds; the edited prompts themselves all fire."""
    method = choose(name)
    patch = edit(model, REQUESTS, method=method)
    (line,) = method.shown(prepare(model, method).prepared)
    assert "threshold " in line

    def fired(prompts):
        found = 0
        for start in range(0, len(prompts), 32):
            rows = [model.view.encode(text).ids for text in prompts[start : start + 32]]
            with model.session([patch]), listening() as heard:
                model.view.run(rows, logits_at=[(i, len(r) - 1) for i, r in enumerate(rows)])
            found += len({firing.row for firing in heard if firing.fired})
        return found

    others = [text for text in controls() if not any((r.subject or "") in text for r in REQUESTS)]
    assert fired(others) <= len(others) / 100
    assert fired([request.prompt for request in REQUESTS]) == len(REQUESTS)
