"""The runner: modes, rows, failures, memory; and a run that is killed ends in the same rows."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import tiny

from knowpatch.bench import runner as running
from knowpatch.bench.memory import MOST, Budget, Meter, check_room
from knowpatch.bench.plan import Plan, bytes_of, make_plan, read_plan
from knowpatch.bench.runner import Runner
from knowpatch.bench.schema import facts_of, rows_of
from knowpatch.data.case import Case, Probe, accepted
from knowpatch.data.jsonl import write_cases
from knowpatch.edited import EditedModel
from knowpatch.editing import load
from knowpatch.errors import DataError, InputError, OptionError
from knowpatch.models import shared
from knowpatch.models.view import ModelView
from knowpatch.request import EditRequest

METRICS = ("success_tf", "success_exact", "rephrase_tf", "locality_tf", "locality_kl")
FAST = {"name": "ft"}


def _case(number: int, prompt: str, target: str) -> Case:
    subject = next(word for word in prompt.split()[::-1] if word[0].isupper())
    request = EditRequest(prompt=prompt, subject=subject, target=target, old=tiny.FACTS[prompt])
    others = [other for other in tiny.FACTS if other != prompt][:3]
    probes = [Probe("rewrite", prompt, accepted(target), request=0)]
    probes += [Probe("rephrase", f"Therefore {prompt}", accepted(target), request=0)]
    probes += [Probe("locality.other", other, accepted(tiny.FACTS[other])) for other in others]
    return Case(f"case {number}", (request,), tuple(probes))


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    facts = [fact for fact in tiny.FACTS if fact.split()[-2] != "sky" and "plus" not in fact]
    found = [_case(i, prompt, "Berlin") for i, prompt in enumerate(facts)]
    return [*found, *(_case(i + 9, prompt, "Madrid") for i, prompt in enumerate(facts[:4]))]


@pytest.fixture(scope="module")
def data(cases, tmp_path_factory):
    """The cases as a file, which is a dataset."""
    path = tmp_path_factory.mktemp("data") / "facts.jsonl"
    write_cases(cases, path)
    return path


@pytest.fixture
def model(folder) -> EditedModel:
    return load(str(folder))


def _plan(data, **fields) -> Plan:
    given = {"methods": [FAST], "datasets": [str(data)], "metrics": METRICS, "seed": 1}
    return make_plan({**given, **fields})


def _plain(cell_folder) -> list[dict]:
    """Rows without what differs from run to run."""
    lines = (cell_folder / "rows.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("seconds", "peak_mb")}
        for line in lines
    ]


# -- modes -----------------------------------------------------------------------------------------


def test_single_scores_each_case_alone(model, data, cases, tmp_path):
    """A row a case, in order, as the edit alone makes it; and the model is given back."""
    before = model.view.values(next(n for n, _ in model.model.named_parameters())).clone()
    (cell,) = Runner(model, _plan(data), tmp_path).run()
    rows = rows_of(cell.folder)
    assert [(row.index, row.case) for row in rows] == [(i, c.id) for i, c in enumerate(cases)]
    assert all(row.final and row.edits == 1 and row.age == 0 and not row.error for row in rows)
    assert {name for row in rows for name in row.scores} == set(METRICS)
    success = [row.scores["success_tf"] for row in rows]
    assert [score.after[""] for score in success] == [(1.0,)] * len(rows)
    assert all(score.before[""][0] < 1.0 for score in success)
    assert all(len(row.scores["locality_tf"].after["other"]) == 3 for row in rows)
    assert all(row.seconds > 0 and row.peak_mb > 10 for row in rows)
    after = model.view.values(next(n for n, _ in model.model.named_parameters()))
    assert before.equal(after)
    assert not model.live
    assert not model._held


def test_single_equals_merging_each_patch(model, data, cases, tmp_path, monkeypatch):
    """Patches beside the model give the scores that merged ones give."""
    (beside,) = Runner(model, _plan(data), tmp_path / "beside").run()

    def refuse(self, row):
        if row:
            raise running_error
        return ()

    from knowpatch.errors import PatchError

    running_error = PatchError("cannot be carried")
    monkeypatch.setattr(EditedModel, "carry", refuse)
    (merged,) = Runner(model, _plan(data), tmp_path / "merged").run()
    for one, other in zip(rows_of(beside.folder), rows_of(merged.folder), strict=True):
        assert other.error is None
        for name in one.scores:
            for kind, values in one.scores[name].after.items():
                assert values == pytest.approx(other.scores[name].after[kind], abs=1e-4)


def test_batch_is_one_patch_for_all(model, data, cases, tmp_path):
    """Every case is scored with all edits live, and has its share of the time."""
    facts = [case.requests[0].prompt for case in cases]
    plan = _plan(data, modes=["batch"], limit=len(set(facts)))
    (cell,) = Runner(model, plan, tmp_path).run()
    rows = rows_of(cell.folder)
    assert len(rows) == len(set(facts))
    assert {(row.edits, row.final, row.seconds) for row in rows} == {
        (len(rows), True, rows[0].seconds)
    }
    assert not (cell.folder / "patches").exists()
    assert not model.live


def test_sequential_scores_at_ages_and_at_the_end(model, data, cases, tmp_path):
    """All cases after all edits, and those edited so far at each age; the past is not edited."""
    (cell,) = Runner(model, _plan(data, modes=["sequential"], ages=[0, 2, 4]), tmp_path).run()
    rows = rows_of(cell.folder)
    count = len(cases)
    # Each right after its own edit, two and four of them at those ages, all at the end.
    assert Counter((row.edits, row.final) for row in rows) == {
        **{(edits, False): 1 for edits in range(1, count)},
        (2, False): 2,
        (4, False): 4,
        (count, True): count,
    }
    assert [row.age for row in rows if row.edits == 4] == [0, 3, 2, 1]
    last = {row.index: row for row in rows if row.final}
    assert last[count - 1].scores["success_tf"].after[""] == (1.0,)
    # The first prompt was edited twice: its first target is gone, and what it was before the
    # first edit is still what the unedited model says.
    assert last[0].scores["success_tf"].after[""][0] < 1
    single = Runner(model, _plan(data), tmp_path).run()[0]
    for row in rows_of(single.folder):
        assert row.scores["success_tf"].before == last[row.index].scores["success_tf"].before


def test_a_mode_that_a_method_lacks_is_said_in_each_row(model, data, tmp_path, monkeypatch):
    """Nothing is left out silently: rows carry the reason."""
    from knowpatch.method import METHODS

    monkeypatch.setattr(METHODS.get("ft"), "sequential", False)
    cells = Runner(model, _plan(data, modes=["sequential", "single"], limit=2), tmp_path).run()
    assert {row.error for row in rows_of(cells[0].folder)} == {"ft has no sequential mode"}
    assert {row.error for row in rows_of(cells[1].folder)} == {None}


# -- what goes wrong -------------------------------------------------------------------------------


def test_a_failing_case_is_a_row_with_its_error(model, cases, tmp_path):
    """One edit fails, one question cannot be asked, one case is unusable: the others are scored."""
    long = Probe("rephrase", "word " * 400, accepted("Paris"), request=0)
    odd = [
        cases[0],
        Case("no subject", (EditRequest(prompt="The sky is", target="green"),), cases[1].probes),
        Case("too long", cases[2].requests, (*cases[2].probes, long)),
        Case("empty", (), cases[3].probes, unusable="the target is empty"),
        cases[4],
    ]
    path = tmp_path / "odd.jsonl"
    write_cases([case for case in odd if case.requests], path)
    loaded = running.load(str(path))
    run = Runner(model, _plan(path, methods=["rome"]), tmp_path / "out")
    run.loaded = [loaded.__class__(**{**vars(loaded), "cases": odd})]
    (cell,) = run.run()
    rows = rows_of(cell.folder)
    assert [row.error is None for row in rows] == [True, False, False, False, True]
    assert "subject" in rows[1].error
    assert "tokens" in rows[2].error
    assert rows[3].error == "the target is empty"
    assert all("\n" not in (row.error or "") for row in rows)


def test_an_unexpected_fault_is_told_by_its_kind(model, data, tmp_path, monkeypatch):
    """A method's own bug ends no run: the row names the exception."""
    from knowpatch.method import METHODS

    def broken(self, *args):
        raise KeyError("oops")

    monkeypatch.setattr(METHODS.get("ft"), "edit", broken)
    monkeypatch.setattr(METHODS.get("ft"), "edit_each", broken)
    (cell,) = Runner(model, _plan(data, limit=3), tmp_path).run()
    assert {row.error for row in rows_of(cell.folder)} == {"KeyError: 'oops'"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"methods": []}, "methods"),
        ({"methods": ["romme"]}, "unknown method 'romme'"),
        ({"methods": [{"name": "ft", "options": {"stepz": 1}}]}, "unknown option 'stepz'"),
        ({"datasets": ["nothing_such"]}, "unknown dataset 'nothing_such'"),
        ({"modes": ["both"]}, "modes"),
        ({"limit": 0}, "limit"),
        ({"metrics": ["sucess_tf"]}, "did you mean 'success_tf'"),
        ({"memory": "lots"}, "is not an amount of memory"),
        ({"ages": [-1]}, "ages"),
        ({"extra": 1}, "unknown field 'extra'"),
    ],
)
def test_a_wrong_plan_is_one_line_before_anything_runs(model, data, tmp_path, fields, said):
    """Whatever is wrong shows before the first edit, and nothing is written."""
    with pytest.raises(InputError) as caught:
        Runner(model, _plan(data, **fields), tmp_path / "out").run()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_plan_is_read_from_yaml(tmp_path):
    """Names alone or with options, one or several; the data folder lies beside the file."""
    path = tmp_path / "plan.yaml"
    path.write_text(
        "methods: [rome, {name: ft, options: {steps: 3}}]\ndatasets: all\ndata: there\n"
    )
    plan = read_plan(path)
    assert [(m.name, m.options) for m in plan.methods] == [("rome", {}), ("ft", {"steps": 3})]
    assert plan.datasets == ("all",)
    assert plan.data == tmp_path / "there"
    for text in ("", "- a", "methods: [", "methods: rome\n", "1: 2", "methods: {name: {}}"):
        path.write_text(text)
        with pytest.raises(OptionError) as caught:
            read_plan(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8e9), ("500 mb", 5e8), ("1.5g", 1.5e9), ("2e9", 2e9), ("7", 7)]
)
def test_amounts_of_memory(text, size):
    assert bytes_of(text) == size


