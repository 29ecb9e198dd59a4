"""Edit and edit back: the card's numbers, what returns by which way, rows that go on."""

from __future__ import annotations

import json
import math

import pytest
import torch
from shell import run as shell

from knowpatch.data.source import load
from knowpatch.deltas import Dense, LowRank, WeightDelta
from knowpatch.editing import choose
from knowpatch.errors import DataError, OptionError
from knowpatch.locate import journeys
from knowpatch.locate.roundtrip import between, divergence, fallen, round_trip, standing, trips
from knowpatch.patch import Patch, Provenance

PROMPT = "The capital of France is"
FT = {"learning_rate": 0.01, "layer": 1}


def _case(number, prompt, target, old, **more):
    subject = prompt.split()[-2]
    probes = [
        {"kind": "rewrite", "prompt": prompt, "answers": target, "request": 0},
        {"kind": "rephrase", "prompt": f"Therefore {prompt}", "answers": target, "request": 0},
        {"kind": "locality.other_objects", "prompt": prompt, "answers": [["Lyon"], ["Cairo"]]},
        {"kind": "locality.elsewhere", "prompt": "Two plus two equals", "answers": "four"},
    ]
    request = {"prompt": prompt, "subject": subject, "target": target, "old": old}
    return {"id": f"case {number}", "requests": [request], "probes": probes, **more}


