"""Sparing: the change adds nothing at what is spared, and the edit itself is never among that."""

from __future__ import annotations

import pytest
import torch

from knowpatch.editing import choose, edit
from knowpatch.errors import OptionError
from knowpatch.method import Shape
from knowpatch.parts.pilots import pilots
from knowpatch.parts.sparing import BANK, MOST, SHARE, WITH_TEXT, elsewhere, span, strongest
from knowpatch.request import EditRequest

FACT = EditRequest(prompt="The capital of France is", subject="France", target="Rome")
QUICK = {"steps": 3, "learning_rate": 1e-2, "enough": 1e-9}
METHODS = {
    "ft": QUICK,
    "locft_bf": {**QUICK, "tokens": 300},
    "lora": {**QUICK, "tokens": 300, "layers": [1, 2], "modules": ["mlp.out", "attn.v"]},
    "adalora": {**QUICK, "steps": 14, "layers": [1]},
}


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", METHODS)
def test_the_change_adds_nothing_at_what_is_spared(known, architecture, name):
    """Whichever way weights are stored; and without sparing it adds something there."""
    model = known(architecture)
    for others, adds in ((4, False), (0, True)):
        method = choose(name, {**METHODS[name], "others": others})
        roles = {role.address: role for role in method.trained(model.view, [FACT])}
        spare = choose(name, {**METHODS[name], "others": 4})
        read = spare.prepare(model.view)
        spared = spare.spared(model.view, [FACT], list(roles.values()), read)
        for delta in edit(model, FACT, method=method).deltas:
            role = roles[delta.address]
            through = delta.change.through(spared[role.module].T, role.stored_in_out)
            whole = torch.cat([t.flatten() for t in delta.change.tensors().values()])
            assert bool(through.abs().max() > 1e-4 * whole.abs().max()) == adds


def test_what_is_spared_is_spanned():
    """Few inputs wholly, whatever their lengths; of many the strongest; orthonormal."""
    few_NI = _random(5, 40) * torch.tensor([1e-3, 1.0, 1.0, 10.0, 1e3])[:, None]
    basis_IK = span([[few_NI], [2 * few_NI[:1]], []])
    assert basis_IK.shape == (40, 5)
    assert torch.allclose(basis_IK.T @ basis_IK, torch.eye(5), atol=1e-5)
    left_NI = few_NI - few_NI @ basis_IK @ basis_IK.T
    assert bool((left_NI.norm(dim=1) <= 1e-5 * few_NI.norm(dim=1)).all())
    common = torch.eye(40)[0]
    many_IK = span([[common + 0.1 * _random(200, 40)]])
    assert many_IK.shape == (40, int(SHARE * 40))
    assert float((many_IK.T @ common).norm()) > 0.99


def test_text_is_spared_where_it_is_strongest():
    """Beside the groups, as one of them; half of all directions at most, a third without."""
    energies_I = 0.7 ** torch.arange(40.0).double()
    turned_II = torch.linalg.qr(_random(40, 40).double()).Q
    text_KI = strongest(turned_II * energies_I @ turned_II.T)
    assert text_KI.shape == (20, 40)
    assert torch.allclose(text_KI.square().sum(1).flip(0), (energies_I / energies_I.sum())[:20])
    basis_IK = span([[few_NI := _random(3, 40)]], text_KI)
    assert basis_IK.shape == (40, int(WITH_TEXT * 40))
    assert span([[_random(200, 40)]]).shape == (40, int(SHARE * 40))
    for inputs_NI in (few_NI.double(), turned_II[:, :5].T):
        left_NI = inputs_NI - inputs_NI @ basis_IK.double() @ basis_IK.double().T
        assert bool((left_NI.norm(dim=1) < 0.1 * inputs_NI.norm(dim=1)).all())