def test_memory_decides_how_many_cases_at_once():
    """It begins with one, grows while it fits, and never below one."""
    budget = Budget(None)
    assert budget.cases == MOST
    budget.used(10**15)
    assert budget.cases == MOST
    budget = Budget(10**13)
    budget.used(budget.start + 10**9)
    assert budget.cases == 2
    budget.used(budget.start + 10**13)
    assert budget.cases == 1
    with pytest.raises(OptionError, match="the model alone takes"):
        check_room(1000)


def test_the_meter_sees_what_a_block_takes(model):
    """A block's peak, given back at its end, is seen by it and not by the next."""
    meter = Meter(model.view.device)
    with meter.running():
        assert len(b"x" * 300_000_000)
    large = meter.peak
    with meter.running():
        pass
    assert meter.seconds >= 0
    if sys.platform == "linux":
        assert large - meter.peak > 200_000_000


# -- resuming --------------------------------------------------------------------------------------


def test_the_unedited_model_is_asked_once(model, data, tmp_path, monkeypatch):
    """A second method asks the edited model only."""
    asked = []
    shared.holds(model.view)  # its probe asks, too
    plain = ModelView.score
    monkeypatch.setattr(
        ModelView,
        "score",
        lambda self, pairs, *more, **given: (
            asked.append(len(pairs)) or plain(self, pairs, *more, **given)
        ),
    )
    first = {"name": "ft", "options": {"steps": 2}}
    second = {"name": "ft", "options": {"steps": 3}}
    monkeypatch.setenv("KNOWPATCH_CACHE", str(tmp_path / "cache"))
    Runner(model, _plan(data, methods=[first], metrics=["accuracy"]), tmp_path / "a").run()
    once = sum(asked)
    asked.clear()
    Runner(model, _plan(data, methods=[second], metrics=["accuracy"]), tmp_path / "a").run()
    assert sum(asked) == once / 2


