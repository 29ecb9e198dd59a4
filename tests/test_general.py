"""General questions: reading them, dealing them out, and the choices that a model takes."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from knowpatch.ask import Ask
from knowpatch.bench.plan import make_plan, read_plan
from knowpatch.bench.runner import Runner
from knowpatch.bench.schema import Row, facts_of, rows_of
from knowpatch.bench.statistics import bootstrap, wilson
from knowpatch.bench.summary import cell_of, summarise
from knowpatch.data.case import GENERAL, REWRITE, Case, Probe, accepted
from knowpatch.data.general import FILE, MOST, dealt, load_general
from knowpatch.data.jsonl import write_cases
from knowpatch.editing import load
from knowpatch.errors import DataError, OptionError
from knowpatch.future import Future
from knowpatch.metrics.asker import Asker
from knowpatch.metrics.catalogue import catalogue, chosen
from knowpatch.models.passes import Scored
from knowpatch.request import EditRequest

DATA = Path(os.environ.get("KNOWPATCH_DATA", Path(__file__).parents[2] / "shared" / "data"))
NAMES = ("general_mc", "general_sum_mc", "general_same_mc")
FISH = {"question": "Where do fish live?", "choices": ["in water", "up"], "answer": "up"}
PUBLISHED = {
    "id": "a7",
    "answerKey": "B",
    "question": {
        "question_concept": "fish",
        "stem": " Where do fish live? ",
        "choices": [{"label": "A", "text": "in water"}, {"label": "B", "text": "up"}],
    },
}


def written(path: Path, *lines: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def question(answer: str = "up", choices: tuple[str, ...] = ("in water", "up")) -> Probe:
    return Probe(GENERAL, "Question: x?\nAnswer:", accepted(answer), choices=choices)


# -- reading ---------------------------------------------------------------------------------------


def test_both_forms_say_the_same(tmp_path):
    """One's own lines and published ones: the question behind its frame, choices, the answer."""
    own, published = (
        load_general(written(tmp_path / f"{i}.jsonl", line)).probes
        for i, line in enumerate((FISH, PUBLISHED))
    )
    assert (
        own
        == published
        == (
            Probe(
                GENERAL,
                "Question: Where do fish live?\nAnswer:",
                (("up",),),
                choices=("in water", "up"),
            ),
        )
    )


def test_a_choice_that_comes_twice_is_one(tmp_path):
    """Published files label equal texts twice: the model is not asked to tell them apart."""
    path = written(tmp_path / "q.jsonl", {**FISH, "choices": ["up", "in water", " up"]})
    assert load_general(path).probes[0].choices == ("up", "in water")


def test_the_first_questions_are_read_of_the_folder_s_file(tmp_path):
    """At most so many, in order; the digest is the whole file's; empty lines are none."""
    lines = [{**FISH, "question": f"{i}?"} for i in range(MOST + 5)]
    path = written(tmp_path / FILE, *lines)
    found = load_general(data=tmp_path)
    assert [p.prompt for p in found.probes] == [f"Question: {i}?\nAnswer:" for i in range(MOST)]
    few = load_general(path, limit=2)
    assert few.probes == found.probes[:2]
    assert few.digest == found.digest


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: expected an object, got a list"),
        ("{}", "line 2: 'question' is missing"),
        (json.dumps({**FISH, "answer": "down"}), "line 2: the answer 'down' is none of"),
        (json.dumps({**FISH, "answer": 1}), "line 2, answer: expected text, got a number"),
        (json.dumps({**FISH, "anwser": "up"}), "line 2: unknown field 'anwser'"),
        (json.dumps({**FISH, "choices": ["up"]}), "two choices or more"),
        (json.dumps({**FISH, "choices": "up"}), "two choices or more"),
        (json.dumps({**FISH, "choices": ["up", ""]}), "two choices or more, none empty"),
        (json.dumps({**FISH, "choices": ["up", None]}), "expected text, got null"),
        (json.dumps({**FISH, "question": " "}), "expected a question"),
        (json.dumps({**PUBLISHED, "answerKey": "E"}), "no choice is labelled 'E'"),
        (json.dumps({**PUBLISHED, "answerKey": None}), "'answerKey' is missing"),
        (json.dumps({**PUBLISHED, "question": {"stem": "x?"}}), "'choices' is missing"),
        ('{"question": "\\ud800", "choices": ["a", "b"], "answer": "a"}', "surrogate"),
    ],
)
def test_a_damaged_line_is_one_line(tmp_path, line: str, said: str):
    """With the file and the line's number."""
    path = tmp_path / "q.jsonl"
    path.write_text(f"{json.dumps(FISH)}\n{line}\n")
    with pytest.raises(DataError) as caught:
        load_general(path)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{path}: line 2")
    assert "\n" not in str(caught.value)


