"""`evaluate`, `bench` and `data` as their users meet them, on a tiny model and hand-made cases."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from shell import Result, files, run

from knowpatch.bench import modes, runner
from knowpatch.bench.plan import read_plan
from knowpatch.bench.statistics import bootstrap
from knowpatch.metrics.catalogue import catalogue
from knowpatch.metrics.metric import METRICS
from knowpatch.models.passes import Distributions, Spread

FAST = ("--method", "ft", "--set", "learning_rate=0.01", "--set", "steps=15")
ROME = ("--method", "rome", "--set", "layer=0", "--set", "moments=identity", "--set", "steps=3")
EDITS = (
    ("The capital of France is", "France", "Rome", "Paris"),
    ("The capital of Japan is", "Japan", "Paris", "Tokyo"),
    ("The Nile flows through", "Nile", "Tokyo", "Egypt"),
)
SHOWN = {"mean", "low", "high", "n", "protocol"}


def case(number: int, prompt: str, subject: str, target: str, old: str, **more: Any) -> dict:
    """A case with a rewrite, a rephrase and two questions that should stay."""
    probes = [
        {"kind": "rewrite", "prompt": prompt, "answers": target, "request": 0},
        {"kind": "rephrase", "prompt": f"Therefore {prompt}", "answers": target, "request": 0},
        {"kind": "locality.other", "prompt": "Two plus two equals", "answers": "four"},
        {"kind": "locality.other", "prompt": "The colour of the sky is", "answers": "blue"},
    ]
    request = {"prompt": prompt, "subject": subject, "target": target, "old": old}
    return {"id": f"case {number}", "requests": [request], "probes": probes, **more}


CASES = [case(number, *edit) for number, edit in enumerate(EDITS)]
UNUSABLE = {"id": "none", "requests": [], "probes": [], "unusable": "the target is empty"}


def write(path: Path, *cases: dict) -> Path:
    path.write_text("".join(f"{json.dumps(one)}\n" for one in cases))
    return path


def rows(folder: Path) -> list[dict]:
    """All rows of a results folder."""
    paths = sorted(folder.glob("cells/*/rows.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def refused(result: Result) -> str:
    """The one line of a refusal; progress may stand before it."""
    assert result.code == 2, result
    assert not result.out
    lines = [line for line in result.err.splitlines() if line.startswith("knowpatch: ")]
    assert result.err.splitlines()[-1:] == lines, result.err
    return lines[0].removeprefix("knowpatch: ")


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KNOWPATCH_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    """A folder with a file of cases."""
    write(tmp_path / "mine.jsonl", *CASES)
    return tmp_path


@pytest.fixture
def evaluate(cwd: Path, folder: Path):
    """`knowpatch evaluate` with ft on mine.jsonl into the folder `out`; later options win."""

    def call(*more: object) -> Result:
        method = () if "--method" in more else FAST
        plain = ("--model", folder, *method, "--dataset", "mine.jsonl", "--out", "out")
        metrics = () if "--metrics" in more else ("--metrics", "success_tf")
        return run("evaluate", *plain, *metrics, *more, cwd=cwd)

    return call


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """A YAML plan of two methods in three modes, run; and the folder it ran in."""
    cwd = tmp_path_factory.mktemp("plan")
    write(cwd / "mine.jsonl", *CASES)
    ft = {"name": "ft", "options": {"learning_rate": 0.01, "steps": 15}}
    plan = {
        "methods": [ft, "ice"],
        "datasets": "mine.jsonl",
        "modes": ["single", "batch", "sequential"],
        "model": str(folder),
        "metrics": ["success_tf", "rephrase_tf", "locality"],
        "ages": [0, 1, 2],
    }
    (cwd / "plan.yaml").write_text(json.dumps(plan))  # JSON is YAML
    return run("bench", "run", "plan.yaml", "--out", "out", "--json", cwd=cwd), cwd


# -- evaluate --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["single", "batch", "sequential"])
def test_evaluate_as_json(evaluate, cwd, mode):
    """One object: what was run, each metric with its interval and n, seconds and memory."""
    result = evaluate("--mode", mode, "--metrics", "accuracy,locality", "--json")
    assert result.code == 0
    told = result.json()
    wanted = {"method": "ft", "dataset": "mine.jsonl", "split": "all", "mode": mode, "n": 3}
    assert {name: told[name] for name in wanted} == wanted
    assert told["seconds_per_edit"] > 0
    assert told["peak_mb"] > 10
    assert {"success_tf", "rephrase_tf", "locality_tf", "locality_kl"} <= set(told["metrics"])
    for metric in told["metrics"].values():
        assert set(metric) >= SHOWN
        assert metric["n"] == 3
        assert metric["low"] <= metric["mean"] <= metric["high"]
    assert told["metrics"]["success_tf"]["protocol"] == "teacher-forced"
    assert (cwd / told["rows"]).is_file()


def test_evaluate_is_the_mean_of_its_rows(evaluate, cwd):
    """Mean, n and the value before are those of the rows."""
    told = evaluate("--metrics", "success_tf,locality_kl", "--json").json()
    for name, metric in told["metrics"].items():
        scores = [row["scores"][name] for row in rows(cwd / "out")]
        means = [[sum(v) / len(v) for v in score["after"].values()] for score in scores]
        means = [sum(values) / len(values) for values in means]
        assert metric["mean"] == pytest.approx(sum(means) / len(means))
        assert metric["n"] == len(means)
    assert told["metrics"]["success_tf"]["before"] == 0
    assert told["metrics"]["locality_kl"]["before"] is None


def test_evaluate_for_people(evaluate):
    """A table with the same numbers, on standard output alone."""
    result = evaluate()
    assert result.code == 0
    assert "ft on mine.jsonl (all), single: 3 cases" in result.out
    assert "success_tf" in result.out
    assert "s per edit" in result.out


def test_evaluating_again_runs_nothing(evaluate, cwd, monkeypatch):
    """What is there is shown, not run again."""
    first = evaluate("--json")
    before = files(cwd)
    monkeypatch.setattr(runner, "MODES", {})
    assert evaluate("--json").json() == first.json()
    assert files(cwd) == before


def test_evaluate_goes_into_the_cache(folder, cwd, own_cache):
    """Without --out nothing is written beside the user's files."""
    before = files(cwd)
    given = ("--dataset", "mine.jsonl", "--limit", "1", "--metrics", "success_tf", "--json")
    result = run("evaluate", "--model", folder, "--method", "ice", *given, cwd=cwd)
    assert result.code == 0
    assert Path(result.json()["rows"]).is_relative_to(own_cache)
    assert files(cwd) == before


