"""Which goes where: for a method from what it declares, for a patch from its parts."""

from __future__ import annotations

from typing import Literal

from knowpatch.deltas import Dense
from knowpatch.export.merged import Merged
from knowpatch.export.ship import TARGETS
from knowpatch.method import EditMethod
from knowpatch.patch import Patch

How = Literal["exact", "rounded", "truncated", "facts", "no"]
MEANING = {
    "exact": "the change as it is",
    "rounded": "every tensor that changes, at the number type of the file",
    "truncated": "of full rank: cut to a low one; the share that is lost is told",
    "facts": "what the edit was asked for, as text; not how it was made",
    "no": "acts beside the weights (a wrap, a prompt rule, a procedure): serve it with knowpatch",
}
ADAPTERS = {"peft", "gguf-lora"}
"""What holds low-rank changes only."""
ROUNDED = {"gguf"}


def of_patch(patch: Patch) -> dict[str, How]:
    """How a patch goes to each target."""
    dense = any(isinstance(delta.change, Dense) for delta in patch.deltas)
    able = {name for name, target in TARGETS.items() if target.refuses(patch) is None}
    return _how(able, truncated=ADAPTERS if dense else set())


def of_method(method: type[EditMethod]) -> dict[str, How]:
    """How a method's patches go to each target, as it declares.

    What can be merged can be cut down to an adapter; what a patch was made from is text.
    """
    declared: set[str] = set(method.exports)
    texts = {name for name, target in TARGETS.items() if not target.weights}
    more = ADAPTERS - declared if Merged.name in declared else set()
    return _how(declared | texts | more, truncated=more)


def without_loss(ways: dict[str, How]) -> set[str]:
    """The targets that hold all of a change: what a method declares as its exports."""
    return {name for name, how in ways.items() if how in ("exact", "rounded")}


def reason(patch: Patch) -> str | None:
    """Why a patch does not go into weights; None where it does."""
    return Merged.refuses(patch)


def _how(able: set[str], *, truncated: set[str]) -> dict[str, How]:
    return {name: _way(name, able, truncated) for name in TARGETS}


def _way(name: str, able: set[str], truncated: set[str]) -> How:
    if name not in able:
        return "no"
    if not TARGETS[name].weights:
        return "facts"
    if name in ROUNDED:
        return "rounded"
    return "truncated" if name in truncated else "exact"
