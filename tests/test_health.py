"""What a history has done to a model, on a tiny model that knows tiny.FACTS."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
from made import state
from shell import FRANCE, refuse, run

from knowpatch.ask import Ask
from knowpatch.checks import health
from knowpatch.checks.health import Examination, chosen
from knowpatch.cli import screen
from knowpatch.editing import edit, load
from knowpatch.probes import controls
from knowpatch.request import EditRequest

LEARN = ("--set", "learning_rate=0.01")
NILE = ("edit", "The Nile flows through", "--subject", "Nile", "--target", "Tokyo")


@pytest.fixture(scope="module")
def workspace(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with two edits of weights."""
    cwd = tmp_path_factory.mktemp("workspace")
    run("init", "--model", folder, cwd=cwd)
    for one in (FRANCE, NILE):
        assert run(*one, *LEARN, cwd=cwd).code == 0
    return cwd


def test_vitals_are_what_a_plain_count_gives(folder: Path):
    """Drift by letting the model answer anew; norms by subtracting; the model is given back."""
    model = load(str(folder))
    request = EditRequest(prompt=FRANCE[1], subject="France", target=tiny.EDITS[FRANCE[1]])
    patch = edit(model, request, method="ft", options={"learning_rate": 0.01})
    (name,) = [delta.address.parameter for delta in patch.deltas]
    before = state(model)
    examination = Examination(model, [name])
    bare, edited = examination.vitals([]), examination.vitals([patch])
    examination.close()
    assert state(model) == before
    assert (bare.moved, bare.change, bare.growth) == (0, 0.0, 0.0)

    def answers() -> list[str]:
        ask = Ask(model)
        said = [ask.generate(prompt, max_new_tokens=5) for prompt in controls()]
        return [one.result().text for one in said]

    old, base = answers(), model.view.parameter(name).detach().clone().double()
    with model.applied(patch):
        moved = sum(a != b for a, b in zip(old, answers(), strict=True))
        now = model.view.parameter(name).detach().double()
        assert edited.change == pytest.approx(float((now - base).norm() / base.norm()))
        assert edited.growth == pytest.approx(float(now.norm() / base.norm()) - 1)
    assert edited.moved == moved > 0
    assert edited.asked == len(controls())
    assert edited.perplexity != bare.perplexity
    assert examination.known([patch.id]) == edited
    assert examination.known(["another"]) is None


def test_a_workspace_is_told_state_by_state(workspace: Path, monkeypatch: pytest.MonkeyPatch):
    """The model as it came, then a row for each edit; a second run measures nothing."""
    told = run("health", "--json", cwd=workspace).json()["states"]
    assert [(one["recorded"], len(one["live"])) for one in told] == [(0, 0), (1, 1), (2, 2)]
    assert told[0]["drift"] == told[0]["change"] == 0
    assert 0 < told[1]["change"] < told[2]["change"]

    def never(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(health.Examination, "vitals", never)
    result = run("health", "--out", "health.png", cwd=workspace)
    assert result.code == 0, result
    lines = result.out.splitlines()
    assert lines[0].split() == ["edits", "live", "perplexity", "drift", "change", "norm", "after"]
    assert lines[1].endswith("the model as it came")
    assert "picture health.png" in result.out
    assert (workspace / "health.png").read_bytes().startswith(b"\x89PNG")
    fewer = run("health", "--points", 2, "--json", cwd=workspace).json()["states"]
    assert [one["recorded"] for one in fewer] == [0, 2]


def test_chosen_points_are_even_and_keep_the_ends():
    """All where there are few; else evenly spaced, with the last one."""
    assert chosen(3, 5) == [0, 1, 2]
    assert chosen(11, 3) == [0, 5, 10]
    assert chosen(7, 1) == [6]


def test_shares_are_told_in_plain_figures():
    """Two of them, and all from a hundred per cent on."""
    told = [screen.percent(share) for share in (0.0, 0.00412, 0.5, 1.987, 12.0)]
    assert told == ["0 %", "0.41 %", "50 %", "199 %", "1200 %"]
    assert screen.percent(-1.21, sign="+") == "-121 %"
    assert screen.percent(0.002, sign="+") == "+0.2 %"


def test_bad_input_is_one_line(workspace: Path, folder: Path, tmp_path: Path):
    """No workspace, no edit, no picture's name."""
    assert refuse("health", cwd=tmp_path).startswith("no .knowpatch here or above")
    assert "ends in .png or .svg" in refuse("health", "--out", "a.pdf", cwd=workspace)
    run("init", "--model", folder, cwd=tmp_path)
    assert refuse("health", cwd=tmp_path).startswith("no edit yet")
    shutil.rmtree(tmp_path / ".knowpatch")