def test_probes_are_a_part_of_the_questions(evaluate, cwd):
    """--probes 1 leaves one question of each kind; the cell is another one."""
    evaluate("--metrics", "locality_tf", "--out", "all")
    evaluate("--metrics", "locality_tf", "--out", "one", "--probes", "1")
    counts = {
        name: {len(row["scores"]["locality_tf"]["after"]["other"]) for row in rows(cwd / name)}
        for name in ("all", "one")
    }
    assert counts == {"all": {2}, "one": {1}}


def test_a_chat_run_asks_and_edits_in_chat(evaluate):
    """--chat is another cell with other numbers, and goes into the method's options."""
    plain = evaluate("--metrics", "perplexity_tf", "--json").json()
    chat = evaluate("--metrics", "perplexity_tf", "--chat", "--json").json()
    assert plain["rows"] != chat["rows"]
    assert plain["metrics"]["perplexity_tf"]["before"] != chat["metrics"]["perplexity_tf"]["before"]


def test_what_ice_puts_in_front_is_in_front_after_the_edit_alone(evaluate):
    """The unedited model is asked without it: values before are those of any other method."""
    asked = ("--metrics", "accuracy,perplexity", "--json")
    ft = evaluate(*asked).json()["metrics"]
    for mode in ("single", "batch", "sequential"):
        ice = evaluate(*asked, "--method", "ice", "--mode", mode).json()["metrics"]
        for name, metric in ice.items():
            assert metric["before"] == pytest.approx(ft[name]["before"], rel=1e-4)
        assert ice["success_tf"]["mean"] == 1