def test_damage_behind_the_last_question_is_seen(tmp_path):
    """The file is read whole, however few questions are asked."""
    with pytest.raises(DataError, match="line 2"):
        load_general(written(tmp_path / "q.jsonl", FISH, {}), limit=1)


def test_a_missing_file_is_one_line(tmp_path, monkeypatch):
    """It says which file it is, and how to give it; an empty file and other bytes are told too."""
    monkeypatch.delenv("KNOWPATCH_DATA", raising=False)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff")
    for given, said in (
        ({}, f"{FILE} has to be given"),
        ({"data": tmp_path}, f"{FILE} is not below {tmp_path}.*--data DIR"),
        ({"data": tmp_path / "no"}, "no such data folder"),
        ({"file": tmp_path / "no.jsonl"}, "no such file"),
        ({"file": tmp_path / "empty.jsonl"}, "holds no question"),
        ({"file": tmp_path / "bytes.jsonl"}, "not UTF-8"),
    ):
        with pytest.raises(DataError, match=said) as caught:
            load_general(**given)
        assert "\n" not in str(caught.value)


def test_the_published_file_is_read():
    """Its first questions are as they were counted by other means."""
    if not (DATA / FILE).is_file():
        pytest.skip(f"no data: {FILE} is not below {DATA} (set KNOWPATCH_DATA)")
    every = load_general(data=DATA, limit=10_000).probes
    assert len(every) == 1221
    assert sum(len(probe.choices) < 5 for probe in every) == 24
    assert every[0].choices == ("bank", "library", "department store", "mall", "new york")
    assert every[0].expected == "bank"
    assert load_general(data=DATA).probes == every[:MOST]


# -- dealing ---------------------------------------------------------------------------------------


def test_questions_are_dealt_in_turn():
    """Each to one case that edits something; where none does, to none."""
    request = EditRequest(prompt="Anna lives in", target="Lyon", subject="Anna")
    own = Probe(REWRITE, "Anna lives in", accepted("Lyon"))
    case = Case("1", (request,), (own,))
    cases = [case, replace(case, requests=()), replace(case, unusable="damaged"), case]
    probes = [question(choices=("up", str(i))) for i in range(5)]
    found = dealt(cases, probes)
    assert [c.of(GENERAL) for c in found] == [tuple(probes[::2]), (), (), tuple(probes[1::2])]
    assert all(c.of(REWRITE) == (own,) for c in found)
    assert dealt(cases[1:3], probes) == tuple(cases[1:3])


# -- the choice ------------------------------------------------------------------------------------


class Canned:
    """Knows the log-probabilities of each choice's tokens."""

    def __init__(self, **logprobs: list[float]):
        self.logprobs = logprobs

    def force(self, prompt: str, choice: str) -> Future[Scored]:
        future: Future[Scored] = Future(lambda: None)
        found = tuple(self.logprobs[choice])
        future.set(Scored(tuple(range(len(found))), (False,) * len(found), found))
        return future


def values(name: str, before: Any, after: Any, *probes: Probe) -> Any:
    asked = catalogue()[name].ask(Case("1", (), probes), before, after)
    return None if asked is None else asked()


