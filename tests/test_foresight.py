"""What an edit may disturb, told before it is kept, on a tiny model that knows tiny.FACTS."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from made import state
from shell import FRANCE, run

from knowpatch.checks.foresight import NEAREST, foresee
from knowpatch.editing import edit
from knowpatch.models.passes import Tap
from knowpatch.parts.reach import Question, reach
from knowpatch.request import EditRequest

REQUEST = EditRequest(prompt=FRANCE[1], subject="France", target=tiny.EDITS[FRANCE[1]])
NILE = EditRequest(prompt="The Nile flows through", subject="Nile", target="Tokyo")


def test_sizes_and_reaches_are_what_a_plain_product_gives(known):
    """Norms by subtracting the merged matrices; reach from the key, by a product with the change;
    the model is left alone."""
    model = known("llama")
    first = edit(model, REQUEST, method="rome")
    (delta,) = first.deltas
    name = delta.address.parameter
    base = model.view.parameter(name).detach().clone()
    with model.applied(first):
        second = edit(model, NILE, method="rome")
        before = state(model)
        found = foresee(model, [second])
        assert state(model) == before
        between = model.view.parameter(name).detach().clone()
        with model.applied(second):
            after = model.view.parameter(name).detach().clone()
        (size,) = found.sizes
        assert size.parameter == name
        assert size.share == pytest.approx(float((after - between).norm() / base.norm()), rel=1e-4)
        assert size.total == pytest.approx(float((after - base).norm() / base.norm()), rel=1e-4)
        (near,) = found.earlier
        assert (near.edit, near.prompt) == (first.id, REQUEST.prompt)
        change_DI = second.deltas[0].change.left @ second.deltas[0].change.right
        added = [float((change_DI @ _key(model, one)).norm()) for one in (REQUEST, NILE)]
        assert near.reach == pytest.approx(added[0] / added[1], rel=1e-3)


def _key(model, request: EditRequest) -> torch.Tensor:
    """What enters the edited map at the last token of the subject."""
    layer = next(
        role
        for block in model.view.roles.blocks
        for role in block.linears.values()
        if role.address.parameter in model.view.originals
    )
    return _key_of(model, Tap(layer.module, "input"), request)


def _key_of(model, tap: Tap, request: EditRequest) -> torch.Tensor:
    end = request.prompt.index(request.subject) + len(request.subject)
    place = len(model.encode(request.prompt[:end]).ids) - 1
    run = model.view.run([model.encode(request.prompt).ids], taps=[tap])
    return run.at(tap, [(0, place)])[0]


def test_the_nearest_come_first_and_the_edited_prompt_is_not_among_them(known):
    """At most so many of each, by how strongly they are reached."""
    model = known("llama")
    found = foresee(model, [edit(model, REQUEST, method="rome")])
    assert len(found.controls) == NEAREST
    reaches = [one.reach for one in found.controls]
    assert reaches == sorted(reaches, reverse=True)
    assert REQUEST.prompt not in {one.prompt for one in found.controls}
    assert found.earlier == ()


def test_without_a_subject_an_edit_acts_where_it_acts_most(known):
    """Not at its prompt's end, where a trained change adds little or nothing."""
    model, request = known("llama"), REQUEST.model_copy(update={"subject": None})
    patch = edit(model, request, method="ft", options={"learning_rate": 1e-2})
    (delta,) = patch.deltas
    tap = Tap(delta.address.parameter.removesuffix(".weight"), "input")
    ids = model.encode(request.prompt).ids
    run = model.view.run([ids], taps=[tap])
    added_TD = run.at(tap, [(0, at) for at in range(len(ids))]) @ delta.change.delta.T
    assert added_TD[-1].norm() < 0.9 * added_TD.norm(dim=1).max()
    named = reach(model.view, patch, [Question(NILE.prompt, "Nile")]).tolist()
    key_D = _key_of(model, tap, NILE) @ delta.change.delta.T
    assert named == pytest.approx([float(key_D.norm() / added_TD.norm(dim=1).max())], rel=1e-3)


def test_what_changes_no_weight_reaches_nothing(known):
    """A prompt rule has no keys."""
    model = known("llama")
    found = foresee(model, [edit(model, REQUEST, method="ice")])
    assert found.facts() == {"sizes": (), "controls": (), "earlier": ()}


def test_the_report_tells_it(folder: Path, tmp_path: Path):
    """For a person, and as JSON, beside the room that is left."""
    learn = ("--set", "learning_rate=0.01", "--model", folder)
    out = run(*FRANCE, *learn, cwd=tmp_path).out
    assert "What it may disturb" in out
    assert "size    " in out
    told = run(*FRANCE, *learn, "--json", cwd=tmp_path).json()
    assert set(told["foresight"]) == {"sizes", "controls", "earlier"}
    assert told["foresight"]["sizes"][0]["share"] > 0
    assert "room" in told
