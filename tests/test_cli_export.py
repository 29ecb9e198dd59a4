"""`knowpatch export`: what is written, what is told of it, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ggufs
import pytest
import torch
import transformers as hf
from patches import change_of, patch_of
from safetensors.torch import load_file
from shell import FRANCE, TARGET, files, refuse, run

from knowpatch.deltas import LowRank
from knowpatch.editing import load
from knowpatch.export.ship import TARGETS
from knowpatch.export.table import MEANING
from knowpatch.method import METHODS
from knowpatch.request import EditRequest

LOUD = ("--method", "rome", "--set", "layer=0", "--set", "clamp=4", "--set", "moments=identity")
LOUD += ("--set", "kl_factor=0")


@pytest.fixture(scope="module")
def patches(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an edit of full rank and one of rank one, made by the command."""
    here = tmp_path_factory.mktemp("patches")
    full = ("--set", "learning_rate=0.01", "--set", "steps=80", "--out", "full.patch")
    assert run(*FRANCE, *full, "--model", folder, cwd=here).code == 0
    assert run(*FRANCE, *LOUD, "--out", "low.patch", "--model", folder, cwd=here).code in (0, 1)
    assert run(*FRANCE, "--method", "ice", "--out", "rule.patch", "--model", folder, cwd=here)
    return here


def shipped(*arguments: object, cwd: Path) -> dict:
    result = run("export", *arguments, "--json", cwd=cwd)
    assert result.code == 0, result
    return result.json()