def test_what_is_there_is_not_run_again(model, data, tmp_path, monkeypatch):
    """A finished cell runs nothing; a cut line is written anew; a changed plan is another cell."""
    (cell,) = Runner(model, _plan(data), tmp_path).run()
    rows = (cell.folder / "rows.jsonl").read_bytes()
    plain = _plain(cell.folder)
    monkeypatch.setattr(running, "MODES", {})
    Runner(model, _plan(data), tmp_path).run()
    assert (cell.folder / "rows.jsonl").read_bytes() == rows
    monkeypatch.undo()
    (cell.folder / "rows.jsonl").write_bytes(rows[: len(rows) * 2 // 3])
    Runner(model, _plan(data), tmp_path).run()
    assert _plain(cell.folder) == plain
    (other,) = Runner(model, _plan(data, seed=2), tmp_path).run()
    assert other.folder != cell.folder
    assert facts_of(other.folder).seed == 2


def test_a_damaged_row_is_one_line(model, data, tmp_path):
    """Rows that are not rows are refused with their place, never scored over."""
    (cell,) = Runner(model, _plan(data, limit=2), tmp_path).run()
    path = cell.folder / "rows.jsonl"
    path.write_text('{"not": "a row"}\n' + path.read_text())
    with pytest.raises(DataError, match="line 1: not a row of results"):
        Runner(model, _plan(data, limit=2), tmp_path).run()


CHILD = """
import json, sys
from pathlib import Path
from knowpatch.bench.plan import make_plan
from knowpatch.bench.runner import Runner
from knowpatch.editing import load
fields = json.loads(sys.argv[1])
model = load(fields.pop("folder"))
print("ready", flush=True)
Runner(model, make_plan(fields), Path(sys.argv[2])).run()
"""


def _start(fields, out, cache):
    environment = {**os.environ, "KNOWPATCH_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    log = out.with_suffix(".log")
    with log.open("wb") as said:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, json.dumps(fields), str(out)],
            stdout=said,
            stderr=said,
            env=environment,
        )
    while b"ready\n" not in log.read_bytes():
        assert child.poll() is None, log.read_text()
        time.sleep(0.01)
    return child


@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_a_killed_run_ends_in_the_same_rows(folder, data, tmp_path, mode):
    """SIGKILL at random moments, again and again; what is left goes on to the rows of a run that
    nobody killed."""
    kills = 50 if os.environ.get("KNOWPATCH_SOAK") else 5
    fields = {
        "folder": str(folder),
        "methods": [{"name": "ft", "options": {"steps": 25}}],
        "datasets": [str(data)],
        "modes": [mode],
        "metrics": list(METRICS),
        "ages": [0, 3, 6],
    }
    whole = _start(fields, tmp_path / "whole", tmp_path / "cache-whole")
    began = time.monotonic()
    assert whole.wait(timeout=300) == 0
    lasted = time.monotonic() - began
    moments = random.Random(kills)
    out = tmp_path / "broken"
    for _ in range(kills // 2 + 1):
        child = _start(fields, out, tmp_path / "cache-broken")
        time.sleep(moments.uniform(0, lasted * 0.8))
        child.send_signal(signal.SIGKILL)
        child.wait()
        if moments.random() < 0.2:  # and from the beginning
            shutil.rmtree(out, ignore_errors=True)
    last = _start(fields, out, tmp_path / "cache-broken")
    assert last.wait(timeout=300) == 0, out.with_suffix(".log").read_text()
    (one,), (other,) = ((path / "cells").iterdir() for path in (tmp_path / "whole", out))
    assert one.name == other.name
    assert _plain(one) == _plain(other)
    assert not list(out.rglob("*.tmp"))
