"""Knowledge neurons and their tests, against plain interventions."""

from __future__ import annotations

import pytest
import tiny
import torch
from shell import run as shell

from knowpatch.edited import EditedModel
from knowpatch.editing import edit
from knowpatch.errors import ModelError, RequestError
from knowpatch.locate.facts import Fact
from knowpatch.locate.locators import located, locator
from knowpatch.locate.neurons import knowledge_neurons, scaled
from knowpatch.locate.suggest import separations
from knowpatch.parts.attribution import Search, agreed, attribute, coarse
from knowpatch.parts.spans import continuation
from knowpatch.request import EditRequest

PROMPT, REPHRASE = "The capital of France is", "It is well known that The capital of France is"


def _ids(model, prompt, answer):
    encoded = model.encode(prompt)
    return encoded.ids, continuation(model.tokenizer, encoded, answer)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_scaling_neurons_is_scaling_what_enters_the_map(known, architecture):
    """Activations set to zero by hooks, at every token, give the same probability."""
    model = known(architecture)
    view, neurons = model.view, [(1, 3), (1, 60), (3, 17)]
    pair = _ids(model, PROMPT, "Paris")
    for factor in (-1.0, 1.0):
        hooks = []
        for layer in (1, 3):
            index = [i for block, i in neurons if block == layer]

            def scale(_module, args, index=index, factor=factor):
                given = args[0].clone()
                given[..., index] *= 1 + factor
                return (given, *args[1:])

            module = model.model.get_submodule(view.roles.linear("mlp.out", layer).module)
            hooks.append(module.register_forward_pre_hook(scale))
        (plain,) = view.score([pair])
        for hook in hooks:
            hook.remove()
        with view.trying(scaled(view, neurons, factor)):
            (tried,) = view.score([pair])
        assert tried.probability == pytest.approx(plain.probability, rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_neurons_are_found_and_tested(known, architecture):
    """Those of both prompts, highest first; suppressing them costs more than random ones."""
    model = known(architecture)
    found = knowledge_neurons(model.view, [PROMPT, REPHRASE], "Paris", Search(points=5, share=0.5))
    ids = [_ids(model, prompt, "Paris") for prompt in (PROMPT, REPHRASE)]
    read = [attribute(model.view, range(4), *pair, points=5) for pair in ids]
    sets = [coarse(one.scores, 0.2) for one in read]
    assert {(one.layer, one.index) for one in found.neurons} == sets[0] & sets[1]
    assert found.coarse == tuple(map(len, sets))
    scores = [one.score for one in found.neurons]
    assert scores == sorted(scores, reverse=True)
    first = found.neurons[0]
    mean = sum(float(one.scores[first.layer][first.index]) for one in read) / 2
    assert first.score == pytest.approx(mean)
    assert first.prompts == 2
    total = sum(float(one.scores[2].sum()) for one in read) / 2
    assert found.layers[2] == pytest.approx(total)
    tests = {(one.action, one.neurons): one for one in found.tests}
    assert len(tests) == 4
    mine, random = tests["suppress", "found"], tests["suppress", "random"]
    assert max(mine.fact) < 0
    assert min(mine.fact) < min(random.fact)
    assert len(mine.controls) > 50


def test_what_is_found_is_what_the_method_changes(known):
    """The same search as the editing method's: its erased slots are these neurons."""
    model = known("llama")
    request = EditRequest(prompt=PROMPT, old="Paris", kind="erase")
    patch = edit(model, request, method="kn", options={"points": 5})
    changed = set()
    for delta in patch.deltas:
        layer = model.view.roles.block_of(delta.address.parameter)
        columns = (delta.change.left @ delta.change.right).abs().sum(0)
        changed |= {(layer, index) for index in columns.nonzero()[:, 0].tolist()}
    ids, answer = _ids(model, PROMPT, "Paris")
    assert agreed(model.view, [ids], answer, Search(points=5, share=0.4)).neurons == changed


def test_where_no_neuron_speaks_for_an_answer_there_is_no_test(known, monkeypatch):
    """Nothing found is told as nothing, not as an effect of zero."""
    from knowpatch.parts import attribution

    monkeypatch.setattr(attribution, "coarse", lambda scores, threshold: frozenset())
    found = knowledge_neurons(known("llama").view, [PROMPT], "Paris", Search(points=2))
    assert found.neurons == ()
    assert found.tests == ()
    assert found.coarse == (0,)


def test_blank_texts_are_refused(known):
    """In one line."""
    view = known("llama").view
    for prompts, answer in (([" "], "Paris"), ([PROMPT, ""], "Paris"), ([PROMPT], " ")):
        with pytest.raises(RequestError, match="is empty"):
            knowledge_neurons(view, prompts, answer, Search())


def test_the_command_shows_draws_and_refuses(folder, tmp_path):
    """Tables, a picture, strict JSON; what cannot be used in one line."""
    asked = ("locate", "neurons", PROMPT, "--target", "Paris", "--points", "4", "--model", folder)
    shown = shell(*asked, "--rephrase", REPHRASE, "--out", "n.svg", cwd=tmp_path)
    assert shown.code == 0, shown
    assert "knowledge neurons:" in shown.out
    assert "suppressed (zero)" in shown.out
    assert b"<svg" in (tmp_path / "n.svg").read_bytes()
    told = shell(*asked, "--json", cwd=tmp_path).json()
    assert told["answer"] == "Paris"
    assert len(told["layers"]) == 4
    assert {test["action"] for test in told["tests"]} == {"suppress", "enhance"}
    missing = shell("locate", "neurons", PROMPT, "--model", folder, cwd=tmp_path)
    assert missing.code == 2
    assert "--target" in missing.complaints[-1]
    blank = shell("locate", "neurons", PROMPT, "--target", " ", "--model", folder, cwd=tmp_path)
    assert blank.code == 2
    assert blank.complaints == ["knowpatch: a prompt or the answer is empty"]


def test_random_neurons_are_others_of_the_same_blocks(known):
    """As many in each block, none of those found."""
    from knowpatch.locate.neurons import _random

    view = known("llama").view
    found = {(0, 1), (0, 2), (3, 95)}
    drawn = _random(view, found, 0)
    assert sorted(layer for layer, _ in drawn) == [0, 0, 3]
    assert not set(drawn) & found
    assert drawn == _random(view, found, 0)
    assert torch.tensor(drawn)[:, 1].max() < 96


def test_a_mixture_of_experts_is_refused():
    """It has no one map whose inputs are neurons; told in one line, by every way to look there."""
    view = EditedModel.of(*tiny.fresh("mixtral")).view
    with pytest.raises(ModelError, match="no neurons to look at: its MLP is a mixture"):
        knowledge_neurons(view, [PROMPT], "Paris", Search(points=2))
    with pytest.raises(ModelError, match="no neurons to look at"):
        located(view, locator("neurons"), [Fact(PROMPT, "France")])
    assert separations(view, []) == {}
