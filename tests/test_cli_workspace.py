"""The commands of a workspace, as their users meet them, on a tiny model that knows tiny.FACTS."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import tiny
from ledgers import filled, patch, record
from shell import FRANCE, TARGET, Result, files, refuse, run

from knowpatch.ledger import Circumstances, Workspace
from knowpatch.ledger.place import same_model
from knowpatch.ledger.store import TEXT
from knowpatch.models.origin import BUNDLED

# Nothing is spared, so that edits about different subjects meet.
LEARN = ("--set", "learning_rate=0.01", "--set", "others=0")
NILE = ("edit", "The Nile flows through", "--subject", "Nile", "--target", "Tokyo")
NOWHERE = "no .knowpatch here or above; run knowpatch init"
CAIRO = ("edit", "The capital of France is", "--subject", "France", "--target", "Cairo")
JAPAN = ("edit", "The capital of Japan is", "--subject", "Japan", "--target", "Paris")
LIGHT = [
    ["log"],
    ["log", "--events"],
    ["show", "ID"],
    ["verify"],
    ["diff", "--weights"],
    ["tag"],
    ["tag", "v1"],
    ["gc"],
    ["trust"],
    ["revert", "ID"],
    ["apply", "ID"],
    ["replay"],
]
"""Verbs that need no model, with what they take, in an order in which each can be done."""


def ids(cwd: Path) -> list[str]:
    """All edits, the newest first."""
    return [edit["id"] for edit in run("log", "--json", cwd=cwd).json()]


def ids_on(day: str, cwd: Path) -> list[str]:
    """Those that are live on a day."""
    return [edit["id"] for edit in run("log", "--on", day, "--json", cwd=cwd).json()]


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
    for words in (("-n", 2), ("-n", 2, "--events")):
        assert len(run("log", "--json", *words, cwd=synthetic).json()) == 2


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
    for option in ("--reason", "--author", "--source"):  # found before the model is loaded
        assert "not text in UTF-8" in refuse(*FRANCE, option, "\udcff", cwd=tmp_path)
    assert "source is empty" in refuse(*FRANCE, "--source", " ", cwd=tmp_path)
    assert "UTF-8" in refuse("init", "--author", "\ud800", cwd=tmp_path / ".knowpatch")
    assert "exists already" in refuse("init", cwd=tmp_path)
    assert "no such model" in refuse("init", "x", "--model", "./nowhere", cwd=tmp_path)
    assert "is for some/model" in refuse(*FRANCE, "--model", "other/model", cwd=tmp_path)


def test_a_workspace_is_made_for_a_model_that_can_be_there(folder: Path, tmp_path: Path):
    """A path to nowhere, or no name, is refused; what is taken for a hub id is so called."""
    (tmp_path / "file").write_text("x")
    for model, says in (("", "name is empty"), ("gone.gguf", "no such GGUF"), ("file", "a .gguf")):
        assert says in refuse("init", "--model", model, cwd=tmp_path)
    assert refuse("init", "file", cwd=tmp_path) == "file: is a file; name a folder"
    assert "hub id" in run("init", "--model", "misspelt", cwd=tmp_path).out
    (tmp_path / "in").mkdir()
    assert "hub id" not in run("init", "in", "--model", folder, cwd=tmp_path).out


def test_a_model_is_the_workspaces_however_it_is_spelt(folder: Path, tmp_path: Path):
    """From below, from the folder itself, as a whole path; another is refused before it is read."""
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "sub").mkdir()
    run("init", "--model", "m", cwd=tmp_path)
    for place, name in (("sub", "../m"), (".", "./m"), (".", "m/"), (".", tmp_path / "m")):
        result = run(*FRANCE, "--model", name, "--dry-run", cwd=tmp_path / place)
        assert result.code == 0, result
    assert "is for m" in refuse(*FRANCE, "--model", folder, "--dry-run", cwd=tmp_path)
    root = tmp_path / "sub"
    assert same_model(BUNDLED, None, root)
    assert same_model(BUNDLED, BUNDLED, root)
    assert not same_model("some/model", None, root)


def test_a_closed_workspace_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An edit that could not be recorded is not computed."""
    run("init", "--model", "some/model", cwd=tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # for root every folder is open
    line = refuse(*FRANCE, cwd=tmp_path)
    assert line == f"{tmp_path}/.knowpatch: cannot be written to; nothing can be recorded here"


def test_what_is_told_counts_right(tmp_path: Path):
    """One event is not many; no live edit is not no edit; a tag is no option."""
    workspace = filled(tmp_path, 0)
    assert "; 1 event, 0 edits (0 live), head " in run("verify", cwd=tmp_path).out
    assert "no edit yet" in run("log", "--live", cwd=tmp_path).out
    edit = record(workspace, patch(1, weights=True), valid_from=date(2030, 1, 1))
    assert "; 2 events, 1 edit (1 live), head " in run("verify", cwd=tmp_path).out
    line = "no edit is live on 2029-12-31; knowpatch log lists all\n"
    assert run("log", "--on", "2029-12-31", cwd=tmp_path).out == line
    assert "1 parameter (block.weight), rank 1" in run("show", edit.id[:9], cwd=tmp_path).out
    assert "cannot be a tag" in refuse("tag", "--", "-x", cwd=tmp_path)
    assert "either --events" in refuse("log", "--events", "--live", cwd=tmp_path)


def test_what_needs_no_model_loads_no_torch(tmp_path: Path):
    """Nor transformers: these verbs answer at once."""
    filled(tmp_path, 3)
    words = [[ids(tmp_path)[0] if word == "ID" else word for word in verb] for verb in LIGHT]
    code = (
        "import sys\nfrom knowpatch.cli import main\n"
        f"for words in {words!r}:\n"
        "    try: main(words)\n    except SystemExit as end: assert not end.code, words\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules), words\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr


# -- what is done to edits -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with two edits of weights, the second on top of the first; tagged v1."""
    cwd = tmp_path_factory.mktemp("two")
    run("init", "--model", folder, cwd=cwd)
    assert run(*FRANCE, *LEARN, cwd=cwd).code == 0
    assert run(*NILE, *LEARN, cwd=cwd).code == 0
    assert run("tag", "v1", cwd=cwd).code == 0
    return cwd


@pytest.fixture
def copy(two: Path, tmp_path: Path) -> Path:
    """A copy of that workspace, to be written to."""
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_what_was_edited_is_not_edited_again_unawares(copy: Path):
    """The same prompt, and a rewording of it: refused, before any model is loaded."""
    first = ids(copy)[-1]
    for words in (CAIRO, ("edit", "France's capital is", *CAIRO[2:])):
        line = refuse(*words, cwd=copy)
        assert first[:12] in line
        assert "--replace takes it back, --force keeps both" in line
    assert "--replace or --force" in refuse(*CAIRO, "--replace", "--force", cwd=copy)
    days = ("--valid-until", "2030-01-01", "--replace")
    assert "use --force" in refuse(*CAIRO, *days, cwd=copy)


def test_replace_is_made_without_the_old_edit_and_force_above_it(copy: Path):
    """With --replace the old answer is that of the model without the old edit."""
    second, first = ids(copy)
    told = run(*CAIRO, *LEARN, "--replace", "--json", cwd=copy).json()
    (new,) = told["workspace"]["recorded"]
    assert told["workspace"]["replaced"] == [first]
    assert told["workspace"]["live"] == [second, new]
    rewrite = next(p for p in told["probes"] if p["kind"] == "rewrite" and not p["chat"])
    assert not rewrite["before"]["text"].strip().startswith(TARGET)
    workspace = Workspace(copy / ".knowpatch")
    assert [edit.id for edit in workspace.history.beneath(workspace.history.edit(new))] == [second]
    assert run("revert", "--to", "v1", "--no-ask", cwd=copy).code == 0
    told = run(*CAIRO, *LEARN, "--force", "--json", cwd=copy).json()
    rewrite = next(p for p in told["probes"] if p["kind"] == "rewrite" and not p["chat"])
    assert rewrite["before"]["text"].strip().startswith(TARGET)
    assert len(told["workspace"]["live"]) == 3


def test_an_edit_that_writes_over_another_is_refused(copy: Path):
    """Another subject and prompt, but the key in the edited layer is so near that the answer to
    the first goes; what is refused leaves no file. Forced, both are kept."""
    second, first = ids(copy)
    run("revert", second, cwd=copy)
    before = files(copy)
    result = run(*JAPAN, *LEARN, cwd=copy)
    assert result.code == 2
    (line,) = result.complaints
    assert first[:12] in line
    assert "key reached" in line
    assert files(copy) == before
    assert run(*JAPAN, *LEARN, "--force", cwd=copy).code == 0
    assert len(ids(copy)) == 3


def test_a_revert_beneath_others_tells_what_flipped_and_replay_mends(copy: Path, folder: Path):
    """Listed are answers of later edits that are right no more; replay computes these anew, in
    the old place, and then nothing is left to do. The base's bytes come back with the last."""
    second, first = ids(copy)
    told = run("revert", first[:9], "-m", "wrong", "--json", cwd=copy).json()
    assert told["reverted"] == [first]
    assert told["live"] == told["leaning"] == [second]
    assert told["exact"] is False
    flipped = [item["edit"] for item in told["flipped"] if not item["right"]]
    assert set(flipped) <= {second}
    assert "would be replayed" in run("replay", "--dry-run", cwd=copy).out
    told = run("replay", "--json", cwd=copy).json()
    (done,) = told["replayed"]
    assert done["edit"] == second
    assert done["took"] == [True]
    alone = run(
        *NILE, *LEARN, "--model", folder, "--out", "x.safetensors", "--json", cwd=copy.parent
    )
    assert done["new"] == alone.json()["patch"]["id"]  # as it would be without the first
    assert "nothing to replay" in run("replay", cwd=copy).out
    told = run("revert", done["new"], "--json", cwd=copy).json()
    assert told["exact"] is True
    assert told["flipped"] is None
    said = run("ask", NILE[1], "--json", cwd=copy).json()
    assert said["with"] is None
    assert run("verify", "--deep", cwd=copy).code == 0


def test_a_lost_patch_is_computed_anew_to_the_same_bytes(copy: Path):
    """From what the history holds; ask refuses until then, and says what to do."""
    first = ids(copy)[-1]
    path = copy / ".knowpatch" / "patches" / f"{first}.safetensors"
    content = path.read_bytes()
    path.unlink()
    assert "is missing" in refuse("ask", FRANCE[1], cwd=copy)
    assert "knowpatch replay makes it again" in run("verify", cwd=copy).out
    told = run("replay", "--json", cwd=copy).json()
    assert told["replayed"] == [{"edit": first, "new": None, "took": [True]}]
    assert path.read_bytes() == content
    assert run("verify", cwd=copy).code == 0


def test_a_damaged_edit_can_be_taken_back(copy: Path):
    """What cannot be asked any more is told; the revert stands all the same."""
    first = ids(copy)[-1]
    (copy / ".knowpatch" / "patches" / f"{first}.safetensors").write_bytes(b"")
    told = run("revert", first, "--json", cwd=copy).json()
    assert first in told["unasked"]
    assert told["flipped"] is None
    assert len(told["live"]) == 1


def test_another_model_is_asked_without_the_live_edits(copy: Path):
    """Named on purpose, it answers plainly, and that it is another is said."""
    tiny.trained("gpt2")[0].save_pretrained(copy / "other")
    tiny.trained("gpt2")[1].save_pretrained(copy / "other")
    result = run("ask", FRANCE[1], "--model", "other", "--json", cwd=copy)
    assert result.json()["with"] is None
    assert result.json()["workspace"] is None
    words = ("edit", "The sky is", "--target", "Rome", "--method", "ice", "--model", "other")
    assert "of the model with fingerprint" in refuse(*words, cwd=copy)


def test_diff_tells_edits_weights_and_answers(copy: Path):
    """Between the base, an edit, a tag and now; weights without a model."""
    second, first = ids(copy)
    told = run("diff", "--json", cwd=copy).json()
    assert (told["only_a"], told["only_b"]) == ([], [first, second])
    assert sum(len(item["edits"]) for item in told["weights"]) == 2
    assert all(item["norm"] > 0 for item in told["weights"])
    moved = {item["prompt"]: (item["a"], item["b"]) for item in told["answers"]["differ"]}
    assert moved[FRANCE[1]][0].strip().startswith("Paris")
    assert moved[FRANCE[1]][1].strip().startswith(TARGET)
    out = run("diff", first[:8], "v1", "--weights", cwd=copy).out
    assert f"+ {second[:12]}" in out
    assert "answers" not in out
    assert "same edits" in run("diff", "v1", "now", "--weights", cwd=copy).out
    assert "tags: v1" in refuse("diff", "v2", cwd=copy)


def test_days_choose_which_edits_answer(copy: Path):
    """A replacement from a day on: until then the old edit answers, from then on the new one."""
    rule = ("--method", "ice", "--valid-from", "2030-01-20", "--replace")
    told = run(*CAIRO, *rule, "--json", cwd=copy).json()
    (new,) = told["workspace"]["recorded"]
    second, first = ids(copy)[1:]
    for day, live in (("2030-01-19", [first, second]), ("2030-01-20", [second, new])):
        said = run("ask", FRANCE[1], "--on", day, "--json", cwd=copy).json()
        assert said["patches"] == live
    lines = run("log", cwd=copy).out.splitlines()
    assert "from 2030-01-20" in lines[1]
    assert "live" in lines[3]
    lines = run("log", "--on", "2031-01-01", cwd=copy).out.splitlines()
    assert [line[:12] for line in lines[1:]] == [new[:12], second[:12]]
    assert "needs a workspace" in refuse("ask", "x", "--on", "2030-01-01", cwd=copy.parent)
    assert f"ends {first[:12]} on 2030-01-19" in run("log", "--events", cwd=copy).out
    run("revert", new, cwd=copy)  # and the old one answers for good
    assert ids_on("2031-01-01", copy) == [second, first]
    assert run("apply", new, cwd=copy).code == 0  # they do not meet: it ends the old one again
    assert ids_on("2031-01-01", copy) == [new, second]


def test_a_patch_file_is_taken_in(copy: Path, tmp_path_factory: pytest.TempPathFactory):
    """As the next edit, its file named as the source; not twice, and not of another model."""
    first = ids(copy)[-1]
    file = copy / ".knowpatch" / "patches" / f"{first}.safetensors"
    line = refuse("apply", file, cwd=copy)
    assert first[:12] in line
    cwd = tmp_path_factory.mktemp("other")
    run("init", "--model", "x/y", cwd=cwd)
    assert run("apply", file, "-m", "from Anna", cwd=cwd).code == 0
    (edit,) = run("log", "--json", cwd=cwd).json()
    assert edit["id"] == first
    assert edit["source"] == file.name
    foreign = filled(tmp_path_factory.mktemp("foreign"), 1)
    (other,) = (foreign.folder / "patches").iterdir()
    assert "another workspace" in refuse("apply", other, cwd=copy)


def test_of_several_none_is_applied_before_all_are_good(copy: Path, tmp_path_factory):
    """A file that is not there, or is live or meets one by then: the edit beside it stays back."""
    second, first = ids(copy)
    run("revert", first, "--no-ask", cwd=copy)
    patches = copy / ".knowpatch" / "patches"
    assert "no such patch file" in refuse("apply", first, "gone.safetensors", cwd=copy)
    live = refuse("apply", first, patches / f"{second}.safetensors", cwd=copy)
    assert f"edit {second[:12]} is live already" in live
    line = refuse("apply", first, patches / f"{first}.safetensors", cwd=copy)
    assert f"edit {first[:12]} is live already" in line
    model = json.loads(run("log", "--events", "--json", cwd=copy).out)[-1]["model"]
    beside = tmp_path_factory.mktemp("beside")
    run(*CAIRO, "--method", "ice", "--model", model, "--out", "x.safetensors", cwd=beside)
    assert first[:12] in refuse("apply", first, beside / "x.safetensors", cwd=copy)


def test_two_that_say_the_same_are_not_applied_together(tmp_path: Path):
    """Unawares; nor does the one take the other back that becomes live in the same step."""
    workspace = filled(tmp_path, 1)
    (first,) = workspace.live()
    second = record(workspace, patch(0, target="another city"))
    run("revert", "--to", "base", cwd=tmp_path)
    for words in ((), ("--replace",)):
        line = refuse("apply", first.id, second.id, *words, cwd=tmp_path)
        assert f"has the words of edit {first.short}" in line
        assert "which is named as well" in line
    told = run("apply", first.id, second.id, "--force", "--json", cwd=tmp_path).json()
    assert told["live"] == [first.id, second.id]
    run("revert", "--to", "base", cwd=tmp_path)
    made = Circumstances(None, valid_from=date(2030, 1, 20))
    new = patch(0, target="a third city")
    workspace.move(applies=[first])
    (third,) = workspace.record([(new, made)], ends={first.id: "2030-01-19"})
    run("revert", "--to", "base", cwd=tmp_path)
    assert run("apply", first.id, third.id, cwd=tmp_path).code == 0


def test_an_edit_is_applied_again_in_its_place(copy: Path):
    """And what would meet another live one by then is refused."""
    second, first = ids(copy)
    run("revert", first, "--no-ask", cwd=copy)
    assert "not live" in refuse("revert", first, cwd=copy)
    told = run("apply", first, "--json", cwd=copy).json()
    assert told["live"] == [first, second]
    run("revert", first, "--no-ask", cwd=copy)
    run(*CAIRO, "--method", "ice", cwd=copy)
    assert "takes it back" in refuse("apply", first, cwd=copy)
    told = run("apply", first, "--replace", "--json", cwd=copy).json()
    assert told["live"] == [first, second]
