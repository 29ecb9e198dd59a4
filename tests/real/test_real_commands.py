"""The commands a user types, on the bundled model, each in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from knowpatch.files import cache_folder
from knowpatch.models.gguf import convert
from knowpatch.models.origin import resolve

README = Path(__file__).parents[2] / "README.md"
EDIT = ["edit", "The capital of Australia is", "--subject", "Australia", "--target", "Canberra"]


FIX = ["--patch", "fix.safetensors"]
PROGRAM = "from knowpatch.cli import main; main()"
# What the system tells of children counts what they inherit from this process, too.
MEASURED = f"""
import atexit, pathlib
from knowpatch.bench.memory import peak
atexit.register(lambda: pathlib.Path("peak").write_text(str(peak())))
{PROGRAM}
"""


def _knowpatch(*arguments, cwd, code=0, program=PROGRAM):
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == code, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def fix(tmp_path_factory):
    """The folder and the report of one edit made by the command."""
    folder = tmp_path_factory.mktemp("fix")
    return folder, json.loads(_knowpatch(*EDIT, "--out", "fix.safetensors", "--json", cwd=folder))


def test_the_report_is_complete(fix):
    """Every key is there, the edit took, the model came back, and most controls stayed."""
    _, report = fix
    assert {"method", "model", "took", "patch", "seconds", "probes"} <= set(report)
    assert set(report["patch"]) == {"id", "file", "bytes", "rank"}
    assert set(report["seconds"]) == {"load", "prepare", "edit", "ask"}
    assert report["took"] is True
    assert report["restored"] is True
    kinds = {probe["kind"] for probe in report["probes"]}
    assert kinds == {
        "rewrite",
        "rephrase",
        "locality.subject",
        "locality.neighbour",
        "locality.control",
    }
    controls = [p for p in report["probes"] if p["kind"] == "locality.control"]
    assert len(controls) >= 90
    moved = [p for p in controls if p["before"]["text"] != p["after"]["text"]]
    assert len(moved) < len(controls) / 2
    rewrite = next(p for p in report["probes"] if p["kind"] == "rewrite" and not p["chat"])
    assert rewrite["before"]["accuracy"] < 1 == rewrite["after"]["accuracy"]


def test_the_same_seed_writes_the_same_file_in_bounded_memory(fix, tmp_path):
    """A second run writes identical bytes, and no run takes 2.5 GB."""
    folder, _ = fix
    _knowpatch(*EDIT, "--out", "again.safetensors", cwd=tmp_path, program=MEASURED)
    assert (folder / "fix.safetensors").read_bytes() == (
        tmp_path / "again.safetensors"
    ).read_bytes()
    assert int((tmp_path / "peak").read_text()) < 2.5 * 10**9


def test_ask_without_and_with(fix):
    """The patch file changes the answer, and nothing without it."""
    folder, _ = fix
    out = _knowpatch("ask", EDIT[1], "--patch", "fix.safetensors", "--json", cwd=folder)
    answers = json.loads(out)
    assert answers["without"].startswith("Sydney")
    assert answers["with"].startswith("Canberra")


def test_export_makes_a_folder_that_transformers_loads(fix):
    """The merged folder answers as the patched model does; all other tensors are the base's."""
    folder, _ = fix
    told = json.loads(_knowpatch("export", *FIX, "--to", "merged", "merged", "--json", cwd=folder))
    assert told["parity"]["exact"] is True
    assert told["parity"]["lost"] == []
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    model = AutoModelForCausalLM.from_pretrained(folder / "merged")
    tokens = tokenizer(EDIT[1], return_tensors="pt")
    out = model.generate(**tokens, max_new_tokens=3, do_sample=False)
    assert "Canberra" in tokenizer.decode(out[0])
    base = AutoModelForCausalLM.from_pretrained(convert(resolve(None).path)).state_dict()
    changed = [n for n, t in model.state_dict().items() if not torch.equal(t, base[n])]
    assert changed == ["model.layers.4.mlp.down_proj.weight"]


def test_the_readme_lines_work_when_pasted(tmp_path):
    """README's Python block, run as it stands, prints what it says."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    lines = [line for line in blocks[0].splitlines() if line.strip()]
    assert len(lines) == 8
    run = subprocess.run(
        [sys.executable, "-c", blocks[0]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "Canberra" in run.stdout
    assert "Sydney" in run.stdout


def test_the_gguf_is_converted_once_and_exactly(tmp_path, monkeypatch):
    """Converting gives transformers' own dequantised tensors; the second call only looks."""
    source = resolve(None).path
    monkeypatch.setenv("KNOWPATCH_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    stages = []
    folder = convert(source, lambda *step: stages.append(step))
    assert len(stages) == 4
    assert convert(source, lambda *step: pytest.fail("converted twice")) == folder
    assert not [p for p in (tmp_path / "models").iterdir() if p.name.startswith(".")]
    direct = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    ).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert set(ours) == set(direct)
    assert all(torch.equal(ours[name], direct[name]) for name in ours)


@pytest.mark.parametrize(("name", "pair"), [("session", "score")])
def test_a_benchmark_ends_in_one_line_of_json(name, pair):
    """`--quick --json`: both sides ran, and the last line is the pairs."""
    file = README.parent / "benchmarks" / f"{name}.py"
    run = subprocess.run(
        [sys.executable, str(file), pair, "--quick", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    (found,) = json.loads(run.stdout.splitlines()[-1])
    keys = {"name", "ratio", "low", "high", "ours", "plain", "unit", "n", "settings"}
    assert set(found) == keys
    assert found["name"] == pair
    assert found["plain"] > 0
    assert found["ours"] > 0
