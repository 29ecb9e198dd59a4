"""Merged: the model with the changes in its weights, as a folder that transformers loads.

The files are the source's own: the same shards, index, config and tokenizer, and in the shards
other bytes where a changed tensor lies (its fold from the stored values, in float32, rounded once).
A model without safetensors files of its own is saved whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from knowpatch.export.target import Base, Cargo, Target
from knowpatch.models.checkpoint import Checkpoint
from knowpatch.models.gguf import quiet_transformers
from knowpatch.models.load import load as load_view
from knowpatch.models.view import ModelView


@dataclass(frozen=True)
class Merged(Target):
    """The whole model, changed."""

    name = "merged"
    about = "a folder with the changed model, for transformers and what reads its folders"
    reader = "transformers"
    folder = True
    stored = True

    def write(self, cargo: Cargo, place: Path) -> list[str]:
        checkpoint = cargo.checkpoint
        names = _stored_names(cargo, checkpoint) if checkpoint else None
        if checkpoint is None or names is None:
            view = cargo.model.view
            cargo.progress("writing the model", 0, 1)
            with quiet_transformers():
                view.model.save_pretrained(place)
                view.tokenizer.save_pretrained(place)
            cargo.progress("writing the model", 1, 1)
            return ["saved whole: the model has no safetensors files with these tensors"]
        changed = dict(_values(cargo, checkpoint, names))
        shards = checkpoint.copy(place, changed, cargo.progress)
        return [
            f"{len(changed)} of {len(checkpoint.spans)} tensors, in {shards} of "
            f"{len(checkpoint.shards)} shards, rewritten"
        ]

    def read(self, base: Base, path: Path) -> ModelView:
        return load_view(str(path), device=base.device, dtype="stored")


def _stored_names(cargo: Cargo, checkpoint: Checkpoint) -> dict[str, list[str]] | None:
    """Each changed parameter to what it is called in the files (tied ones may be there twice);
    None if one is not there as the model has it."""
    prefix = cargo.model.model.base_model_prefix
    found: dict[str, list[str]] = {}
    for name in cargo.changed:
        alike = [other for other, first in cargo.canonical.items() if first == name]
        stored = [s for other in alike if (s := checkpoint.name_of(other, prefix))]
        unedited = cargo.unedited(name)
        if not stored or not all(_same(checkpoint.tensor(s), unedited) for s in stored):
            return None
        found[name] = list(dict.fromkeys(stored))
    return found


def _same(stored: Tensor, unedited: Tensor) -> bool:
    return stored.shape == unedited.shape and torch.equal(stored.to(unedited.dtype), unedited)


def _values(
    cargo: Cargo, checkpoint: Checkpoint, names: dict[str, list[str]]
) -> Iterator[tuple[str, Tensor]]:
    for name, stored_names in names.items():
        for stored in stored_names:
            old = checkpoint.tensor(stored)
            yield stored, cargo.folded(old, name).to(old.dtype)
