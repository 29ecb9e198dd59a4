"""Fifty edits by five methods of all families, taken back in random order: the base's bytes."""

from __future__ import annotations

import random
from pathlib import Path

from workspace import METHODS, facts, filled, state, taken_back

from knowpatch.edited import EditedModel
from knowpatch.ledger import Workspace
from knowpatch.ledger.verify import verify

TINY = {
    "ice": {},
    "grace": {"steps": 10},
    "lora": {"layers": "2-3", "steps": 6, "learning_rate": 0.01},
    "ft": {"steps": 4, "learning_rate": 0.01},
    "rome": {"layer": 0, "kl_factor": 0, "moments": "identity", "steps": 4},
}
"""Enough of each method to change what it changes."""


def test_fifty_edits_taken_back_in_random_order(known, tmp_path: Path):
    """Whatever is live is the same bytes as applied afresh, and nothing live is the base."""
    model: EditedModel = known("llama")
    base = state(model)
    workspace = Workspace.create(tmp_path)
    methods = [(name, TINY[name]) for name, _ in METHODS]
    patches = filled(model, workspace, methods, facts(50))
    assert len(patches) == 50
    assert len({edit.recorded["method"] for edit in patches}) == 5
    assert sum(state(model)[name] != base[name] for name in base) >= 3
    _, differ = taken_back(model, workspace, patches, random.Random(0))
    assert differ == 0
    assert not workspace.live()
    assert state(model) == base
    assert not verify(workspace.folder).faults
    assert {patch.id for patch in patches.values()} == set(workspace.history.edits)
