"""A checkpoint folder as files: which tensor is stored where, and its bytes.

What one ships differs from what one has in a few tensors, of the same shape and type as before. So
a shard with changed tensors is a copy of the old one with other bytes at their places, and
everything else is a plain copy.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from knowpatch.errors import ModelError
from knowpatch.progress import Progress, silent

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BESIDE = ("*.json", "*.model", "*.jinja", "*.txt", "LICENSE*", "NOTICE*")
"""What goes with the weights: config, tokenizer, licence. A model card tells of the old model."""
OTHER_WEIGHTS = "*.bin.index.json"


@dataclass(frozen=True)
class Span:
    """Where a tensor's bytes are: a shard, and from which byte to which."""

    shard: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors checkpoint in a folder."""

    folder: Path

    @cached_property
    def shards(self) -> list[Path]:
        """The files that transformers reads the weights from; others lie beside them."""
        if (self.folder / SINGLE).is_file():
            return [self.folder / SINGLE]
        if (self.folder / INDEX).is_file():
            index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            return [self.folder / name for name in sorted(set(index["weight_map"].values()))]
        return sorted(self.folder.glob("*.safetensors"))

    @cached_property
    def spans(self) -> Mapping[str, Span]:
        """Where each stored tensor is."""
        return {name: span for shard in self.shards for name, span in _spans(shard).items()}

    def name_of(self, parameter: str, prefix: str) -> str | None:
        """What a parameter is called in the files: its own name, or that without (or with) the
        name of the model's body in front, as checkpoints of a bare body have it."""
        bare = parameter.removeprefix(f"{prefix}.")
        options = (parameter, bare, f"{prefix}.{parameter}")
        return next((name for name in options if name in self.spans), None)

    def tensor(self, name: str) -> Tensor:
        """A stored tensor, as it is stored."""
        with safe_open(self.spans[name].shard, framework="pt") as file:
            found: Tensor = file.get_tensor(name)
        return found.clone()

    def copy(self, target: Path, changed: Mapping[str, Tensor], progress: Progress = silent) -> int:
        """Copy the checkpoint into the folder `target`, with other values of some tensors.

        Args:
            target: an empty folder.
            changed: new values by stored name, of the stored shapes and types.
            progress: told of each file.

        Returns:
            How many shards hold a changed tensor.
        """
        files = [*self.shards, *self._beside()]
        for number, path in enumerate(files):
            progress("copying the model", number, len(files))
            _copied(path, target / path.name)
        progress("copying the model", len(files), len(files))
        touched = set()
        for name, value in changed.items():
            span = self.spans[name]
            _overwrite(target / span.shard.name, span, value)
            touched.add(span.shard)
        return len(touched)

    def _beside(self) -> list[Path]:
        """The files that belong to these weights, besides them."""
        found = []
        for path in sorted(self.folder.iterdir()):
            named = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in BESIDE)
            if path.is_file() and named and not fnmatch.fnmatchcase(path.name, OTHER_WEIGHTS):
                found.append(path)
        return found


def _spans(shard: Path) -> dict[str, Span]:
    """Read off a safetensors header: a length (8 bytes), then JSON with offsets behind it."""
    try:
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {name: entry["data_offsets"] for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{shard}: damaged, or not downloaded to its end ({error})") from None
    begin = 8 + length
    return {name: Span(shard, begin + one, begin + two) for name, (one, two) in entries.items()}


def _copied(source: Path, target: Path) -> None:
    """Copy a file; on file systems that can, its blocks are shared until either is written to.

    Not a hard link: who later saves into the new folder would write into the old model.
    """
    if not hasattr(os, "copy_file_range"):
        shutil.copyfile(source, target)
        return
    with source.open("rb") as old, target.open("wb") as new:
        left = os.fstat(old.fileno()).st_size
        try:
            while left and (done := os.copy_file_range(old.fileno(), new.fileno(), left)):
                left -= done
        except OSError:  # across file systems, say; what is lacking is copied plainly
            old.seek(0)
            new.seek(0)
            shutil.copyfileobj(old, new, 1 << 24)


def _overwrite(file: Path, span: Span, value: Tensor) -> None:
    content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    if content.nbytes != span.stop - span.start:
        raise ModelError(f"{file.name}: a tensor of {content.nbytes} bytes does not fit its place")
    with file.open("r+b") as shard:
        shard.seek(span.start)
        shard.write(content.tobytes())
