"""The bundled model and the real records; a test says in a word what it lacks."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest

from knowpatch.edited import EditedModel
from knowpatch.editing import load
from knowpatch.models.origin import BUNDLED_PACKAGE, INSTALL_BUNDLED

HERE = Path(__file__).parent
DATA = Path(os.environ.get("KNOWPATCH_DATA", HERE.parents[2] / "shared" / "data"))


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in Path(item.fspath).parents:
            item.add_marker(pytest.mark.real)
            if importlib.util.find_spec(BUNDLED_PACKAGE) is None:
                item.add_marker(pytest.mark.skip(reason=f"no bundled model: {INSTALL_BUNDLED}"))


@pytest.fixture(scope="session", autouse=True)
def own_cache():
    """Real tests use the user's cache folder: a conversion or statistics are made once."""


@pytest.fixture(scope="session")
def model() -> EditedModel:
    """The bundled model, unedited; each test gives it back as it was."""
    return load()


@pytest.fixture
def records() -> Callable[[str], list[dict]]:
    """Reads a KnowEdit file: records("wiki_counterfact/test_cf.json")."""

    def read(name: str) -> list[dict]:
        path = DATA / "KnowEdit" / "benchmark" / name
        if not path.is_file():
            pytest.skip(f"no data: {name} is not below {DATA} (set KNOWPATCH_DATA)")
        return json.loads(path.read_text(encoding="utf-8"))

    return read


@pytest.fixture(scope="session")
def counterfact() -> list[dict]:
    """The CounterFact records that edits are tried on."""
    path = DATA / "counterfact" / "counterfact-edit.json"
    if not path.is_file():
        pytest.skip(f"no data: {path.name} is not below {DATA} (set KNOWPATCH_DATA)")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def text() -> str:
    """A fixed text for perplexity, written for this project."""
    return resources.files("knowpatch").joinpath("assets", "ordinary.txt").read_text("utf-8")