def test_a_merged_folder_for_transformers(patches: Path, folder: Path, tmp_path: Path) -> None:
    """transformers loads what was written, and it answers as the edited model."""
    given = ("--patch", patches / "full.patch", "--model", folder)
    told = shipped(*given, "--to", "merged", "merged", cwd=tmp_path)
    saved = tmp_path / "merged"
    assert (told["to"], told["path"]) == ("merged", "merged")
    assert told["bytes"] == sum(len(content) for content in files(saved).values())
    assert told["parity"]["exact"] is True
    assert (told["parity"]["before"], told["parity"]["after"]) == (1, 1)
    assert list(tmp_path.iterdir()) == [saved]
    model = hf.AutoModelForCausalLM.from_pretrained(saved)
    tok = hf.AutoTokenizer.from_pretrained(saved)
    ids = tok(FRANCE[1], return_tensors="pt")
    new = model.generate(**ids, max_new_tokens=1, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tok.decode(new).strip() == TARGET
    again = run("ask", FRANCE[1], "--model", saved, "--json", cwd=tmp_path)
    assert again.json()["without"].startswith(TARGET)


def test_only_what_the_patch_changes(patches: Path, folder: Path, tmp_path: Path) -> None:
    """The merged model differs from the first in the patched tensor, by the patch, and no other."""
    patch = patches / "full.patch"
    shipped("--patch", patch, "--model", folder, "--to", "merged", "merged", cwd=tmp_path)
    old = load_file(folder / "model.safetensors")
    new = load_file(tmp_path / "merged" / "model.safetensors")
    (changed,) = [name for name in old if not torch.equal(old[name], new[name])]
    (delta,) = load_file(patch).values()
    assert torch.equal(new[changed], old[changed] + delta)


def test_into_an_empty_folder_for_a_person(patches: Path, folder: Path, tmp_path: Path) -> None:
    """A folder that is there and empty is filled; the report says what was written and asked."""
    (tmp_path / "merged").mkdir()
    given = ("--patch", patches / "full.patch", "--model", folder)
    result = run("export", *given, "--to", "merged", "merged", cwd=tmp_path)
    assert result.code == 0
    said = " ".join(result.out.split())
    for words in (
        "wrote merged",
        "tensors, in 1 of 1 shards, rewritten",
        "loaded by transformers, and asked, beside the patched model (float32)",
        "1 of 1 answered (the patched model: 1)",
        "0 of 20 go on otherwise",
        "bit for bit",
    ):
        assert words in said
    assert (tmp_path / "merged" / "config.json").is_file()


@pytest.mark.filterwarnings("ignore")  # peft's
def test_an_adapter_of_a_full_rank_edit(patches: Path, folder: Path, tmp_path: Path) -> None:
    """Cut down to rank one: what is left out and what moves is told; at full rank, nothing is."""
    given = ("--patch", patches / "full.patch", "--model", folder)
    told = shipped(*given, "--to", "peft", "whole", "--rank", "48", cwd=tmp_path)
    assert told["parity"]["controls_difference"] < 1e-4
    result = run("export", *given, "--to", "peft", "cut", "--rank", "1", cwd=tmp_path)
    assert "truncated: the factors leave out" in result.out
    assert "0 of 20 go on otherwise" not in result.out


def test_an_edit_that_is_lost_ends_with_1(folder: Path, tmp_path: Path) -> None:
    """Text that a model of four blocks makes nothing of: the edit is named, and the code is 1."""
    odd = EditRequest(prompt="The sum of all numbers is", target="seventeen purple zebras")
    patch_of(load(str(folder)), request=odd).save(tmp_path / "odd.patch")
    given = ("--patch", "odd.patch", "--model", folder)
    result = run("export", *given, "--to", "context", "facts.txt", cwd=tmp_path)
    assert result.code == 1
    assert "0 of 1 answered" in result.out
    assert f"lost      {odd.prompt}" in result.out
    assert (tmp_path / "facts.txt").is_file()


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_a_low_rank_edit(patches: Path, folder: Path, tmp_path: Path) -> None:
    """What was low-rank stays as it is: no logit differs by 1e-4."""
    given = ("--patch", patches / "low.patch", "--model", folder)
    parity = shipped(*given, "--to", "peft", "adapter", cwd=tmp_path)["parity"]
    assert max(parity["edits_difference"], parity["controls_difference"]) < 1e-4


def test_gguf_and_text(tmp_path: Path) -> None:
    """A GGUF model: edited, written into a copy of its file, as an adapter, and told as text."""
    model = ggufs.write(tmp_path / "tiny.gguf")
    assert run(*FRANCE, *LOUD, "--out", "p", "--model", model, cwd=tmp_path).code in (0, 1)
    given = ("--patch", "p", "--model", "tiny.gguf")
    told = shipped(*given, "--to", "gguf", "new.gguf", "--type", "F16", cwd=tmp_path)
    assert told["notes"] == ["1 of 39 tensors rewritten, as F16"]
    assert 0 < told["parity"]["controls_difference"] < 1e-2
    assert run(*["export", *given, "--to", "gguf-lora", "lora.gguf"], cwd=tmp_path).code == 0
    text = run("export", *given, "--to", "context", "facts.md", cwd=tmp_path)
    assert "the model without it" in text.out
    assert f"- {FRANCE[1]} {TARGET}." in (tmp_path / "facts.md").read_text()
    refused = refuse("export", *given, "--to", "gguf", "new.gguf", cwd=tmp_path)
    assert "replace it with --force" in refused
    assert run("export", *given, "--to", "gguf", "new.gguf", "--force", cwd=tmp_path).code == 0


def test_the_table_of_methods(tmp_path: Path) -> None:
    """Every method with a way for every target, and what the words mean."""
    rows = run("export", "--table", "--json", cwd=tmp_path).json()
    assert [row["name"] for row in rows] == METHODS.names()
    for row in rows:
        assert list(row["to"]) == list(TARGETS)
        declared = set(METHODS.get(row["name"]).exports)
        ways = {name for name, how in row["to"].items() if how in ("exact", "rounded")}
        assert ways == declared
    shown = run("export", "--table", cwd=tmp_path).out
    assert all(word in shown for word in (*TARGETS, *MEANING))


def test_the_table_of_patches(patches: Path, tmp_path: Path) -> None:
    """Of patches the same by their parts, with the reason; and no model is loaded."""
    given = ("--patch", patches / "full.patch", "--patch", patches / "rule.patch")
    full, rule = run("export", "--table", *given, "--json", cwd=tmp_path).json()
    assert (full["to"]["merged"], full["to"]["peft"], full["reason"]) == (
        "exact",
        "truncated",
        None,
    )
    assert set(rule["to"].values()) == {"no", "facts"}
    assert rule["reason"].startswith("is a prompt rule")
    assert "is a prompt rule" in run("export", "--table", *given, cwd=tmp_path).out


def test_edit_says_how_to_go_on(folder: Path, tmp_path: Path) -> None:
    """The report of an edit that can be merged ends with the command that does it."""
    quick = ("--set", "steps=1")
    said = run(*FRANCE, *quick, "--out", "p", "--model", folder, cwd=tmp_path).out
    assert "knowpatch export --to merged DIR --patch p" in " ".join(said.split())


def test_the_live_edits_of_a_workspace(folder: Path, tmp_path: Path) -> None:
    """Without --patch, in a workspace: what is live in it, on its model; with none, refused."""
    assert run("init", "--model", folder, cwd=tmp_path).code == 0
    line = refuse("export", "--to", "merged", "out", cwd=tmp_path)
    assert "no edit is live in this workspace; see knowpatch log, or give --patch" in line
    days = ("--valid-from", "2020-01-01")
    assert run(*FRANCE, *LOUD, *days, cwd=tmp_path).code in (0, 1)
    told = shipped("--to", "merged", "out", cwd=tmp_path)
    assert told["patches"] == [edit["id"] for edit in run("log", "--json", cwd=tmp_path).json()]
    assert told["parity"]["exact"] is True
    before = ("--to", "merged", "old", "--on", "2000-01-01")
    assert "in this workspace on 2000-01-01; see" in refuse("export", *before, cwd=tmp_path)


def test_a_tied_head_by_name(folders: Callable[..., Path], tmp_path: Path) -> None:
    """--tied NAME allows what is refused without it."""
    model = load(str(folders("gpt2")))
    head = f"{model.view.roles.head}.weight"
    change = change_of(LowRank, model.view.parameter(head).shape, size=0.01)
    patch_of(model, (head, change)).save(tmp_path / "head.patch")
    given = ("--patch", "head.patch", "--model", folders("gpt2"), "--to", "merged", "out")
    assert "is tied" in refuse("export", *given, cwd=tmp_path)
    assert shipped(*given, "--tied", head, cwd=tmp_path)["parity"]["exact"] is True


KILLED = """
import os, signal, sys
from pathlib import Path
from knowpatch.models.checkpoint import Checkpoint
def half(self, target, values, progress):
    (Path(target) / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
Checkpoint.copy = half
from knowpatch.cli import main
main(sys.argv[1:])
"""


def test_an_export_that_is_killed(patches: Path, folder: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle leaves no folder of that name, and the next export is whole."""
    arguments = ["export", "--patch", patches / "full.patch", "--model", folder]
    arguments += ["--to", "merged", "out"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "out").exists()
    assert run(*arguments, cwd=tmp_path).code == 0
    assert json.loads((tmp_path / "out" / "knowpatch.json").read_text())["to"] == "merged"
