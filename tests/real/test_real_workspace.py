"""Edits of the bundled model in a workspace, taken back in random order."""

from __future__ import annotations

import random
from pathlib import Path

from workspace import METHODS, facts, filled, state, taken_back

from knowpatch.edited import EditedModel
from knowpatch.ledger import Workspace


def test_edits_of_all_families_are_taken_back(model: EditedModel, tmp_path: Path):
    """One by each of five methods, each on top of the others: a revert takes under two seconds,
    and the last gives the base's bytes back."""
    base = state(model)
    workspace = Workspace.create(tmp_path)
    patches = filled(model, workspace, METHODS, facts(5))
    assert state(model) != base
    seconds, _ = taken_back(model, workspace, patches, random.Random(1))
    assert max(seconds) < 2
    assert state(model) == base
