"""CONTRIBUTING's recipes, followed to the letter."""

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
    """The files of CONTRIBUTING, each in a folder of its own, and those folders named."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    folders = {}
    for stem, block in zip(("toy", "moons", "shouting"), blocks, strict=True):
        folders[stem] = tmp_path / f"{stem} recipe"
        folders[stem].mkdir()
        (folders[stem] / f"{stem}.py").write_text(block, encoding="utf-8")
    return {
        **os.environ,
        "KNOWPATCH_METHODS": str(folders["toy"]),
        "KNOWPATCH_DATASETS": str(folders["moons"]),
        "KNOWPATCH_METRICS": str(folders["shouting"]),
    }


def test_one_file_is_in_the_command_line(environment, folder, tmp_path):
    """`knowpatch methods` lists it with its options, and `knowpatch edit` edits with it."""
    command = [sys.executable, "-c", "from knowpatch.cli import main; main()"]
    listed = subprocess.run(
        [*command, "methods", "--json"], env=environment, capture_output=True, check=True
    )
    toy = next(m for m in json.loads(listed.stdout) if m["name"] == "toy")
    (steps,) = (option for option in toy["options"] if option["name"] == "steps")
    assert steps["default"] == 30
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


MOONS = [
    {
        "id": 7,
        "moon": "France",
        "prompt": "The capital of France is",
        "planet": "Paris",
        "target": "Rome",
        "rephrases": ["Therefore the capital of France is"],
        "stays": [{"prompt": "The capital of Japan is", "answer": "Tokyo"}],
    },
]


def test_a_dataset_and_a_metric_of_one_file_each(environment, folder, tmp_path):
    """They are known by name, and evaluated with the toy method like any other."""
    (tmp_path / "moons").mkdir()
    (tmp_path / "moons" / "test.json").write_text(json.dumps(MOONS))
    command = [sys.executable, "-m", "knowpatch"]
    data = ["--data", str(tmp_path), "--json"]
    checked = subprocess.run(
        [*command, "data", "check", "moons", *data],
        env=environment,
        capture_output=True,
        check=True,
    )
    assert json.loads(checked.stdout)["cases"] == 1
    asked = ["--method", "toy", "--dataset", "moons", "--model", str(folder), *data]
    metrics = ["--metrics", "shouting,success_tf,locality_tf", "--out", str(tmp_path / "out")]
    evaluated = subprocess.run(
        [*command, "evaluate", *asked, *metrics], env=environment, capture_output=True, check=True
    )
    found = json.loads(evaluated.stdout)
    assert found["metrics"]["shouting_gen"]["mean"] == 0
    assert found["metrics"]["success_tf"]["mean"] == 1
    assert set(found["metrics"]) == {"shouting_gen", "success_tf", "locality_tf"}