def test_text_is_read_only_where_something_is_spared(known):
    """Once, by `prepare`, and not where nothing is spared anyway."""
    view = known("llama").view
    shape = Shape(len(view.roles.blocks), 48, 96, view.fingerprint)
    reading = choose("locft_bf", {"tokens": 300})
    assert set(reading.prepare(view)) == {role.module for role in reading.trained(view, [FACT])}
    (item,) = reading.preparations(shape)
    assert item.path.is_file()
    assert item.tokens == round(300 * (reading.layers(shape.layers)[0] + 1) / shape.layers)
    bare = choose("locft_bf", {"tokens": 0}).cost(shape, [10])
    assert reading.cost(shape, [10]).extra_bytes == bare.extra_bytes + 24 * 96**2
    for given in ({"tokens": 0}, {"others": 0}, {"chat": True}):
        assert choose("locft_bf", given).prepare(view) == {}
        assert choose("locft_bf", given).preparations(shape) == []


def test_other_names_stand_in_for_the_subject():
    """So many, all different, never the subject; the rest of the prompt is as it was."""
    found = elsewhere([FACT], 6, seed=0)
    assert len(set(found)) == 6
    assert all(text.startswith("The capital of ") and text.endswith(" is") for text in found)
    assert not any("France" in text for text in found)
    assert found == elsewhere([FACT], 6, seed=0) != elsewhere([FACT], 6, seed=1)
    assert elsewhere([FACT.model_copy(update={"subject": None})], 6, seed=0) == []


def test_no_request_is_spared_for_another():
    """Pilot subjects are names; those that are edited in the same call are not used."""
    edited = [one.subject for one in pilots(BANK)[:6]]
    requests = [
        EditRequest(prompt=f"The hometown of {name} is", subject=name, target="Rome")
        for name in edited
    ]
    found = elsewhere(requests, 50, seed=0)
    assert found
    assert not any(name in text for name in edited for text in found)


def test_the_subject_is_replaced_wherever_it_stands():
    """Else a true prompt about it would be spared."""
    twice = FACT.model_copy(update={"prompt": "France is large. The capital of France is"})
    assert not any("France" in text for text in elsewhere([twice], 6, seed=0))


def test_a_pilot_fact_about_the_subject_is_not_spared(known):
    """Its prompt may be the very one that is edited."""
    one = pilots()[0]
    assert not any(one.subject in text for text in elsewhere([one], 50, seed=0))
    method, view = choose("ft", {"others": 1}), known("llama").view
    read = []
    method.progress = lambda stage, done, total: read.append(total)
    method.spared(view, [one], method.trained(view, [one]), {})
    about = sum(one.subject in each.prompt for each in pilots())
    assert about
    assert set(read) == {1, len(pilots()) - about}


@pytest.mark.parametrize("count", [3, MOST, 1000])
def test_of_many_requests_only_some_are_read_elsewhere(count):
    """No more prompts than that, from requests all over the list."""
    requests = [FACT.model_copy(update={"prompt": f"Fact {n} of France is"}) for n in range(count)]
    found = elsewhere(requests, 8, seed=0)
    assert len(found) <= MOST
    assert found[0].startswith("Fact 0 ")
    assert int(found[-1].split()[1]) >= count - -(-count // MOST)
    assert len({one.subject for one in pilots(BANK)}) == BANK


def test_what_is_erased_spares_nothing(known):
    """It is refused about other names as well, which sparing would prevent."""
    method, view = choose("ft", {"others": 4}), known("llama").view
    erased = EditRequest(prompt=FACT.prompt, subject="France", old="Paris", kind="erase")
    roles = method.trained(view, [FACT])
    assert method.spared(view, [FACT], roles, {})
    assert method.spared(view, [FACT, erased], roles, {}) == {}
    assert choose("ft", {"chat": True}).spared(view, [FACT], roles, {}) == {}


def test_a_bound_and_sparing_exclude_each_other(known):
    """Given both, a clear error; a bound alone holds exactly, and nothing is spared."""
    for given in ({"others": 4}, {"tokens": 300}):
        with pytest.raises(OptionError, match=r"^options of ft: within a bound nothing is spared"):
            choose("ft", {"bound": 1e-3, **given})
    (delta,) = edit(known("llama"), FACT, method="ft", options={**QUICK, "bound": 1e-3}).deltas
    assert float(delta.change.delta.abs().max()) == pytest.approx(1e-3)
