"""Patches of unlike methods on one model: in any order, live or carried, each taken back alone."""

from __future__ import annotations

import itertools

import pytest
import tiny
from made import state

from knowpatch.editing import edit
from knowpatch.models.sites import listening
from knowpatch.request import EditRequest

FRANCE, JAPAN, NILE = (
    EditRequest(prompt=prompt, subject=subject, target=tiny.EDITS[prompt])
    for prompt, subject in zip(tiny.EDITS, ("France", "Japan", "Nile"), strict=True)
)
SKY = EditRequest(prompt="The colour of the sky is", subject="sky", target="green")
HOW = {
    "lora": (JAPAN, {"layers": [2, 3], "learning_rate": 1e-2, "steps": 80}),
    "rome": (FRANCE, {"layer": 0, "clamp": 4.0, "kl_factor": 0.0, "tokens": 1000, "ridge": 0.01}),
    "grace": (NILE, {"layer": 3}),
    "scr": (SKY, {"encoder": "own"}),
}
"""In the order in which they are made: what changes weights moves the keys of what is keyed."""


@pytest.fixture
def patches(known):
    """A model, and a patch of each kind, each made on the model as the earlier ones leave it."""
    model = known("llama")
    made = {}
    with model.growing() as add:
        for name, (request, options) in HOW.items():
            made[name] = edit(model, request, method=name, options=options)
            add(made[name])
    return model, made


def _said(model, request):
    return model.ask(request.prompt, max_new_tokens=2)


def _scores(model, carried=None):
    """Accuracy of each edit's answer, forced."""
    from knowpatch.ask import Ask

    ask = Ask(model)
    found = {n: ask.score(r.prompt, r.target, patches=carried) for n, (r, _) in HOW.items()}
    return {name: future.result() for name, future in found.items()}


def test_in_any_order_each_edit_holds_and_goes(patches):
    """24 orders: all edits are there; one dropped takes only its own with it; then the base."""
    model, made = patches
    before, base = state(model), _scores(model)
    for number, order in enumerate(itertools.permutations(made)):
        with model.applied(*(made[name] for name in order)):
            found = _scores(model)
            assert found["grace"].accuracy == found["lora"].accuracy == 1, order
            # Of keys that crowd in 96 dimensions, clearly.
            assert found["rome"].probability > 5 * base["rome"].probability, order
            assert "green" in model.view.decode(model.encode(SKY.prompt).ids)
        assert state(model) == before
        if number % 8 == 0:
            for gone in order:
                rest = [made[name] for name in order if name != gone]
                with model.applied(*rest):
                    never = _scores(model)
                with model.growing() as add:
                    for name in order:
                        add(made[name])
                    model.drop(made[gone].id)
                    left = _scores(model)
                    model.apply(made[gone])
                assert left == never


def test_beside_is_what_is_merged(patches):
    """All four carried by a question give the numbers that all four live give."""
    model, made = patches
    every = list(made.values())
    with model.applied(*every):
        live = _scores(model)
    carried = _scores(model, every)
    for name in HOW:
        assert live[name].logprobs == pytest.approx(carried[name].logprobs, abs=1e-3)


def test_each_says_whether_it_acted(patches):
    """The codebook at its own prompt only, the memory at its own; the others change weights."""
    model, made = patches
    with model.applied(*made.values()):
        for name, (request, _) in HOW.items():
            with listening() as heard:
                _said(model, request)
            fired = {firing.patch for firing in heard if firing.fired}
            assert {firing.patch for firing in heard} == {made["grace"], made["scr"]}
            assert fired == ({made[name]} if name in ("grace", "scr") else set()), name
