"""CONTRIBUTING's recipe for a method, followed to the letter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def environment(tmp_path):
    """The toy method of CONTRIBUTING as one file in a folder of its own, and that folder named."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.findall(r"```python\n(.*?)```", text, re.S)[0]
    (tmp_path / "toy.py").write_text(block, encoding="utf-8")
    return {**os.environ, "KNOWPATCH_METHODS": str(tmp_path)}


def test_one_file_is_in_the_command_line(environment, folder, tmp_path):
    """`knowpatch methods` lists it with its options, and `knowpatch edit` edits with it."""
    command = [sys.executable, "-c", "from knowpatch.cli import main; main()"]
    listed = subprocess.run(
        [*command, "methods", "--json"], env=environment, capture_output=True, check=True
    )
    toy = next(m for m in json.loads(listed.stdout) if m["name"] == "toy")
    assert {"name": "steps", "default": 30}.items() <= toy["options"][1].items()
    edited = subprocess.run(
        [
            *command,
            "edit",
            "The capital of France is",
            "--target",
            "Rome",
            "--json",
            "--method",
            "toy",
            "--model",
            str(folder),
            "--set",
            "steps=40",
        ],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    assert json.loads(edited.stdout)["method"] == "toy"


def test_one_file_is_held_to_the_contract(environment):
    """The contract tests find it and it keeps every promise."""
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "toy",
            str(ROOT / "tests" / "test_contract.py"),
        ],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 20
