"""`knowpatch check`, as its users meet it, on a tiny model that knows tiny.FACTS."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from shell import FRANCE, TARGET, files, refuse, run

NILE = "The Nile flows through"
LEARN = ("--set", "learning_rate=0.01")
SUITE = f"""
change: [{{prompt: {FRANCE[1]}, answer: {TARGET}}}]
keep: [{{prompt: Two plus two equals, answer: four}}]
"""


@pytest.fixture(scope="module")
def workspace(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with one edit that took, and a suite."""
    cwd = tmp_path_factory.mktemp("workspace")
    assert run("init", "--model", folder, cwd=cwd).code == 0
    assert run(*FRANCE, *LEARN, cwd=cwd).code == 0
    (cwd / "suite.yaml").write_text(SUITE)
    return cwd


def test_a_workspace_is_checked(workspace: Path):
    """Its live edits are asked; exit code 0, a table, and as JSON every finding."""
    result = run("check", "suite.yaml", cwd=workspace)
    assert result.code == 0, result
    assert "1 live edit of this workspace" in result.out
    assert "must change      1 of 1 hold; at least 100 %: passed" in result.out
    told = run("check", "--json", cwd=workspace).json()
    assert told["passed"] is True
    assert [group["name"] for group in told["groups"]] == ["change", "keep"]
    (found,) = told["groups"][0]["findings"]
    assert found["after"].strip().startswith(TARGET)
    assert len(told["patches"]) == 1


def test_what_fails_is_exit_code_1_and_named(workspace: Path, folder: Path, tmp_path: Path):
    """Without the edit the suite fails: the table, and JUnit XML, say which question."""
    (tmp_path / "suite.yaml").write_text(SUITE)
    result = run("check", "--model", folder, "--junit", "out.xml", cwd=tmp_path)
    assert result.code == 1
    assert "without patches" in result.out
    assert "failed: must change" in result.out
    (suite,) = ElementTree.parse(tmp_path / "out.xml").getroot()
    failures = [case.attrib["name"] for case in suite if case.find("failure") is not None]
    assert failures == [FRANCE[1]]
    assert float(suite.attrib["time"]) > 0
    (patch,) = (workspace / ".knowpatch" / "patches").glob("*.safetensors")
    assert run("check", "--model", folder, "--patch", patch, cwd=tmp_path).code == 0


def test_a_first_suite_is_written_and_passes(workspace: Path):
    """--make writes one that `check` reads, and never over one that is there."""
    result = run("check", "first.yaml", "--make", cwd=workspace)
    assert result.code == 0, result
    assert "first.yaml: 1 question(s) that must change, " in result.out
    again = run("check", "first.yaml", "--json", cwd=workspace)
    told = again.json()
    names = [group["name"] for group in told["groups"]]
    assert names[:3] == ["change", "keep", "perplexity"]
    assert told["groups"][0]["passed"]
    assert again.code == (0 if told["passed"] else 1)
    assert refuse("check", "first.yaml", "--make", cwd=workspace).startswith(
        "first.yaml: exists already"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
        (["bad.yaml"], "bad.yaml: unknown field 'kep': did you mean 'keep'?"),
        (["asks.yaml"], "gone.jsonl: no such file"),
        (["suite.yaml", "--junit", "no/where.xml"], "no: no such folder"),
        (["suite.yaml", "--junit", "."], ".: is a folder; name a file as --junit"),
        (["suite.yaml", "--junit", "no/where.xml"], "make it first, or name another --junit"),
        (["suite.yaml", "--junit", "bad.yaml/x"], "bad.yaml: is a file, not a folder"),
        (["suite.yaml", "--junit", "./suite.yaml"], "suite.yaml: is the suite itself"),
        (["no/new.yaml", "--make"], "make it first, or name another SUITE"),
        (["suite.yaml", "--patch", "nowhere"], "nowhere: no such patch file"),
        (["new.yaml", "--make", "--model", "MODEL"], "no edit to make a suite of"),
    ],
)
def test_bad_input_is_one_line(folder: Path, tmp_path: Path, arguments: list[str], says: str):
    """Refused before the model is loaded, and nothing is written."""
    (tmp_path / "suite.yaml").write_text(SUITE)
    (tmp_path / "bad.yaml").write_text("kep: [a]")
    (tmp_path / "asks.yaml").write_text("multiple_choice: {fall: 0.1, file: gone.jsonl}")
    given = [str(folder) if item == "MODEL" else item for item in arguments]
    assert says in refuse("check", *given, cwd=tmp_path)


