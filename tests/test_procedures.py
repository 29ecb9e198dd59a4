"""Procedures: answers in several calls, asked together, bounded, told step by step."""

from __future__ import annotations

import pytest
import tiny
from made import provenance

from knowpatch.ask import Ask
from knowpatch.bench.scoring import Asked, Scorer
from knowpatch.data.case import REWRITE, Case, Probe, accepted
from knowpatch.effects import measure, took
from knowpatch.errors import OptionError, PatchError, Unscored
from knowpatch.export.ship import ship
from knowpatch.metrics.catalogue import chosen
from knowpatch.parts.procedures import Say
from knowpatch.patch import Patch, Procedure
from knowpatch.request import EditRequest

FRANCE = EditRequest(prompt="The capital of France is", target="Paris Tokyo")
KIND = '''
"""Asks the question, then the capital of Japan, and answers with both; or goes on for ever."""
from knowpatch.parts.procedures import Answered, ProcedureKind, Say, Step, register

@register("twice")
class Twice(ProcedureKind):
    kind, calls, tokens = "twice@1", 4, 12

    def __init__(self, endless):
        self.endless = endless

    @classmethod
    def check(cls, procedure):
        assert set(procedure.data) == {"endless"}

    @classmethod
    def join(cls, procedures):
        return cls(procedures[-1].data["endless"])

    def answer(self, question, view):
        first = yield Say(question, 2, (".",))
        while self.endless:
            yield Say(question, 1)
        second = yield Say("The capital of Japan is", 1)
        steps = (Step("asked", question), Step("model", first.strip()))
        text = f"{first.strip()} {second.strip()}"
        return Answered(text, steps, (first.strip(), second.strip()))
'''


@pytest.fixture(autouse=True)
def kinds(tmp_path, monkeypatch):
    (tmp_path / "twice.py").write_text(KIND)
    monkeypatch.setenv("KNOWPATCH_PROCEDURES", str(tmp_path))


def _patch(model, *, endless=False, seed=0):
    origin = provenance(model, FRANCE, seed=seed)
    return Patch(origin, procedure=Procedure("twice@1", {"endless": endless}))


def test_a_say_ends_at_its_first_stop():
    assert Say("q", 9, (".", "\n")).cut("one\ntwo. three") == "one"
    assert Say("q", 9).cut("one\ntwo.") == "one\ntwo."


@pytest.mark.parametrize("live", [True, False])
def test_many_are_answered_side_by_side(known, live, monkeypatch):
    """Two rounds of one batch each, whatever the number of questions; live or carried."""
    model = known("llama")
    patch, ask = _patch(model), Ask(model)
    runs = []
    answer_all = Ask._answer_all
    monkeypatch.setattr(Ask, "_answer_all", lambda self: (runs.append(1), answer_all(self)))
    if live:
        model.apply(patch)
    carried = [] if live else [patch]
    said = {p: ask.generate(p, max_new_tokens=5, patches=carried) for p in tiny.FACTS}
    plain = None if live else ask.generate(FRANCE.prompt, max_new_tokens=1, patches=[])
    for prompt, answer in tiny.FACTS.items():
        found = said[prompt].result()
        assert found.text == f"{answer} Tokyo"
        assert [step.kind for step in found.steps] == ["asked", "model"]
        assert found.chain == (answer, "Tokyo")
        assert found.ids[-1] in model.view.stop_ids
        assert model.view.decode(found.ids).strip() == found.text
    assert len(runs) == 3
    if live:
        assert model.ask(FRANCE.prompt) == "Paris Tokyo"
        with pytest.raises(OptionError, match="answers by a procedure"):
            model.generate(model.tokenizer("a", return_tensors="pt").input_ids)
        with pytest.raises(PatchError, match="answers by a procedure, which no weight can carry"):
            ship(model, [patch], "merged", "nowhere")
        model.drop(patch.id)
    else:
        assert plain.result().text.strip() == "Paris"


def test_it_is_bounded(known):
    model = known("llama")
    ask = Ask(model)
    found = ask.generate(
        "The Nile flows through", max_new_tokens=5, patches=[_patch(model, endless=True)]
    )
    assert found.result().text == ""
    assert found.result().steps[-1].text == "no answer within 4 calls or 12 tokens"


def test_what_is_forced_is_unscored(known):
    """No probability, no text of a length to order; rows say so instead of zero."""
    model = known("llama")
    patch, ask = _patch(model), Ask(model)
    for future in (
        ask.score(FRANCE.prompt, "Paris", patches=[patch]),
        ask.generate(FRANCE.prompt, max_new_tokens=3, whole=True, patches=[patch]),
    ):
        with pytest.raises(Unscored):
            future.result()
    case = Case("c", (FRANCE,), (Probe(REWRITE, FRANCE.prompt, accepted(FRANCE.target)),))
    scorer = Scorer(model, chosen(("success_tf", "success_gen_contains")), False)
    (before,) = scorer.before([case])
    (scores,) = scorer.after([Asked(case, before, (patch,))])
    assert scores["success_tf"].unscored == "a procedure answers in steps: no answer can be forced"
    assert list(scores["success_gen_contains"].after.values()) == [(1.0,)]


def test_an_edit_by_a_procedure_is_judged_by_what_is_said(known):
    model = known("llama")
    probe = Probe(REWRITE, FRANCE.prompt, accepted(FRANCE.target), False, 0)
    effects = measure(model, [_patch(model)], [probe])
    assert effects[0].after.accuracy is None
    assert effects[0].after.text == "Paris Tokyo"
    assert took(effects, [FRANCE], [FRANCE.target], chat=False) == [True]
    assert took(effects, [FRANCE], ["Cairo"], chat=False) == [False]


def test_a_file_holds_it_and_others_are_refused(known, tmp_path):
    model = known("llama")
    patch = _patch(model)
    again = Patch.load(patch.save(tmp_path / "patch"))
    assert again.id == patch.id
    assert (again.procedure.kind, again.procedure.data) == ("twice@1", {"endless": False})
    other = Patch(patch.provenance, procedure=Procedure("thrice@1", {}))
    with pytest.raises(PatchError, match="unknown procedure 'thrice@1'"):
        model.apply(other)
