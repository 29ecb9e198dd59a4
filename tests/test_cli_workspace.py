"""The commands of a workspace, as their users meet them, on a tiny model that knows tiny.FACTS."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ledgers import filled
from shell import FRANCE, TARGET, Result, files, refuse, run

from knowpatch.ledger import Workspace
from knowpatch.ledger.store import TEXT

LEARN = ("--set", "learning_rate=0.01")
NILE = ("edit", "The Nile flows through", "--subject", "Nile", "--target", "Tokyo")
NOWHERE = "no .knowpatch here or above; run knowpatch init"
LIGHT = [["log"], ["log", "--events"], ["show", "ID"], ["verify"]]
"""Verbs that need no model, with what they take."""


def ids(cwd: Path) -> list[str]:
    """All edits, the newest first."""
    return [edit["id"] for edit in run("log", "--json", cwd=cwd).json()]


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """A workspace with one edit that took, as JSON."""
    cwd = tmp_path_factory.mktemp("workspace")
    assert run("init", "--model", folder, cwd=cwd).code == 0
    said = ("-m", "readers complain", "--author", "Anna", "--source", "ticket 7")
    return run(*FRANCE, *LEARN, *said, "--json", cwd=cwd), cwd


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of many edits that no method made; not to be written to."""
    cwd = tmp_path_factory.mktemp("synthetic")
    filled(cwd, 40)
    return cwd


# -- recording -------------------------------------------------------------------------------------


def test_an_edit_in_a_workspace_is_recorded(made: tuple[Result, Path]):
    """The patch is in the workspace and nowhere else; who, why, from where and the scores, too."""
    result, cwd = made
    assert result.code == 0
    told = result.json()
    assert told["took"] is True
    workspace = Workspace(cwd / ".knowpatch")
    (edit,) = workspace.live()
    assert told["workspace"]["recorded"] == told["workspace"]["live"] == [edit.id]
    assert told["workspace"]["head"] == workspace.history.head
    assert told["patch"]["id"] == edit.id
    assert not [name for name in files(cwd) if not name.startswith(".knowpatch")]
    names = ("author", "reason", "source", "method")
    recorded = [edit.recorded[name] for name in names]
    assert recorded == ["Anna", "readers complain", "ticket 7", "ft"]
    assert edit.recorded["config"]["learning_rate"] == 0.01
    report = workspace.report(edit)
    assert report is not None
    assert report["probes"] == told["probes"]


def test_the_next_edit_is_made_on_top_and_both_answer(made: tuple[Result, Path], folder: Path):
    """before is with the first edit live; afterwards ask gives both answers, and says why."""
    _, cwd = made
    below = cwd / "deep" / "er"
    below.mkdir(parents=True)
    told = run(*NILE, *LEARN, "--json", cwd=below).json()
    before = {p["prompt"]: p["before"]["text"] for p in told["probes"] if not p["chat"]}
    assert before["The capital of France is"].strip().startswith(TARGET)
    for prompt, answer in (("The capital of France is", TARGET), (NILE[1], "Tokyo")):
        said = run("ask", prompt, "--json", "--max-new-tokens", 1, cwd=below).json()
        assert said["with"] == answer != said["without"]
        assert said["patches"] == ids(cwd)[::-1]
    text = run("ask", NILE[1], "--max-new-tokens", 1, cwd=cwd).out
    assert "with the 2 live edits of this workspace" in text
    outside = run("ask", NILE[1], "--json", "--model", folder, cwd=cwd.parent).json()
    assert outside["with"] is None


def test_a_sequence_is_recorded_turn_by_turn(folder: Path, tmp_path: Path):
    """One edit for each request, each on top of the earlier; nothing is left of the work."""
    run("init", "--model", folder, cwd=tmp_path)
    requests = [
        {"prompt": prompt, "subject": subject, "target": target}
        for prompt, subject, target in (
            (FRANCE[1], FRANCE[3], TARGET),
            (NILE[1], NILE[3], NILE[5]),
        )
    ]
    (tmp_path / "facts.json").write_text(json.dumps(requests))
    result = run("edit", "--from", "facts.json", "--sequential", *LEARN, "--json", cwd=tmp_path)
    assert result.json()["took_each"] == [True, True]
    workspace = Workspace(tmp_path / ".knowpatch")
    first, second = workspace.live()
    assert [edit.recorded["turn"] for edit in (first, second)] == [0, 1]
    assert first.recorded["source"] == "facts.json"
    assert workspace.history.beneath(second) == [first]
    report = workspace.report(second)
    own = {p["prompt"] for p in workspace.probes(second, report) if p["kind"] == "rewrite"}
    assert own == {NILE[1]}
    assert not list((workspace.folder / "work").iterdir())
    assert run("verify", cwd=tmp_path).code == 0


