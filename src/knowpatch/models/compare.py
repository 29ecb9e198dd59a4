"""Two checkpoints of one architecture, tensor by tensor, read from safetensors alone.

Neither model is run or built, and nothing is ever unpickled: a folder whose weights are pickled is
refused. What differs by no more than being stored in a narrower type does not differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from knowpatch.errors import ModelError
from knowpatch.models.fingerprint import shards
from knowpatch.models.gguf import convert
from knowpatch.models.load import config_of
from knowpatch.models.origin import resolve
from knowpatch.progress import Progress, silent

HEADS = ("lm_head", "embed_out")


@dataclass(frozen=True, eq=False)
class Difference:
    """One tensor that differs.

    Attributes:
        name: as both checkpoints call it.
        new, old: its values, float32, the old ones as the new type would have stored them.
        step: the relative step between neighbouring numbers of the coarser type.
    """

    name: str
    new: Tensor
    old: Tensor
    step: float


def checkpoint(name: str | None, progress: Progress = silent) -> Path:
    """The folder with safetensors weights of a folder, a GGUF file or the bundled model.

    Raises:
        ModelError: there is none, or its weights are not safetensors.
    """
    origin = resolve(name)
    if origin.kind == "hub":
        raise ModelError(f"{name}: no such model folder or GGUF file")
    folder = origin.path if origin.kind == "folder" else convert(origin.path, progress)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; not a model folder")
    if not shards(folder):
        pickled = next(folder.glob("*.bin"), None)
        why = f"its weights are pickled ({pickled.name})" if pickled else "no *.safetensors in it"
        raise ModelError(f"{folder}: {why}; only safetensors and GGUF are read")
    return folder


def check_alike(model: Path, base: Path) -> None:
    """ModelError, in one line, for checkpoints of different architectures."""
    kinds = [str(config_of(folder).get("model_type")) for folder in (model, base)]
    if kinds[0] != kinds[1]:
        raise ModelError(
            f"{model.name} is a {kinds[0]}, {base.name} a {kinds[1]}: "
            "only models of one architecture can be compared"
        )
    mine, theirs = (shapes(folder) for folder in (model, base))
    tied = all(config_of(folder).get("tie_word_embeddings") for folder in (model, base))
    # A head that is the embedding may be stored or not.
    names = set(mine) ^ set(theirs)
    names -= {name for name in names if tied and name.removesuffix(".weight") in HEADS}
    names |= {name for name in set(mine) & set(theirs) if mine[name] != theirs[name]}
    if names:
        name = min(names)
        told = [str(list(some[name])) if name in some else "none" for some in (mine, theirs)]
        raise ModelError(
            f"{model.name} and {base.name} are of different shapes ({name}: {told[0]} and "
            f"{told[1]}): only models of one architecture can be compared"
        )


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every stored tensor."""
    found = {}
    for shard in shards(folder):
        with _opened(shard) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                found[name] = tuple(file.get_slice(name).get_shape())
    return found


def differences(model: Path, base: Path, progress: Progress = silent) -> Iterator[Difference]:
    """The tensors that differ, one at a time, by name."""
    places = [_places(folder) for folder in (model, base)]
    names = sorted(set(places[0]) & set(places[1]))
    for number, name in enumerate(names):
        progress("comparing tensors", number, len(names))
        new, old = (_read(place[name], name) for place in places)
        kind = new.dtype
        step = max(_step(new), _step(old))
        wide, was = new.float(), old.to(kind).float()
        if not torch.equal(wide, was):
            yield Difference(name, wide, was, step)
    progress("comparing tensors", len(names), len(names))


def tokenizers_differ(model: Path, base: Path) -> bool:
    """Whether two checkpoints read text in different ways, as far as tokenizer.json says."""
    return _tokenizer(model) != _tokenizer(base)


def _tokenizer(folder: Path) -> Mapping[str, Any] | None:
    try:
        loaded = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # How it happened to be used last is no part of it.
    return {key: value for key, value in loaded.items() if key not in ("padding", "truncation")}


def _step(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0


def _places(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for shard in shards(folder):
        with _opened(shard) as file:
            found |= dict.fromkeys(file.keys(), shard)
    return found


def _read(shard: Path, name: str) -> Tensor:
    with _opened(shard) as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _opened(shard: Path) -> Any:
    try:
        return safe_open(shard, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{shard}: damaged, or no safetensors file ({error})") from None