def test_the_mean_is_normalised_by_length_and_the_sum_is_not():
    """A: -1 in one token; B: -0.8 and -0.4, mean -0.6 and sum -1.2."""
    model = Canned(a=[-1.0], b=[-0.8, -0.4])
    right_b, right_a = question("b", ("a", "b")), question("a", ("a", "b"))
    assert values("general_mc", model, model, right_b, right_a).after == {"": [1.0, 0.0]}
    assert values("general_sum_mc", model, model, right_b, right_a).after == {"": [0.0, 1.0]}


def test_equally_likely_choices_share():
    """Of two that lead each is taken by half; what does not lead is nothing."""
    model = Canned(a=[-1.0], b=[-1.0], c=[-2.0])
    each = [question(right, ("a", "b", "c")) for right in "abc"]
    assert values("general_mc", model, model, *each).after == {"": [0.5, 0.5, 0.0]}


def test_before_after_and_the_same_choice():
    """Both models by the same code; the same choice counts, right or wrong."""
    before, after = Canned(a=[-1.0], b=[-2.0], c=[-3.0]), Canned(a=[-1.0], b=[-2.0], c=[-0.5])
    probes = [question("a", ("a", "b")), question("b", ("a", "b")), question("a", ("a", "c"))]
    score = values("general_mc", before, after, *probes)
    assert (score.before, score.after) == ({"": [1.0, 0.0, 1.0]}, {"": [1.0, 0.0, 0.0]})
    same = values("general_same_mc", before, after, *probes)
    assert (same.before, same.after) == (None, {"": [1.0, 1.0, 0.0]})
    for name in NAMES:
        assert values(name, before, after) is None
        assert values(name, before, after, question("a", ())) is None


def test_a_model_that_says_nothing_is_not_scored_as_wrong():
    """Where a probability is not a number the value is none either, which no row takes as 0."""
    broken = Canned(a=[math.nan], b=[-1.0])
    for name in NAMES:
        assert math.isnan(values(name, broken, broken, question("a", ("a", "b"))).after[""][0])


def test_the_value_is_the_share_of_questions():
    """Not the mean of the cases' shares: 1 of 1 and 1 of 3 is 2 of 4."""
    one = catalogue()["general_mc"]
    records = [one.columns({"": [1.0]}), one.columns({"": [1.0, 0.0, 0.0]}), one.columns({})]
    assert records == [{"sum": 1, "questions": 1}, {"sum": 1, "questions": 3}, {}]
    found = bootstrap(records, one.combine, share=True)
    assert (found.mean, found.n) == (0.5, 2)
    assert one.combine({}) is None


def test_all_the_same_is_no_certainty():
    """Where every choice stays the interval is Wilson's, over the cases."""
    one = catalogue()["general_same_mc"]
    records = [one.columns({"": [1.0] * (1 + i % 2)}) for i in range(40)]
    found = bootstrap(records, one.combine, share=True)
    assert (found.mean, found.low, found.high) == (1.0, *wilson(40, 40))


def test_a_model_takes_what_its_logits_say(known):
    """By log-softmax of a plain forward pass over question and choice, token by token."""
    model = known()
    probe = Probe(
        GENERAL, "The capital of France is", (("Paris",),), choices=("Rome", "Paris", "blue Cairo")
    )
    tokenizer = model.view.tokenizer
    plain = {}
    start = len(tokenizer(probe.prompt)["input_ids"])
    for choice in probe.choices:
        ids = tokenizer(f"{probe.prompt} {choice}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logs = model.model(input_ids=ids).logits[0].log_softmax(-1)
        plain[choice] = [logs[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])]
    asker = Asker(Ask(model))
    for choice, logprobs in plain.items():
        assert asker.force(probe.prompt, choice).result().logprobs == pytest.approx(
            logprobs, abs=1e-4
        )
    assert max(plain, key=lambda c: sum(plain[c]) / len(plain[c])) == "Paris"
    for name in NAMES:
        assert values(name, asker, asker, probe).after == {"": [1.0]}
    wrong = replace(probe, answers=accepted("Rome"))
    assert values("general_mc", asker, asker, wrong).after == {"": [0.0]}