# -- reading ---------------------------------------------------------------------------------------


def test_log_is_a_table_of_the_newest(synthetic: Path):
    """id, time, author, method, state, prompt and target, and the reason, one line to an edit."""
    lines = run("log", cwd=synthetic).out.splitlines()
    head = ["id", "time", "author", "method", "state", "prompt → target", "reason"]
    assert lines[0].split() == " ".join(head).split()
    newest = ids(synthetic)[0]
    assert lines[1].startswith(newest[:12])
    for part in ("Anna", "by hand", "live", "The capital of country 39 is → city 39", "why 39"):
        assert part in lines[1]
    assert len(lines) == 32
    assert lines[-1].startswith("... and 10 earlier")
    assert len(run("log", "-n", 3, cwd=synthetic).out.splitlines()) == 5
    assert len(run("log", "--all", cwd=synthetic).out.splitlines()) == 41
    assert len(ids(synthetic)) == 40
    assert len(run("log", "--events", "--json", cwd=synthetic).json()) == 41


def test_show_tells_all_that_is_recorded(made: tuple[Result, Path]):
    """By the beginning of an id: request, options, author, reason, what changed, what was said."""
    _, cwd = made
    edit_id = ids(cwd)[-1]
    out = run("show", edit_id[:8], cwd=cwd).out
    for part in (edit_id, "Anna", "readers complain", "ticket 7", "learning_rate=0.01", TARGET):
        assert part in out
    told = run("show", edit_id[:8], "--json", cwd=cwd).json()
    assert told["patch"] == edit_id
    assert told["state"] == "live"
    assert {probe["kind"] for probe in told["probes"]} >= {"rewrite", "locality.control"}


def test_verify_names_what_is_broken(synthetic: Path, tmp_path: Path):
    """Sound: exit code 0. A changed event: exit code 1 and its number; --repair mends it."""
    assert run("verify", cwd=synthetic).code == 0
    told = run("verify", "--json", cwd=synthetic).json()
    assert (told["sound"], told["edits"], told["events"]) == (True, 40, 41)
    workspace = filled(tmp_path, 3)
    text = workspace.folder / TEXT
    text.write_bytes(text.read_bytes().replace(b"why 1", b"WHY 1"))
    result = run("verify", cwd=tmp_path)
    assert result.code == 1
    assert f"broken  {TEXT}: event 3 was changed" in result.out
    assert "event 3 was changed" in result.out
    result = run("verify", "--repair", cwd=tmp_path)
    assert result.code == 0
    assert "mended" in result.out
    assert run("log", "--json", cwd=tmp_path).json()[1]["reason"] == "why 1"


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_outside_a_workspace_is_told_in_one_line(arguments: list[str], tmp_path: Path):
    """And nothing is made."""
    assert refuse(*arguments, cwd=tmp_path) == NOWHERE


@pytest.mark.parametrize(
    "option",
    [
        ("-m", "x"),
        ("--author", "x"),
        ("--source", "x"),
        ("--valid-from", "2026-01-01"),
        ("--valid-until", "2026-01-01"),
    ],
    ids=" ".join,
)
def test_what_only_a_workspace_can_keep_is_refused_outside(option: tuple[str, ...], tmp_path: Path):
    """Before the model is loaded."""
    assert NOWHERE in refuse(*FRANCE, *option, cwd=tmp_path)


def test_bad_days_and_empty_reasons_are_refused(tmp_path: Path):
    """A day that is none, days in the wrong order, a reason of blanks."""
    run("init", "--model", "some/model", cwd=tmp_path)
    assert "YYYY-MM-DD" in refuse(*FRANCE, "--valid-from", "tomorrow", cwd=tmp_path)
    days = ("--valid-from", "2026-02-01", "--valid-until", "2026-01-01")
    assert "is before" in refuse(*FRANCE, *days, cwd=tmp_path)
    assert "reason is empty" in refuse(*FRANCE, "-m", " ", cwd=tmp_path)
    assert "UTF-8" in refuse("init", "--author", "\ud800", cwd=tmp_path / ".knowpatch")
    assert "exists already" in refuse("init", cwd=tmp_path)
    assert "no such model" in refuse("init", "x", "--model", "./nowhere", cwd=tmp_path)
    assert "is for some/model" in refuse(*FRANCE, "--model", "other/model", cwd=tmp_path)


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_what_needs_no_model_loads_no_torch(arguments: list[str], synthetic: Path):
    """Nor transformers: these verbs answer at once."""
    words = [ids(synthetic)[0] if word == "ID" else word for word in arguments]
    code = (
        "import sys\nfrom knowpatch.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit as end: assert not end.code, end.code\n"
        "sys.exit(int(bool({'torch', 'transformers'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=synthetic, capture_output=True)
    assert done.returncode == 0, done.stderr