# -- bench -----------------------------------------------------------------------------------------


def test_bench_from_a_yaml_plan(results):
    """A list with an object for each cell: dataset by dataset, mode by mode."""
    result, cwd = results
    assert result.code == 0
    cells = result.json()
    assert [(cell["mode"], cell["method"]) for cell in cells] == [
        (mode, method) for mode in ("single", "batch", "sequential") for method in ("ft", "ice")
    ]
    assert all(cell["n"] == 3 and cell["failed"] == 0 for cell in cells)
    assert all(set(m) >= SHOWN for cell in cells for m in cell["metrics"].values())
    assert not list(cwd.rglob("patches"))


def test_bench_from_options(folder, cwd):
    """Names, comma-separated; every method in every mode."""
    given = ("--methods", "ice,ft", "--datasets", "mine.jsonl", "--mode", "single,batch")
    more = ("--model", folder, "--limit", "2", "--metrics", "success_tf", "--out", "out")
    result = run("bench", "run", *given, *more, cwd=cwd)
    assert result.code == 0
    assert result.out.count("2 cases") == 4
    assert "bench report out" in result.out
    assert len(list((cwd / "out" / "cells").iterdir())) == 4


def test_options_override_a_plan(results):
    """What is given besides the file counts."""
    _, cwd = results
    more = ("--methods", "ice", "--mode", "single", "--limit", "1", "--out", "other", "--json")
    (cell,) = run("bench", "run", "plan.yaml", *more, cwd=cwd).json()
    assert (cell["method"], cell["mode"], cell["n"]) == ("ice", "single", 1)


def test_ages_of_a_sequential_run(results):
    """A row's age is the number of edits since its own; the last edit's final row has age 0."""
    _, cwd = results
    found = rows(cwd / "out")
    facts = [json.loads(p.read_text()) for p in sorted(cwd.glob("out/cells/*/cell.json"))]
    assert sorted({fact["mode"] for fact in facts}) == ["batch", "sequential", "single"]
    partial = [row for row in found if not row["final"]]
    assert partial
    assert all(row["age"] == row["edits"] - 1 - row["index"] for row in partial)


