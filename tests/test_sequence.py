"""Edits one after the other: a folder of patches, made in order and gone on with; and its verbs."""

from __future__ import annotations

import json

import pytest
import tiny
from made import state
from shell import FRANCE as ONE
from shell import files, refuse, run

from knowpatch.editing import choose, edit, edit_in_turn
from knowpatch.errors import EditError, InputError
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

OPTIONS = {"layer": 0, "moments": "identity", "kl_factor": 0, "steps": 5, "contexts": 2}
FRANCE, JAPAN, NILE = FACTS = [
    EditRequest(prompt=prompt, subject=subject, target=tiny.EDITS[prompt])
    for prompt, subject in zip(tiny.EDITS, ("France", "Japan", "Nile"), strict=True)
]
NAMES = ["000001.safetensors", "000002.safetensors", "000003.safetensors"]
ROME = ("--method", "rome", *(f"--set={name}={value}" for name, value in OPTIONS.items()))


def _rome(**more):
    return choose("rome", {**OPTIONS, **more})


def _stats(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_patch_for_each_request_on_top_of_the_earlier_ones(known, tmp_path):
    """In order, each in a file of its own, as it is made with the earlier ones live."""
    model, told = known(), []
    before = state(model)

    def tell(stage, done, total):
        told.append((done, total))

    patches = edit_in_turn(model, FACTS, tmp_path / "out", method=_rome(), progress=tell)
    assert state(model) == before
    assert model.live == ()
    assert [patch.provenance.requests for patch in patches] == [(fact,) for fact in FACTS]
    assert sorted(_stats(tmp_path / "out")) == NAMES
    assert [Patch.load(tmp_path / "out" / name) for name in NAMES] == patches
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    with model.applied(patches[0]):
        assert edit(model, JAPAN, method=_rome()) == patches[1]
    assert edit(model, JAPAN, method=_rome()) != patches[1]


def test_what_is_there_is_not_made_again(known, tmp_path):
    """A second call gives the same patches and writes no file; a longer list adds to the folder."""
    model, method = known(), _rome()
    first = edit_in_turn(model, FACTS[:2], tmp_path, method=method)
    made = _stats(tmp_path)
    assert edit_in_turn(model, FACTS[:2], tmp_path, method=method) == first
    assert _stats(tmp_path) == made
    assert edit_in_turn(known(), FACTS, tmp_path, method=_rome())[:2] == first
    assert {name: _stats(tmp_path)[name] for name in made} == made
    assert sorted(_stats(tmp_path)) == NAMES


def test_a_run_that_was_stopped_goes_on(known, tmp_path):
    """Stopped after the first request: one file, the model as it was; then the very same files."""

    def stop(stage, done, total):
        if done == 1:
            raise KeyboardInterrupt

    edit_in_turn(known(), FACTS, tmp_path / "whole", method=_rome())
    model = known()
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        edit_in_turn(model, FACTS, tmp_path / "parts", method=_rome(), progress=stop)
    assert state(model) == before
    assert model.live == ()
    assert sorted(files(tmp_path / "parts")) == NAMES[:1]
    edit_in_turn(model, FACTS, tmp_path / "parts", method=_rome())
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_folder_with_other_patches_is_refused(known, tmp_path):
    """Another request, option, seed or model: one line with the file, which stays as it is."""
    edit_in_turn(known(), [FRANCE], tmp_path, method=_rome())
    there = files(tmp_path)
    seeded = choose("rome", OPTIONS, seed=1)
    for architecture, fact, method, said in (
        ("llama", JAPAN, _rome(), "another edit"),
        ("llama", FRANCE, _rome(steps=6), "another edit"),
        ("llama", FRANCE, seeded, "another edit"),
        ("gpt2", FRANCE, _rome(), "another model"),
    ):
        model = known(architecture)
        before = state(model)
        with pytest.raises(InputError, match=rf"0001\.safetensors: .* {said}") as caught:
            edit_in_turn(model, [fact], tmp_path, method=method)
        assert "\n" not in str(caught.value)
        assert state(model) == before
    assert files(tmp_path) == there


def test_an_edit_that_fails_is_named(known, tmp_path):
    """By its number and prompt; the model is given back, and no file is left."""
    model, options = known(), {"layers": [0], "tokens": 1000, "null_share": 0.5, "steps": 5}
    method = choose("betaedit", {**options, "largest": 1e-6})
    with pytest.raises(EditError, match=rf"^request 1, '{FRANCE.prompt}': the change of block 0"):
        edit_in_turn(model, FACTS, tmp_path, method=method)
    assert model.live == ()
    assert not files(tmp_path)


@pytest.fixture(scope="module")
def told(folder, tmp_path_factory):
    """Two requests of a file, edited one after the other, as JSON; and where."""
    cwd = tmp_path_factory.mktemp("sequence")
    facts = [fact.model_dump(include={"prompt", "subject", "target"}) for fact in FACTS[:2]]
    (cwd / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    ask = ("edit", "--from", "facts.jsonl", "--sequential", *ROME, "--model", folder, "--json")
    return run(*ask, cwd=cwd), cwd


def test_sequential_requests_of_a_file(told):
    """JSON lists the patches of the folder in order; the exit code says whether all took."""
    result, cwd = told
    found = result.json()
    assert result.code == (0 if found["took"] else 1)
    assert found["took"] is all(found["took_each"])
    assert (len(found["took_each"]), found["room"], found["restored"]) == (2, None, True)
    assert "patch" not in found
    assert [patch["file"] for patch in found["patches"]] == [f"patches/{n}" for n in NAMES[:2]]
    for item, fact in zip(found["patches"], FACTS, strict=False):
        patch = Patch.load(cwd / item["file"])
        assert (patch.id, patch.rank) == (item["id"], item["rank"])
        assert patch.provenance.requests == (fact,)
        assert item["bytes"] == (cwd / item["file"]).stat().st_size
    assert sorted(files(cwd)) == ["facts.jsonl", *(f"patches/{name}" for name in NAMES[:2])]


def test_sequential_with_one_prompt_tells_the_room(folder, tmp_path):
    """Without --from as well; a method that knows its limits says how many more facts fit."""
    options = {"layers": 0, "null_share": 0.5, "tokens": 1000, "steps": 5}
    settings = [f"--set={name}={value}" for name, value in options.items()]
    command = (*ONE, "--sequential", "--method", "alphaedit", *settings, "--out", "here")
    result = run(*command, "--model", folder, "--json", cwd=tmp_path)
    assert result.code in (0, 1)
    assert result.json()["room"] > 0
    assert list(files(tmp_path)) == [f"here/{NAMES[0]}"]


def test_a_folder_of_patches_is_asked_and_shipped(told, folder, tmp_path):
    """`ask --patch DIR` and `export --patch DIR` take all patches of the folder, in order."""
    ids = [patch["id"] for patch in told[0].json()["patches"]]
    more = ("--patch", told[1] / "patches", "--model", folder, "--json")
    assert run("ask", FRANCE.prompt, *more, cwd=tmp_path).json()["patches"] == ids
    shipped = run("export", "--to", "merged", "merged", *more, cwd=tmp_path).json()
    assert shipped["patches"] == ids
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_what_is_refused_before_loading(tmp_path):
    """A file where a folder should be, and an empty folder; there is no such model to load."""
    (tmp_path / "fix.safetensors").write_bytes(b"mine")
    (tmp_path / "empty").mkdir()
    none = ("--model", "no-such-model")
    line = refuse(*ONE, "--sequential", "--out", "fix.safetensors", *none, cwd=tmp_path)
    assert line.startswith("fix.safetensors: is a file")
    for command in (("ask", FRANCE.prompt), ("export", "--to", "merged", "out")):
        line = refuse(*command, "--patch", "empty", *none, cwd=tmp_path)
        assert line.startswith("empty: a folder without patches")


ONCE = '''
from knowpatch.method import EditMethod, register


@register("once")
class Once(EditMethod):
    """Changes nothing, and that only once."""

    name = "once"
    family = "external"
    paper = summary = choose = "none"
    sequential = False

    def edit(self, view, requests, prepared, state):
        return self.patch(view, requests)
'''


def test_a_method_without_a_sequential_mode(tmp_path, tmp_path_factory, monkeypatch):
    """Is refused with --sequential, by name."""
    plugins = tmp_path_factory.mktemp("plugins")
    (plugins / "once.py").write_text(ONCE, encoding="utf-8")
    monkeypatch.setenv("KNOWPATCH_METHODS", str(plugins))
    line = refuse(*ONE, "--sequential", "--method", "once", "--model", "none", cwd=tmp_path)
    assert line == "once has no sequential mode"
