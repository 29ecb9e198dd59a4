"""What every test starts from: a cache folder of its own, and tiny models that know facts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from knowpatch.edited import EditedModel


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No test without the mark `real` sees the user's cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["KNOWPATCH_CACHE"] = str(folder)
    return folder


@pytest.fixture
def known() -> Callable[..., EditedModel]:
    """Makes an EditedModel that knows tiny.FACTS: known("llama"), known("gpt2", chat=True)."""

    def make(architecture: str = "llama", kind: str = "bpe", *, chat: bool = False) -> EditedModel:
        return EditedModel.of(*tiny.trained(architecture, kind, chat=chat))

    return make


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model with a chat template, as a user would have it."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    model, tok = tiny.trained("llama", chat=True)
    model.save_pretrained(path)
    tok.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes folders with tiny models: folders("gpt2"), folders("llama", dtype=torch.bfloat16)."""
    root = tmp_path_factory.mktemp("bases")
    made: dict[Any, Path] = {}

    def folder(architecture: str, *, dtype: torch.dtype = torch.float32, **how: Any) -> Path:
        key = (architecture, dtype, *how.items())
        if key not in made:
            made[key] = root / f"{architecture}{len(made)}"
            model, tok = tiny.trained(architecture)
            model.to(dtype).save_pretrained(made[key], **how)
            tok.save_pretrained(made[key])
        return made[key]

    return folder