def test_general_questions_are_asked_only_when_wanted():
    """They are not in the standard suite, and are a group."""
    assert not any(one.general for one in chosen(None))
    assert [one.name for one in chosen(["general"])] == list(NAMES)


# -- in a plan -------------------------------------------------------------------------------------


@pytest.fixture
def facts(tmp_path) -> Path:
    """Three facts to edit."""
    cases = [
        Case(
            str(i),
            (EditRequest(prompt=p, subject=p.split()[-2], target=t, old=tiny.FACTS[p]),),
            (Probe(REWRITE, p, accepted(t), request=0),),
        )
        for i, (p, t) in enumerate(tiny.EDITS.items())
    ]
    return write_cases(cases, tmp_path / "facts.jsonl")


@pytest.fixture
def asked(tmp_path) -> Path:
    """Five questions, below a data folder."""
    lines = [
        {"question": p, "choices": ["Madrid", "green", a], "answer": a}
        for p, a in list(tiny.FACTS.items())[:5]
    ]
    return written(tmp_path / "data" / FILE, *lines)


def general(rows: list[Row], name: str, side: str = "after") -> Mapping[int, tuple[float, ...]]:
    return {row.index: getattr(row.scores[name], side)[""] for row in rows if name in row.scores}


@pytest.mark.parametrize("mode", ["single", "batch", "sequential"])
def test_each_question_is_asked_once_in_any_mode(folder, facts, asked, tmp_path, mode: str):
    """Dealt out over the cases; the value is the share of all questions, before and after."""
    fields = {
        "methods": ["ft"],
        "datasets": [str(facts)],
        "modes": [mode],
        "data": tmp_path / "data",
    }
    plan = make_plan({**fields, "metrics": ["success_tf", "general"], "ages": [2], "questions": 4})
    (cell,) = Runner(load(str(folder)), plan, tmp_path / "out").run()
    rows = [row for row in rows_of(cell.folder) if row.final]
    assert [row.error for row in rows] == [None] * 3
    for name in NAMES:
        assert {i: len(found) for i, found in general(rows, name).items()} == {0: 2, 1: 1, 2: 1}
    assert facts_of(cell.folder).versions["general"].startswith("4 of ")

    found = summarise(cell_of(cell.folder), catalogue()).metrics["general_mc"]
    for side, summary in (("after", found.after), ("before", found.before)):
        every = [value for values in general(rows, "general_mc", side).values() for value in values]
        assert summary.mean == pytest.approx(sum(every) / 4)
    assert found.gain.mean == pytest.approx(found.after.mean - found.before.mean)
    assert found.queries == 4


def test_a_missing_file_stops_a_plan_that_names_the_metric(folder, facts, tmp_path, caplog):
    """Before anything runs; where all metrics are wanted, they are measured without it."""
    model, fields = load(str(folder)), {"methods": ["ft"], "datasets": [str(facts)]}
    for more in (
        {"metrics": ["general_mc"]},
        {"metrics": ["all"], "general": tmp_path / "no.jsonl"},
    ):
        with pytest.raises(DataError):
            Runner(model, make_plan({**fields, "data": tmp_path, **more}), tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        plan = make_plan({**fields, "data": tmp_path, "metrics": ["all"]})
        assert Runner(model, plan, tmp_path / "out").general is None
    assert FILE in caplog.text
    assert not (tmp_path / "out").exists()


def test_a_plan_names_questions_beside_it(folder, facts, tmp_path):
    """A file of one's own, from the plan's place, and how many of it."""
    written(tmp_path / "mine.jsonl", FISH, PUBLISHED)
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "methods: ft\ndatasets: facts.jsonl\nmetrics: general_mc\n"
        "general: mine.jsonl\nquestions: 1\n"
    )
    found = read_plan(plan)
    assert found.general == tmp_path / "mine.jsonl"
    assert found.absolute() == found
    assert len(Runner(load(str(folder)), found, tmp_path / "out").general.probes) == 1
    with pytest.raises(OptionError, match="questions"):
        make_plan({"methods": ["ft"], "datasets": ["x.jsonl"], "questions": 0})