def test_bench_report(results):
    """Markdown, one HTML page, CSV, JSON and pictures, whose numbers are those of the run."""
    result, cwd = results
    told = run("bench", "report", "out", "--out", "report", "--json", cwd=cwd)
    assert told.code == 0
    written = [Path(name) for name in told.json()["written"]]
    assert {path.name for path in written} >= {
        *("report.md", "report.html", "report.json", "summary.csv", "rows.csv")
    }
    assert all((cwd / path).is_file() for path in written)
    with (cwd / "report" / "summary.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if not line["sub_kind"]]
    for cell in result.json():
        for name, metric in cell["metrics"].items():
            (line,) = (
                line
                for line in lines
                if (line["method"], line["mode"], line["metric"])
                == (cell["method"], cell["mode"], name)
            )
            assert float(line["after_mean"]) == pytest.approx(metric["mean"], abs=1e-8)
            assert int(line["after_n"]) == metric["n"]
            assert line["complete"] == "1"
    assert "INCOMPLETE" not in (cwd / "report" / "report.md").read_text()


def test_bench_report_for_people(results):
    """The paths that were written, one a line; by default below the results folder."""
    _, cwd = results
    result = run("bench", "report", "out", cwd=cwd)
    assert result.code == 0
    assert all((cwd / line).is_file() for line in result.out.splitlines())
    assert (cwd / "out" / "report" / "report.html").is_file()


# -- data ------------------------------------------------------------------------------------------


def test_data_list(cwd):
    """All datasets with their splits, the default one of which is one of them."""
    told = run("data", "list", "--json", cwd=cwd).json()
    assert {"zsre", "counterfact", "known_facts"} <= {one["name"] for one in told}
    for one in told:
        assert one["default_split"] in [split["name"] for split in one["splits"]]
        assert all(split["cases"] is None for split in one["splits"])
    assert "not here" in run("data", "list", cwd=cwd).out


def test_data_check(cwd):
    """A file's cases, requests and probes, counted."""
    told = run("data", "check", "mine.jsonl", "--json", cwd=cwd).json()
    assert (told["cases"], told["requests"]) == (3, 3)
    assert told["probes"] == {"rewrite": 3, "rephrase": 3, "locality.other": 6}
    assert "3 cases, 3 requests" in run("data", "check", "mine.jsonl", cwd=cwd).out


def test_data_make(cwd):
    """As many cases as wanted, in a file that is a dataset."""
    made = run("data", "make", "--out", "new.jsonl", "--count", "7", "--any", "--json", cwd=cwd)
    assert made.code == 0
    assert (made.json()["cases"], made.json()["file"]) == (7, "new.jsonl")
    assert run("data", "check", "new.jsonl", "--json", cwd=cwd).json()["cases"] == 7


# -- bad input -------------------------------------------------------------------------------------

EVALUATE = [
    (("--limit", "0"), "limit"),
    (("--limit", "x"), "limit"),
    (("--probes", "0"), "probes"),
    (("--memory", "lots"), "is not an amount of memory"),
    (("--memory", "0"), "is not an amount of memory"),
    (("--memory", "1MB"), "the model alone takes"),
    (("--ages", "x"), "ages"),
    (("--ages", "-1"), "ages"),
    (("--mode", "both"), "'single', 'batch' or 'sequential'"),
    (("--mode", "single,batch"), "'single', 'batch' or 'sequential'"),
    (("--metrics", "sucess_tf"), "did you mean 'success_tf'"),
    (("--set", "steps"), "key=value"),
    (("--set", "steps=x"), "option steps of ft"),
    (("--set", "stepz=1"), "unknown option 'stepz'"),
    (("--method", "romme"), "unknown method 'romme'"),
    (("--device", "abacus"), "unknown device"),
    (("--dtype", "float3"), "unknown dtype"),
    (("--model", "nowhere"), "nowhere: no such folder"),
    (("--dataset", "nothing"), "unknown dataset 'nothing'"),
    (("--dataset", "nothing.jsonl"), "nothing.jsonl: no such file"),
    (("--dataset", "zsre:nothing"), "has no split 'nothing'"),
    (("--dataset", "zsre", "--data", "nowhere"), "nowhere: no such data folder"),
    (("--dataset", "zsre", "--data", "mine.jsonl"), "mine.jsonl: no such data folder"),
    (("--dataset", "counterfact"), "--data"),
    (("--dataset", "empty.jsonl"), "holds no case"),
    (("--dataset", "text.jsonl"), "line 1: not JSON"),
    (("--dataset", "number.jsonl"), "line 1, prompt: expected text, got a number"),
    (("--dataset", "bytes.jsonl"), "is not UTF-8"),
    (("--dataset", "folder.jsonl"), "cannot be read"),
    (("--out", "mine.jsonl"), "cannot be written"),
    (("--out", "mine.jsonl/below"), "cannot be written"),
    (("--out", "/proc/results"), "cannot be written"),
]


@pytest.mark.parametrize(("more", "said"), EVALUATE, ids=lambda value: " ".join(value)[:30])
def test_evaluate_refuses(evaluate, cwd, more, said):
    """Exit code 2, one line that says what is wrong, and no row."""
    (cwd / "empty.jsonl").write_text("\n")
    (cwd / "text.jsonl").write_text("hello\n")
    (cwd / "number.jsonl").write_text('{"prompt": 5}\n')
    (cwd / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    (cwd / "folder.jsonl").mkdir()
    assert said in refused(evaluate(*more))
    assert not rows(cwd / "out")


PLANS = [
    ("", "a plan is a mapping"),
    ("- ft\n", "a plan is a mapping"),
    ("methods: [ft\n", "not YAML"),
    ("methods: !!python/object:os.system x\n", "not YAML"),
    ("methods: ft\ndatasets: mine.jsonl\nlimt: 1\n", "did you mean 'limit'"),
    ("methods: ft\ndatasets: {a: b}\n", "datasets"),
    ("methods: [[ft]]\ndatasets: mine.jsonl\n", "methods.0"),
    ("methods: {name: ft, options: {stepz: 1}}\ndatasets: mine.jsonl\n", "unknown option 'stepz'"),
    ("methods: ft\n", "datasets"),
    ("methods: ft\ndatasets: mine.jsonl\ndata: 5\n", "data"),
    ("methods: ft\ndatasets: mine.jsonl\nmodes: both\n", "modes"),
    ("methods: ft\ndatasets: mine.jsonl\nlimit: 1.5\n", "limit"),
]


@pytest.mark.parametrize(("text", "said"), PLANS)
def test_bench_refuses_a_plan(cwd, folder, text, said):
    (cwd / "plan.yaml").write_text(text)
    line = refused(run("bench", "run", "plan.yaml", "--model", folder, "--out", "out", cwd=cwd))
    assert said in line
    assert not (cwd / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run",), "--methods and --datasets"),
        (("run", "--methods", "ft"), "--datasets"),
        (("run", "nothing.yaml"), "nothing.yaml: cannot be read"),
        (("run", "."), "cannot be read"),
        (("run", "--methods", ",", "--datasets", "mine.jsonl"), "methods"),
        (("report",), "DIR"),
        (("report", "nowhere"), "no cells of results"),
        (("report", "mine.jsonl"), "no cells of results"),
        (("report", "."), "no cells of results"),
    ],
)
def test_bench_refuses(cwd, arguments, said):
    before = files(cwd)
    assert said in refused(run("bench", *arguments, cwd=cwd))
    assert files(cwd) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("check", "nothing"), "unknown dataset"),
        (("check", "nothing.jsonl"), "no such file"),
        (("check", "."), "unknown dataset"),
        (("check", "mine.jsonl", "--split", "test"), "has no split"),
        (("check", "zsre:inverse", "--split", "structured"), "names another split"),
        (("check", "counterfact"), "--data"),
        (("list", "--data", "nowhere"), "no such data folder"),
        (("make",), "--out"),
        (("make", "--any", "--out", "."), "ends in .jsonl"),
        (("make", "--any", "--out", "mine.jsonl/new.jsonl"), "cannot be written"),
        (("make", "--any", "--out", "new.jsonl", "--count", "0"), "count"),
        (("make", "--any", "--out", "new.jsonl", "--count", "9999999"), "lower --count"),
        (("make", "--any", "--out", "new.jsonl", "--relation", "x"), "unknown relation"),
    ],
)
def test_data_refuses(cwd, arguments, said):
    before = files(cwd)
    assert said in refused(run("data", *arguments, cwd=cwd))
    assert files(cwd) == before


