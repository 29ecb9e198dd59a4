"""Suggested blocks: the card's rules by hand, the pilot against plain questions, the command."""

from __future__ import annotations

import pytest
import torch
from shell import run as shell

from knowpatch.editing import choose, edit
from knowpatch.errors import OptionError
from knowpatch.locate import pilot, suggest
from knowpatch.locate.pilot import (
    Pilot,
    Place,
    measured,
    option_of,
    pilot_facts,
    places,
    relative,
    score,
)
from knowpatch.locate.suggest import auc, by_curve, kept_records, separations
from knowpatch.method import METHODS
from knowpatch.models.passes import Tap
from knowpatch.request import EditRequest

PROMPT = "The capital of France is"
FACT = Pilot(
    EditRequest(prompt=PROMPT, subject="France", target="Rome"),
    (f"Therefore {PROMPT}", f"You know {PROMPT}"),
    ("The capital of Japan is", "The capital of Egypt is"),
)
FT = {"learning_rate": 0.01, "steps": 25}


# -- rules -----------------------------------------------------------------------------------------


def test_a_curves_peak_and_range_by_hand():
    """(0, 1, 4, 9, 10, 8, 3, 1): moving average 9 at 4; up to there, at 70 % of 10: 3 and 4."""
    assert by_curve((0, 1, 4, 9, 10, 8, 3, 1)) == (4, (3, 4))
    assert by_curve((9, 9, 9, 9, 9, 9, 9, 9.5, 9)) == (6, (2, 3, 4, 5, 6))


def test_auc_by_hand():
    """{.1, .2} and {.3, .15}: three of four pairs; equals count half."""
    assert auc([0.1, 0.2], [0.3, 0.15]) == 0.75
    assert auc([1.0], [1.0]) == 0.5


def test_the_score_is_the_harmonic_mean_less_the_cost():
    """Of 1, .5, .25: 3 / 7; a rate of nothing is nothing; a missing one no score."""
    rates = {"success": 1.0, "paraphrase": 0.5, "kept": 0.25}
    assert score(rates) == pytest.approx(3 / 7)
    assert score({**rates, "norm": 0.2}) == pytest.approx(3 / 7 - 0.1)
    assert score({**rates, "kept": 0.0, "norm": 0.2}) == pytest.approx(-0.1)
    assert score({"success": 1.0}) is None


def test_places_of_one_block_and_of_several():
    """The method's own first and unsaid; at the subject the last two blocks are left out."""
    one = places(choose("ft"), 30)
    assert [place.blocks for place in one] == [
        (4,), (3,), (6,), (9,), (12,), (16,), (20,), (24,), (27,)
    ]  # fmt: skip
    assert one[0].options == {}
    assert one[0].setting == ""
    assert one[2].setting == "--set layer=6"
    several = places(choose("memit"), 30)
    assert several[0] == Place((4, 5, 6, 7, 8), {})
    assert Place((2, 3, 4, 5, 6), {"layers": [2, 3, 4, 5, 6]}) in several
    assert several[2].setting == "--set layers=2-6"
    assert max(place.blocks[-1] for place in places(choose("rome"), 10)) == 7
    assert all(len(place.blocks) <= 5 for place in places(choose("kn"), 30)[1:])


@pytest.mark.parametrize("name", ["ft", "memit", "grace", "lora"])
def test_a_setting_is_what_edit_takes(name):
    """The line that is printed sets the blocks that are meant."""
    from knowpatch.method import parse_options

    for place in places(choose(name), 30)[1:]:
        options = parse_options([place.setting.removeprefix("--set ")])
        assert choose(name, options).layers(30) == place.blocks


def test_methods_without_blocks_have_nothing_to_suggest():
    """Told in one line."""
    with pytest.raises(OptionError, match="nothing to suggest"):
        option_of(METHODS.get("ice"))


def test_pilot_facts_bring_wordings_and_neighbours():
    """Three paraphrases, two neighbours; not more facts than there are."""
    some = pilot_facts(12)
    assert len({fact.request.prompt for fact in some}) == 12
    for fact in some:
        assert len(fact.paraphrases) == 3
        assert all(fact.request.subject in text for text in fact.paraphrases)
        assert len(fact.neighbours) == 2
        assert all(fact.request.subject not in text for text in fact.neighbours)
    assert pilot_facts(2, start=5) == some[5:7]
    with pytest.raises(OptionError, match="61 pilot facts"):
        pilot_facts(1, start=60)


