"""Workspaces and patches for tests of the ledger, made by hand and without a model."""

from __future__ import annotations

from pathlib import Path

import torch

from knowpatch.deltas import Address, LowRank, WeightDelta
from knowpatch.ledger import Circumstances, Edit, Note, Workspace
from knowpatch.patch import Patch, PromptRule, Provenance
from knowpatch.request import EditRequest

FINGERPRINT = "f" * 64


def patch(
    number: int, *, weights: bool = False, fingerprint: str = FINGERPRINT, **request
) -> Patch:
    """A small patch about country `number`: a prompt rule, or a change of rank one."""
    fields = {
        "prompt": f"The capital of country {number} is",
        "target": f"city {number}",
        "subject": f"country {number}",
        **request,
    }
    made = Provenance(
        method="by hand",
        config={"strength": 0.5},
        seed=number,
        fingerprint=fingerprint,
        requests=(EditRequest(**fields),),
        version="0",
    )
    if not weights:
        return Patch(made, rule=PromptRule("before@1", {"text": f"fact {number}"}))
    noise = torch.Generator().manual_seed(number)
    left, right = torch.randn(4, 1, generator=noise), torch.randn(1, 6, generator=noise)
    return Patch(made, (WeightDelta(Address(parameter="block.weight"), LowRank(left, right)),))


def record(workspace: Workspace, made: Patch, *, reason: str | None = None, **facts) -> Edit:
    """Record a patch as made on top of what is live now."""
    circumstances = Circumstances(over=workspace.history.number, **facts)
    (edit,) = workspace.record([(made, circumstances)], note=Note("Anna", reason))
    return edit


def filled(root: Path, count: int, *, weights: bool = False) -> Workspace:
    """A workspace with so many edits, one after the other."""
    root.mkdir(exist_ok=True)
    workspace = Workspace.create(root, note=Note("Anna"))
    for number in range(count):
        report = {"probes": [], "number": number}
        record(workspace, patch(number, weights=weights), reason=f"why {number}", report=report)
    return workspace


def ids(edits: list[Edit]) -> list[str]:
    return [edit.id for edit in edits]