def test_a_report_needs_a_place(evaluate, cwd):
    """A file in the place of the folder, or above it."""
    evaluate()
    for out in ("mine.jsonl", "mine.jsonl/below"):
        line = refused(run("bench", "report", "out", "--out", out, cwd=cwd))
        assert "cannot be written" in line


# -- damaged results -------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"method": "ft"}'])
def test_a_damaged_cell_is_one_line(evaluate, cwd, content):
    """Whoever reads it, the line names the file and what to do."""
    evaluate("--limit", "1")
    (path,) = (cwd / "out").glob("cells/*/cell.json")
    path.write_bytes(content)
    for result in (evaluate("--limit", "1"), run("bench", "report", "out", cwd=cwd)):
        line = refused(result)
        assert "cell.json" in line
        assert "remove its folder" in line


@pytest.mark.parametrize("line", [b"\xff\n", b"{}\n", b"5\n", b'{"case": "a"}\n'])
def test_a_damaged_row_is_one_line(evaluate, cwd, line):
    evaluate("--limit", "1")
    (path,) = (cwd / "out").glob("cells/*/rows.jsonl")
    path.write_bytes(line + path.read_bytes())
    for result in (evaluate("--limit", "1"), run("bench", "report", "out", cwd=cwd)):
        assert "rows.jsonl, line 1" in refused(result)