# -- measuring -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_a_record_is_what_the_edited_model_says(known, architecture):
    """Rates by plain questions to the merged model, which is given back."""
    model, method = known(architecture), choose("ft", {**FT, "layer": 1})
    (record,) = measured(model, method, [FACT])
    assert not model.live

    def leading(prompt):
        ids = model.encode(prompt).ids
        return int(model.model(torch.tensor([ids])).logits[0, -1].argmax())

    def p(prompt, word):
        ids = model.encode(prompt).ids
        token = model.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        assert len(token) == 1
        return float(model.model(torch.tensor([ids])).logits[0, -1].detach()[token[0]])

    kept = {prompt: leading(prompt) for prompt in FACT.neighbours}
    patch = edit(model, FACT.request, method=method)
    assert record["norm"] == pytest.approx(relative(model, patch), rel=1e-3)
    with model.applied(patch):
        took = [p(text, "Rome") > p(text, "Paris") for text in (PROMPT, *FACT.paraphrases)]
        stayed = [leading(prompt) == kept[prompt] for prompt in FACT.neighbours]
    assert record["success"] == took[0]
    assert record["paraphrase"] == pytest.approx(sum(took[1:]) / 2)
    assert record["kept"] == pytest.approx(sum(stayed) / 2)


def test_a_memory_costs_no_weight(known):
    """Norm 0; what it recognises is measured like anything else."""
    model = known("llama")
    method = choose("grace", {"layer": 2, "radius": 0.001, "steps": 20})
    (record,) = measured(model, method, [FACT])
    assert record["norm"] == 0
    assert record["kept"] == 1


def test_a_fact_that_cannot_be_edited_is_left_out(known, monkeypatch):
    """One that fails takes no other with it."""
    from knowpatch.errors import EditError

    whole = pilot.edit_each

    def each(model, requests, *, method):
        if any(request.target == "Cairo" for request in requests):
            raise EditError("no")
        return whole(model, requests, method=method)

    monkeypatch.setattr(pilot, "edit_each", each)
    other = Pilot(FACT.request.model_copy(update={"target": "Cairo"}), (), FACT.neighbours)
    model = known("llama")
    found = measured(model, choose("ft", {**FT, "layer": 1}), [FACT, other])
    assert found[0] is not None
    assert found[1] is None


def test_separations_are_distances_of_inputs(known):
    """One block's against plain captures."""
    view = known("llama").view
    found = separations(view, [FACT])
    module = view.roles.linear("mlp.out", 2).module

    def end(prompt):
        ids = view.encode(prompt).ids
        tap = Tap(module, "input")
        return view.run([ids], taps=[tap]).at(tap, [(0, len(ids) - 1)])[0]

    own = end(PROMPT)
    inside, outside = (
        [float((own - end(text)).norm()) for text in group]
        for group in (FACT.paraphrases, FACT.neighbours)
    )
    assert set(found) == {0, 1, 2, 3}
    assert found[2] == auc(inside, outside)


def test_what_was_tried_is_kept(known, monkeypatch):
    """The second time nothing is edited; another place, or other facts, are."""
    model, method, calls = known("llama"), choose("ft", {**FT, "steps": 1}), []
    whole = suggest.measured

    def count(*given):
        calls.append(given)
        return whole(*given)

    monkeypatch.setattr(suggest, "measured", count)
    place = Place((2,), {"layer": 2})
    first = kept_records(model, method, place, [FACT])
    assert kept_records(model, method, place, [FACT]) == first
    assert len(calls) == 1
    kept_records(model, method, Place((1,), {"layer": 1}), [FACT])
    assert len(calls) == 2


# -- the command -----------------------------------------------------------------------------------


def test_the_command_names_blocks_and_says_how_sure_it_is(folder, tmp_path):
    """A table, a line that edit accepts, a picture, JSON; what cannot be used in one line."""
    asked = ("locate", "suggest", "--model", folder, "--facts", "2", "--set", "steps=8", "--set",
             "learning_rate=0.01")  # fmt: skip
    shown = shell(*asked, "--out", "s.png", cwd=tmp_path)
    assert shown.code == 0, shown
    assert "suggested" in shown.out
    assert "next       knowpatch edit PROMPT --method ft" in shown.out
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
    told = shell(*asked, "--json", cwd=tmp_path).json()
    assert told["own"] == told["tried"][0]["blocks"]
    assert told["suggested"] in [one["blocks"] for one in told["tried"]]
    best = max(told["tried"], key=lambda one: one["score"]["mean"])
    assert told["suggested"] == best["blocks"]
    assert (told["judged"] is None) == (told["suggested"] == told["own"])
    assert len(told["located"]["curve"]) == 4
    for wrong, words in (
        (("--method", "ice"), "no option for the blocks"),
        (("--facts", "1"), "--facts"),
        (("--by", "luck"), "unknown locator"),
        (("--method", "ft", "--set", "depth=1"), "unknown option 'depth'"),
    ):
        refused = shell("locate", "suggest", "--model", folder, *wrong, cwd=tmp_path)
        assert refused.code == 2
        assert words in refused.complaints[-1]
