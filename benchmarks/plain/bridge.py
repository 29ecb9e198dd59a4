"""What both sides of a comparison share: facts as the plain programs take them, and patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from knowpatch import EditRequest, Patch, __version__
from knowpatch.deltas import Dense, WeightDelta
from knowpatch.models.view import ModelView
from knowpatch.patch import Provenance
from plain.rome import Fact


def facts(
    method: Any, view: ModelView, requests: Sequence[EditRequest], contexts: Sequence[str]
) -> list[Fact]:
    """The requests behind the contexts, tokenised as our `method` tokenises them."""
    tasks = [method.task(view, request, contexts) for request in requests]
    return [
        Fact(
            task.target,
            tuple((row.ids, row.position) for row in task.contexts),
            (task.kl.ids, task.kl.position),
        )
        for task in tasks
    ]


def patch(method: Any, view: ModelView, changes: Sequence[Tensor]) -> Patch:
    """A plain side's changes (D, I) of the layers of `method`, to be scored as ours are."""
    roles = [method.role(view, layer) for layer in method.layers_of(view)]
    provenance = Provenance(
        method="benchmark",
        config={},
        seed=0,
        fingerprint=view.fingerprint,
        requests=(),
        version=__version__,
    )
    deltas = (
        WeightDelta(role.address, Dense(role.oriented(change_DI.float()).contiguous()))
        for role, change_DI in zip(roles, changes, strict=True)
    )
    return Patch(provenance, tuple(deltas))
