"""GGUF: the source file with the changed tensors in it, everything else byte for byte.

Changed tensors are computed from the file's own numbers, in float32, and written at a type that the
gguf library can write: 4-bit types lose part of a change (benchmarks/README.md says how much).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from knowpatch.errors import ModelError
from knowpatch.export.target import Base, Cargo, Target, plain_view
from knowpatch.models import gguf as gguf_models
from knowpatch.models.gguf_file import FLOATS, GgufFile, Layout, Type, type_called
from knowpatch.models.view import ModelView


@dataclass(frozen=True)
class Gguf(Target):
    """A GGUF file.

    Attributes:
        type: of the changed tensors, "F16" and so on; None: what they have if that is a float
            type, else F16.
    """

    name = "gguf"
    about = "the model's GGUF file with the changed tensors in it, for llama.cpp and its kin"
    reader = "transformers, from GGUF"

    type: str | None = None

    def write(self, cargo: Cargo, place: Path) -> list[str]:
        chosen = None if self.type is None else type_called(self.type)
        file = GgufFile(cargo.base.gguf)
        changed = {}
        for name, values in changed_tensors(cargo, file):
            own = file.type_of(name)
            changed[name] = values, chosen or (own if own in FLOATS else Type.F16)
        cargo.progress("writing the GGUF file", 0, 1)
        file.rewrite(place, changed)
        cargo.progress("writing the GGUF file", 1, 1)
        kinds = ", ".join(sorted({kind.name for _, kind in changed.values()}))
        return [f"{len(changed)} of {len(file.tensors)} tensors rewritten, as {kinds}"]

    def read(self, base: Base, path: Path) -> ModelView:
        return read_gguf(base, path)


def read_gguf(base: Base, path: Path) -> ModelView:
    """A GGUF file as transformers reads it, not kept anywhere."""
    tokenizer, model = gguf_models.read(path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return plain_view(model, tokenizer, base.device)


def laid_out(cargo: Cargo, file: GgufFile) -> Iterator[tuple[str, str, Tensor, Layout]]:
    """For each changed parameter: its name, that in the file, its stored value, how it lies.

    Raises:
        ModelError: the file lacks it, or holds it in an unknown order.
    """
    checkpoint = cargo.checkpoint
    for name in cargo.changed:
        if checkpoint is None or name not in checkpoint.spans:
            raise ModelError(f"{cargo.base.source}: {name} is not among its converted tensors")
        stored, filed = checkpoint.tensor(name), file.name_of(name)
        yield name, filed, stored, file.layout(filed, stored, cargo.model.model.config)


def changed_tensors(cargo: Cargo, file: GgufFile) -> Iterator[tuple[str, Tensor]]:
    """The changed tensors by their names in the file, float32, as it orders them."""
    for name, filed, stored, layout in laid_out(cargo, file):
        yield filed, layout.filed(cargo.folded(stored, name))