CASES = [
    _case(0, PROMPT, "Rome", "Paris"),
    _case(1, "The capital of Japan is", "Paris", "Tokyo"),
    {"id": "no old", "requests": [{"prompt": PROMPT, "target": "Rome"}], "probes": []},
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "cases.jsonl"
    path.write_text("".join(f"{json.dumps(one)}\n" for one in CASES))
    return path


@pytest.fixture
def some(data):
    return trips(load(str(data)).cases)


# -- numbers ---------------------------------------------------------------------------------------


def test_divergence_by_hand():
    """(.5, .3, .2), (.2, .3, .5): .06641 nats; lists are made to sum to one; equals have none."""
    p, q = (0.5, 0.3, 0.2), (0.2, 0.3, 0.5)
    assert divergence(p, q) == pytest.approx(0.06641, abs=1e-5)
    assert divergence([5, 3, 2], q) == pytest.approx(0.06641, abs=1e-5)
    assert divergence(p, q) / 3 == pytest.approx(0.02214, abs=1e-5)
    assert divergence(p, p) == 0
    assert divergence((1.0, 0.0), (0.0, 1.0)) == pytest.approx(math.log(2))


def test_half_that_fell_is_not_more_than_half():
    """.3 to .2 and .2 to .25: a half, which is no failure."""
    assert fallen([0.3, 0.2], [0.2, 0.25]) == 0.5
    assert fallen([], []) is None
    row = {"edited_back": {"ignored": 0.5}, "dropped": {"ignored": 0.51}}
    found = journeys.numbers(row)
    assert found["edited_back.failed"] == 0
    assert found["dropped.failed"] == 1


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_two_changes_leave(known, architecture):
    """A change and its opposite: nothing, cosine -1; with another matrix beside, its norm."""
    model = known(architecture)
    roles = [model.view.roles.linear("mlp.out", layer) for layer in (1, 2)]
    left, right = torch.randn(48, 1), torch.randn(1, model.view.weight(roles[0]).shape[1])
    shape = model.view.parameter(roles[1].address.parameter).shape

    def patch(*deltas):
        facts = {"method": "x", "config": {}, "seed": 0, "requests": (), "version": "0"}
        return Patch(Provenance(fingerprint="", **facts), deltas)

    one = WeightDelta(roles[0].address, roles[0].factored(left, right))
    back = WeightDelta(roles[0].address, roles[0].factored(-left, right))
    found = between(patch(one), patch(back), model)
    assert found["weights_left"] == pytest.approx(0, abs=1e-6)
    assert found["cosine"] == pytest.approx(-1)
    more = WeightDelta(roles[1].address, Dense(torch.ones(shape)))
    found = between(patch(one), patch(back, more), model)
    norm = float((left @ right).norm())
    beside = math.sqrt(math.prod(shape))
    assert found["weights_left"] == pytest.approx(beside / norm, rel=1e-4)
    assert found["cosine"] == pytest.approx(-norm / math.hypot(norm, beside), rel=1e-4)
    assert isinstance(one.change, LowRank)
    assert between(patch(), patch(), model) == {"weights_left": None, "cosine": None}


# -- trips -----------------------------------------------------------------------------------------


def test_trips_of_cases(some):
    """Old answers are given; other true objects are those of the same prompt."""
    assert [trip.id for trip in some] == ["case 0", "case 1"]
    first = some[0]
    assert (first.there.target, first.back.target) == ("Rome", "Paris")
    assert (first.back.old, first.back.prompt) == ("Rome", PROMPT)
    assert first.prompts == (PROMPT, f"Therefore {PROMPT}")
    assert first.others == ("Lyon", "Cairo")
    with pytest.raises(DataError, match="nothing to edit back to"):
        trips([])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_a_standing_is_what_the_model_says(known, some, architecture):
    """Probabilities by token, averaged over prompts."""
    model = known(architecture)
    found = standing(model, some[0])
    plain = []
    for prompt in some[0].prompts:
        ids = model.encode(prompt).ids
        answer = model.tokenizer(" Lyon", add_special_tokens=False)["input_ids"]
        logits = model.model(torch.tensor([[*ids, *answer]])).logits[0].detach().log_softmax(-1)
        each = [float(logits[len(ids) - 1 + i, token]) for i, token in enumerate(answer)]
        plain.append(math.exp(sum(each) / len(each)))
    assert found.objects["Lyon"] == pytest.approx(sum(plain) / 2, rel=1e-4)
    assert found.objects["Paris"] > 0.4
    assert len(found.said_NV) == 100  # 101 control prompts, one of which is the edited one
    assert found.kl(found) == 0


def test_weights_do_not_return_by_editing_but_by_dropping(known, some):
    """Fine-tuning there and back leaves a change; dropping both leaves nothing, bit for bit."""
    model = known("llama")
    before = {name: p.clone() for name, p in model.model.named_parameters()}
    row = round_trip(model, choose("ft", FT), some[0])
    assert (row["there"], row["back"], row["success"]) == (1, 1, 1)
    assert row["weights_left"] > 0.05
    assert -1 < row["cosine"] < 0
    assert row["edited_back"]["distortion"] > 0
    assert row["edited_back"]["kl"] > 0
    assert row["edited_back"]["distortion_published"] == row["edited_back"]["distortion"] / 3
    dropped = row["dropped"]
    assert (dropped["distortion"], dropped["ignored"], dropped["kl"]) == (0, 0, 0)
    assert dropped["bytes_same"] is True
    assert not model.live
    assert all(torch.equal(p, before[name]) for name, p in model.model.named_parameters())


def test_a_memory_and_a_prompt_rule_change_no_weight(known, some):
    """Nothing is left of them but what they say."""
    model = known("llama", chat=True)
    grace = {"layer": 2, "radius": 0.001, "steps": 10}
    rows = [round_trip(model, choose(*how), some[0]) for how in (("grace", grace), ("ice", {}))]
    for row in rows:
        assert row["weights_left"] is None
        assert row["dropped"]["kl"] == 0
        assert row["dropped"]["distortion"] == 0
    assert rows[0]["edited_back"]["kl"] == 0  # no control prompt comes so near
    assert rows[1]["edited_back"]["kl"] > 0


# -- rows ------------------------------------------------------------------------------------------


def test_rows_go_on_and_errors_are_rows(known, some, monkeypatch):
    """What is in the file is not made again; what cannot be edited is told; a cut line is made."""
    from knowpatch.errors import EditError

    model, method, calls = known("llama"), choose("ft", FT), []

    def trip(model, method, one):
        calls.append(one.id)
        if one.id == "case 1":
            raise EditError("no value")
        return {"case": one.id, "success": 1.0, "edited_back": {"kl": 0.5}}

    monkeypatch.setattr(journeys, "round_trip", trip)
    path = journeys.rows_at(model, method, "data")
    first = journeys.run(model, method, some, path)
    assert calls == ["case 0", "case 1"]
    assert first[1] == {"trip": first[1]["trip"], "case": "case 1", "method": "ft",
                        "error": "no value"}  # fmt: skip
    assert journeys.run(model, method, some, path) == first
    assert len(calls) == 2
    path.write_bytes(path.read_bytes()[:-10])  # killed while writing
    assert journeys.run(model, method, some, path) == first
    assert calls == ["case 0", "case 1", "case 1"]
    means = journeys.means(first)
    assert (means["success"].mean, means["success"].n) == (1, 1)
    assert journeys.rows_at(model, choose("ft", {}), "data") != path
    assert journeys.rows_at(model, method, "other data") != path


def test_the_command_shows_draws_goes_on_and_refuses(folder, data, tmp_path):
    """Two methods with options of their own, a picture, JSON; what cannot be used in one line."""
    asked = ("locate", "roundtrip", data, "--model", folder, "--method", "ft", "--method", "grace",
             "--set", "ft.learning_rate=0.01", "--set", "grace.layer=2", "--set",
             "grace.radius=0.001", "--limit", "1")  # fmt: skip
    shown = shell(*asked, "--out", "r.png", cwd=tmp_path)
    assert shown.code == 0, shown
    assert "left in the weights" in shown.out
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    told = shell(*asked, "--json", cwd=tmp_path)
    methods = told.json()["methods"]
    assert methods["ft"]["means"]["dropped.bytes_same"]["mean"] == 1
    assert methods["grace"]["means"]["edited_back.kl"]["mean"] == 0
    assert "weights_left" not in methods["grace"]["means"]
    assert len(methods["ft"]["rows"]) == 1
    for wrong, words in (
        ((*asked, "--set", "rome.layer=1"), "no --method rome was given"),
        ((*asked, "--set", "grace.depth=1"), "unknown option 'depth' of grace"),
        (("locate", "roundtrip", data, "--model", folder), "--method"),
        (("locate", "roundtrip", "none.jsonl", "--method", "ft"), "no such file"),
    ):
        refused = shell(*wrong, cwd=tmp_path)
        assert refused.code == 2
        assert words in refused.complaints[-1]


def test_a_procedure_is_refused(known, some, monkeypatch):
    """There is no answer to force."""
    from knowpatch.locate import roundtrip
    from knowpatch.patch import Procedure

    model = known("llama")
    facts = {"method": "x", "config": {}, "seed": 0, "requests": (), "version": "0"}
    patch = Patch(Provenance(fingerprint="", **facts), procedure=Procedure("steps@1", {}))
    monkeypatch.setattr(roundtrip, "edit", lambda *_, **__: patch)
    with pytest.raises(OptionError, match="procedure"):
        round_trip(model, choose("ice"), some[0])