def test_a_cut_row_is_run_again(evaluate, cwd):
    """And until then the report says that the cell is incomplete."""
    whole = evaluate("--json").json()
    (path,) = (cwd / "out").glob("cells/*/rows.jsonl")
    path.write_bytes(path.read_bytes()[:-20])
    assert run("bench", "report", "out", cwd=cwd).code == 0
    assert "INCOMPLETE" in (cwd / "out" / "report" / "report.md").read_text()
    assert evaluate("--json").json()["metrics"] == whole["metrics"]


STREAM = ("--mode", "sequential", "--ages", "0,1,2")


@pytest.fixture
def broken_off(evaluate, cwd, monkeypatch) -> Path:
    """A sequential run that ended with Ctrl-C in its third edit; the folder of its patches."""
    left = iter([modes.edit] * 2)

    def stopping(*args: Any, **given: Any) -> Any:
        for edit in left:
            return edit(*args, **given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(modes, "edit", stopping)
        assert "interrupted" in refused(evaluate(*STREAM))
    (patches,) = (cwd / "out").glob("cells/*/patches")
    return patches


def test_an_interrupted_run_goes_on(broken_off, evaluate, cwd):
    """No file is half-written, and the numbers are those of a run that nobody stopped."""
    assert not list(cwd.rglob(".*"))
    resumed = evaluate(*STREAM, "--json").json()
    whole = evaluate(*STREAM, "--out", "whole", "--json").json()
    assert resumed["metrics"] == whole["metrics"]
    assert not broken_off.exists()


@pytest.mark.parametrize(("kind", "content"), [("safetensors", None), ("json", b"{")])
def test_a_damaged_step_is_made_anew(broken_off, evaluate, kind, content):
    """A patch that was cut, or a note of what was made: the run ends as one that nobody broke."""
    path = min(broken_off.glob(f"*.{kind}"))
    path.write_bytes(path.read_bytes()[:50] if content is None else content)
    resumed = evaluate(*STREAM, "--json").json()
    whole = evaluate(*STREAM, "--out", "whole", "--json").json()
    assert resumed["metrics"] == whole["metrics"]


def test_a_lost_patch_is_not_an_edit_that_never_was(broken_off, evaluate):
    min(broken_off.glob("*.safetensors")).unlink()
    resumed = evaluate(*STREAM, "--json")
    if resumed.code:
        refused(resumed)
    else:
        whole = evaluate(*STREAM, "--out", "whole", "--json").json()
        assert resumed.json()["metrics"] == whole["metrics"]


def test_a_run_that_ended_before_it_tidied_up_is_complete(evaluate, cwd, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(runner, "forget", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        evaluate(*STREAM)
    assert evaluate(*STREAM).code == 0
    run("bench", "report", "out", cwd=cwd)
    assert "INCOMPLETE" not in (cwd / "out" / "report" / "report.md").read_text()


def test_rows_that_cannot_be_written_are_one_line(evaluate, cwd):
    evaluate("--limit", "1")
    (path,) = (cwd / "out").glob("cells/*/rows.jsonl")
    path.unlink()
    path.mkdir()
    assert "rows.jsonl" in refused(evaluate("--limit", "1"))


@pytest.mark.parametrize("word", ["NaN", "Infinity"])
def test_a_row_that_is_no_number_is_one_line(evaluate, cwd, word):
    evaluate()
    (path,) = (cwd / "out").glob("cells/*/rows.jsonl")
    path.write_text(path.read_text().replace("[1.0]", f"[{word}]", 1))
    result = run("bench", "report", "out", cwd=cwd)
    if result.code:
        refused(result)


def test_a_perplexity_beyond_all_numbers_is_no_traceback():
    metric = catalogue()["perplexity_tf"]
    bootstrap([{"nll": 800.0, "tokens": 1.0}] * 3, metric.combine)


def test_divergence_is_a_lower_bound():
    """Where the edited model is sure of one token, the others' share must not come from 1 - sum."""
    logits = torch.randn(1, 49152, generator=torch.Generator().manual_seed(0)) * 2
    top = int(logits.argmax())
    moved = logits.clone()
    moved[0, top] += 20
    (base,), (edited,) = Spread.of(logits, [(top,)]), Distributions.of(moved, [(top,)])
    p, q = (x.double().log_softmax(-1) for x in (logits, moved))
    assert edited.divergence(base)[0] <= float((p.exp() * (p - q)).sum()) + 1e-3


def test_a_changed_plug_in_is_another_cell(evaluate, cwd, monkeypatch):
    """CONTRIBUTING's way to write a metric (or a method, or a dataset)."""
    source = """
from knowpatch.metrics.metric import metric, register
from knowpatch.metrics.queries import both


@metric(protocol="free generation", about="a constant")
def constant_gen(case, before, after):
    models = (before, after)
    ask = lambda model, probe: model.say(probe.prompt)
    return both(case, "rewrite", models, ask, lambda probe, said: VALUE)


register("constant", constant_gen)
"""
    (cwd / "metrics").mkdir()
    monkeypatch.setenv("KNOWPATCH_METRICS", str(cwd / "metrics"))
    found = []
    try:
        for value in ("0.25", "0.75"):
            path = cwd / "metrics" / "constant.py"
            path.write_text(source.replace("VALUE", value) + f"# {value}\n")
            METRICS._found.pop("constant", None)
            told = evaluate("--metrics", "constant", "--json").json()
            found.append(told["metrics"]["constant_gen"]["mean"])
    finally:
        METRICS._found.pop("constant", None)
    assert found == [0.25, 0.75]


def test_a_suite_is_no_traceback(evaluate, cwd, monkeypatch):
    source = """
from knowpatch.data.dataset import Dataset, register
from knowpatch.data.jsonl import cases_of


@register("NAME")
class Half(Dataset):
    name, about, paper, kind, suite = "NAME", "a half", "none", "modify", "halves"
    files = {"test": ["NAME.json"]}

    def cases(self, *contents):
        import json

        return cases_of(json.dumps(contents[0]).encode())
"""
    (cwd / "sets").mkdir()
    for name in ("half_one", "half_two"):
        (cwd / "sets" / f"{name}.py").write_text(source.replace("NAME", name))
        (cwd / f"{name}.json").write_text(json.dumps(CASES[0]))
    monkeypatch.setenv("KNOWPATCH_DATASETS", str(cwd / "sets"))
    result = evaluate("--dataset", "halves", "--data", cwd)
    if result.code:
        refused(result)


@pytest.mark.parametrize("mode", ["single", "batch"])
def test_seconds_are_of_edits_that_were_made(evaluate, cwd, mode):
    alone = evaluate("--limit", "2", "--mode", mode, "--json").json()["seconds_per_edit"]
    odd = [{**UNUSABLE, "id": f"none {number}"} for number in range(20)]
    write(cwd / "odd.jsonl", *CASES[:2], *odd)
    told = evaluate("--dataset", "odd.jsonl", "--mode", mode, "--json").json()
    assert told["failed"] == 20
    assert told["seconds_per_edit"] > alone / 3


def test_a_case_fails_once(evaluate, cwd):
    write(cwd / "odd.jsonl", UNUSABLE, *CASES)
    told = evaluate("--dataset", "odd.jsonl", *STREAM, "--json").json()
    assert told["n"] == 4
    assert told["failed"] == 1


def test_an_unusable_case_is_not_edited(evaluate, cwd):
    """The second case asks what the first, unusable one would have taught."""
    asks = {**CASES[1], "probes": CASES[0]["probes"][:1]}
    write(cwd / "odd.jsonl", {**CASES[0], "unusable": "broken"}, asks)
    single, stream = (
        evaluate("--dataset", "odd.jsonl", "--mode", mode, "--json").json()["metrics"]
        for mode in ("single", "sequential")
    )
    assert stream["success_tf"]["mean"] == single["success_tf"]["mean"]


def test_edits_of_a_batch_have_no_age(evaluate, cwd):
    evaluate("--mode", "batch")
    assert {row["age"] for row in rows(cwd / "out")} == {0}


def test_a_refused_request_leaves_the_rest_of_its_batch(cwd, folder):
    request = {key: text for key, text in CASES[2]["requests"][0].items() if key != "subject"}
    write(cwd / "odd.jsonl", *CASES[:2], {**CASES[2], "requests": [request]})
    more = ("--dataset", "odd.jsonl", "--mode", "batch", "--metrics", "success_tf", "--out", "out")
    told = run("evaluate", "--model", folder, *ROME, *more, "--json", cwd=cwd).json()
    assert [one["case"] for one in told["failures"]] == ["case 2"]


def test_a_metric_that_scores_nothing_is_shown(evaluate, monkeypatch):
    monkeypatch.delenv("KNOWPATCH_JUDGE_URL", raising=False)
    told = evaluate("--metrics", "success_judge", "--json").json()
    assert sum(told["metrics"]["success_judge"]["unscored"].values()) == 3


def test_no_metrics_are_refused(evaluate):
    assert "metrics" in refused(evaluate("--metrics", ","))


def test_too_little_memory_leaves_nothing_behind(evaluate, cwd):
    refused(evaluate("--memory", "1MB"))
    assert not (cwd / "out").exists()


def test_the_plan_that_was_kept_can_be_run(cwd, folder):
    (cwd / "data").mkdir()
    plan = ("--methods", "ice", "--datasets", "mine.jsonl", "--data", "data", "--limit", "1")
    more = ("--model", folder, "--metrics", "success_tf", "--out", "out")
    assert run("bench", "run", *plan, *more, cwd=cwd).code == 0
    kept = read_plan(cwd / "out" / "plan.yaml")
    assert kept.data is not None
    assert kept.data.is_dir()


def test_check_counts_what_is_odd_in_ones_own_file(cwd):
    same = {"prompt": "The capital of France is", "target": "Paris", "old": "Paris"}
    write(cwd / "odd.jsonl", same, same)
    told = run("data", "check", "odd.jsonl", "--json", cwd=cwd).json()
    assert told["oddities"].get("target equals the old answer") == 2
    assert told["oddities"].get("same as case N") == 1


def test_data_make_writes_what_can_be_read(cwd):
    refused(run("data", "make", "--any", "--count", "2", "--out", "new.txt", cwd=cwd))


def test_a_wrong_field_of_a_method_gets_its_own_hint(cwd):
    (cwd / "plan.yaml").write_text("methods: {name: ft, option: {}}\ndatasets: mine.jsonl\n")
    assert "did you mean 'options'" in refused(run("bench", "run", "plan.yaml", cwd=cwd))


def test_a_score_that_is_whole_in_every_case_is_not_certain():
    metric = catalogue()["prob_score"]
    whole = [{"efficacy": 1.0, "paraphrase": 1.0, "neighbourhood": 1.0}] * 4
    assert bootstrap(whole, metric.combine, share=metric.percent).low < 1


def test_a_run_in_which_every_case_fails_ends_with_1(evaluate, cwd):
    """Rows carry the errors; a script learns of it by the exit code."""
    nowhere = {"prompt": "The capital of France is", "target": "Rome"}
    write(cwd / "odd.jsonl", nowhere)
    failing = evaluate("--dataset", "odd.jsonl", "--method", "rome", "--json")
    assert failing.code == 1, failing
    assert failing.json()["failed"] == failing.json()["n"] == 1
    assert "subject" in failing.json()["failures"][0]["error"]
