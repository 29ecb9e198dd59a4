"""What a model is, as a hash: its stored tensors, its config and its tokenizer.

The fingerprint is that of the checkpoint, whatever dtype it was loaded in, and stays the same over
library versions since it reads the files. A model that never was a checkpoint is hashed as the
checkpoint that it would be saved as. Tied tensors count once, under their first name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from knowpatch.files import is_remembered, remembered

VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
"""Entries of a config that say how it was saved or loaded, not what the model computes."""


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    plain = tensor.detach().cpu().contiguous().flatten()
    for piece in plain.split(1 << 24):
        digest.update(piece.view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class Identity:
    """A model's fingerprint and what its touched tensors are checked against.

    Attributes:
        fingerprint: 64 hexadecimal digits over tensors, config and tokenizer.
        digests: hash of each stored tensor by name.
        folder: the checkpoint, or None for a model that was made in memory.
        origin: what was loaded: a hub id, a folder, or the GGUF file that `folder` was made from.
    """

    fingerprint: str
    digests: Mapping[str, str]
    folder: Path | None = None
    origin: str = ""

    def stored_digest(self, name: str) -> str:
        """The hash of one stored tensor, read anew where there is a checkpoint; "" if unknown."""
        if self.folder is None or name not in self.digests:
            return self.digests.get(name, "")
        for shard in shards(self.folder):
            with safe_open(shard, framework="pt") as file:
                if name in file.keys():  # noqa: SIM118 (not a dict)
                    return tensor_digest(file.get_tensor(name))
        return ""


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder."""
    return sorted(folder.glob("*.safetensors"))


def of_folder(folder: Path) -> Identity:
    """The identity of a checkpoint folder with safetensors weights."""

    def compute() -> dict[str, str]:
        digests = {}
        for shard in shards(folder):
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    digests[name] = tensor_digest(file.get_tensor(name))
        return digests

    digests = remembered("tensors", shards(folder), compute)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Identity(_total(digests, config, _tokenizer_of_folder(folder)), digests, folder)


def known(folder: Path) -> str:
    """The fingerprint of a folder that was loaded before, without reading it; else ""."""
    file = folder / "tokenizer.json"
    noted = [("tensors", shards(folder)), *([("tokenizer", [file])] if file.is_file() else [])]
    if shards(folder) and all(is_remembered(what, paths) for what, paths in noted):
        return of_folder(folder).fingerprint
    return ""


def of_model(model: nn.Module, tokenizer: Any) -> Identity:
    """The identity of a model in memory."""
    digests = {name: tensor_digest(parameter) for name, parameter in model.named_parameters()}
    kept = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in kept:
            digests[name] = tensor_digest(buffer)
    config = json.loads(model.config.to_json_string())  # type: ignore[union-attr, operator]
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    return Identity(_total(digests, config, _tokenizer(backend)), digests)


def _total(digests: Mapping[str, str], config: dict[str, Any], tokenizer: str) -> str:
    config = {name: value for name, value in config.items() if name not in VOLATILE}
    whole = json.dumps([sorted(digests.items()), config, tokenizer], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def _tokenizer(backend: dict[str, Any]) -> str:
    """Hash of a tokenizer.json, without the padding and truncation it happened to be used with."""
    plain = {name: v for name, v in backend.items() if name not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _tokenizer_of_folder(folder: Path) -> str:
    file = folder / "tokenizer.json"
    if file.is_file():
        return remembered("tokenizer", [file], lambda: _tokenizer(json.loads(file.read_bytes())))
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.model"), *folder.glob("vocab*"), *folder.glob("merges*")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()