def test_what_writes_nothing_works_in_a_closed_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Only with --junit is a place asked for that can be written to."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # for root every folder is open
    assert refuse("check", "gone.yaml", cwd=tmp_path) == "gone.yaml: no such file"
    line = refuse("check", "gone.yaml", "--junit", "x.xml", cwd=tmp_path)
    assert line.endswith("cannot be written to; name another place as --junit")


def test_a_made_suite_is_plain_yaml(workspace: Path):
    """It opens with what it is; questions stand one under the other."""
    run("check", "plain.yaml", "--make", cwd=workspace)
    text = (workspace / "plain.yaml").read_text()
    assert text.startswith("# What must hold of the edited model")
    assert f"- prompt: {FRANCE[1]}\n  answer: {TARGET}\n" in text
    assert json.dumps(text)  # no letter that is none
    assert "plain.yaml" in files(workspace)


# -- an edit that a suite guards -------------------------------------------------------------------


def test_an_edit_that_the_suite_lets_is_kept(folder: Path, tmp_path: Path):
    """As without a guard, with a line that says so."""
    (tmp_path / "suite.yaml").write_text(SUITE)
    here = (*FRANCE, *LEARN, "--model", folder, "--guard", "suite.yaml")
    result = run(*here, "--out", "fix.safetensors", cwd=tmp_path)
    assert result.code == 0, result
    assert "guard   suite.yaml passed" in result.out
    assert (tmp_path / "fix.safetensors").is_file()


def test_an_edit_that_fails_the_suite_is_taken_back(workspace: Path):
    """On top of what is live: nothing is recorded, exit code 1, and the failing check is named."""
    guarded = workspace / "strict.yaml"
    guarded.write_text(f"{SUITE.rstrip()[:-1]}, {{prompt: {NILE}, answer: Egypt}}]")
    before = {name: c for name, c in files(workspace).items() if ".knowpatch" in name}
    again = ("edit", NILE, "--subject", "Nile", "--target", "Tokyo", *LEARN)
    result = run(*again, "--guard", "strict.yaml", cwd=workspace)
    assert result.code == 1, result
    assert "must change      1 of 1 hold" in result.out  # which is live
    assert "failed: must not change" in result.out
    assert "the edit was taken back: nothing was kept" in result.out
    told = run(*again, "--guard", "strict.yaml", "--json", cwd=workspace)
    assert told.code == 1
    assert told.json()["guard"]["passed"] is False
    assert told.json()["patches"] == []
    assert {n: c for n, c in files(workspace).items() if ".knowpatch" in n} == before


def test_of_a_sequence_that_fails_nothing_is_left(folder: Path, tmp_path: Path):
    """Patches that came as files one after the other are removed again."""
    (tmp_path / "suite.yaml").write_text("perplexity: {rise: 0}\nkeep: [{prompt: a, answer: zz}]")
    request = {"prompt": FRANCE[1], "subject": "France", "target": TARGET}
    (tmp_path / "facts.json").write_text(json.dumps([request]))
    sequence = ("edit", "--from", "facts.json", "--sequential", *LEARN, "--model", folder)
    result = run(*sequence, "--guard", "suite.yaml", cwd=tmp_path)
    assert result.code == 1, result
    assert set(files(tmp_path)) == {"suite.yaml", "facts.json"}


def test_a_guard_that_is_no_suite_is_refused_before_the_work(folder: Path, tmp_path: Path):
    """One line, no model loaded."""
    line = refuse(*FRANCE, "--model", folder, "--guard", "nowhere.yaml", cwd=tmp_path)
    assert line == "nowhere.yaml: no such file"


def test_another_model_is_checked_as_it_is(
    workspace: Path, folders: Callable[..., Path], caplog: pytest.LogCaptureFixture
):
    """What an export wrote, say: named on purpose, it is asked without the live edits, and that it
    is another is said. The workspace's own model has to be the one that its edits are of."""
    other = folders("gpt2")
    result = run("check", "--model", other, "--json", cwd=workspace)
    assert result.code == 1
    assert "checked as it is, without edits" in caplog.text
    told = result.json()
    assert (told["patches"], told["workspace"]) == ([], None)
    line = refuse("check", "new.yaml", "--make", "--model", other, cwd=workspace)
    assert line.startswith("no edit to make a suite of")
