"""The closed-form methods as methods: their algebra, state, traces, room and options."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from made import state
from safetensors import safe_open
from safetensors.torch import load, save

from knowpatch.deltas import LowRank
from knowpatch.editing import choose, edit, edit_each, prepare, room
from knowpatch.errors import EditError, OptionError, PatchError
from knowpatch.method import METHODS, parse_options
from knowpatch.models.passes import Tap
from knowpatch.parts.pilots import pilots
from knowpatch.parts.spans import continuation
from knowpatch.parts.spread import PILOTS, Prepared
from knowpatch.parts.values import optimise
from knowpatch.patch import Patch, Provenance
from knowpatch.request import EditRequest

PLAIN = {"clamp": 4.0, "kl_factor": 0.0, "tokens": 1000, "steps": 8, "precision": "model"}
SMALL = {**PLAIN, "ridge": 0.01}
SPREAD = {**SMALL, "layers": [0, 1]}
NULL = {**PLAIN, "layers": [0, 1], "null_share": 0.5, "gain": 0.99}
OPTIONS = {"rome": {**SMALL, "layer": 0}, "r_rome": {**SMALL, "layer": 0}}
OPTIONS |= {"bird": {**SMALL, "layer": 0}}
OPTIONS |= {"emmet": {**SMALL, "layers": [0]}, "memit": SPREAD, "pmet": SPREAD}
OPTIONS |= {"alphaedit": NULL, "evoedit": NULL, "betaedit": {**NULL, "largest": 100.0}}
FRANCE, JAPAN, NILE = FACTS = [
    EditRequest(prompt=prompt, subject=subject, target=tiny.EDITS[prompt])
    for prompt, subject in zip(tiny.EDITS, ("France", "Japan", "Nile"), strict=True)
]
ITALY = EditRequest(prompt="The capital of Italy is", subject="Italy", target="Cairo")
all_methods = pytest.mark.parametrize("name", OPTIONS)


def _method(name, **more):
    return choose(name, {**OPTIONS[name], **more})


def _dense(delta):
    return (delta.change.left @ delta.change.right).double()


def _apart(one, other):
    """The difference of two patches, in the norm of the second, at its largest."""
    pairs = [(_dense(a), _dense(b)) for a, b in zip(one.deltas, other.deltas, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def _probability(model, request, target=None):
    encoded = model.encode(request.prompt)
    ids = continuation(model.tokenizer, encoded, target or request.target)
    return model.view.score([(encoded.ids, ids)])[0].probability


@all_methods
def test_a_change_has_no_higher_rank_than_facts(known, name):
    """Three facts: exact low-rank changes, of rank three at most for each map that is edited."""
    patch = edit(known(), FACTS, method=_method(name))
    ranks = {}
    for delta in patch.deltas:
        assert isinstance(delta.change, LowRank)
        place = delta.address.parameter
        ranks[place] = ranks.get(place, 0) + delta.change.rank
    assert len(ranks) == len(OPTIONS[name].get("layers", [0]))
    assert max(ranks.values()) <= 3


@all_methods
def test_edits_made_together_are_the_edits_alone(known, name):
    """Each of `edit_each`'s changes is that of the request's own edit, to 1e-4 of its norm."""
    model, method = known(), _method(name)
    for request, patch in zip(FACTS, edit_each(model, FACTS, method=method), strict=True):
        assert patch.provenance.requests == (request,)
        assert _apart(patch, edit(model, request, method=method)) <= 1e-4


@all_methods
def test_a_weight_stored_the_other_way_round(known, name):
    """GPT-2 stores (in, out): the factors are turned, fit, and make the target likelier."""
    model = known("gpt2")
    patch = edit(model, FRANCE, method=_method(name))
    for delta in patch.deltas:
        assert (len(delta.change.left), delta.change.right.shape[1]) == (192, 48)
    before = _probability(model, FRANCE)
    with model.applied(patch):
        assert _probability(model, FRANCE) > before


def _wanted(method, view, tasks):
    """What the optimised module is to put out (N, D)."""
    values = optimise(view, method.value_modules(view), tasks, method.settings(view))
    return torch.stack([(value.clean_D + value.delta_D).double() for value in values])


def _grouped(facts):
    return torch.stack([(f.keys_CI[0] + f.keys_CI[1:].mean(0)) / 2 for f in facts], dim=1)


@pytest.mark.parametrize("weight", [None, 50.0])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_memit_is_the_formula_of_its_card(known, architecture, weight):
    """One layer: R K^T (lambda C + K K^T)^-1, by a dense solve; lambda by the gain or given."""
    view, method = known(architecture).view, _method("memit", layers=[1], weight=weight)
    prepared = method.prepare(view)
    (delta,) = method.edit(view, FACTS, prepared, None).deltas

    second_II = method.statistics(view, [1])[1]
    ridge = 0.01 * second_II.diagonal().median()
    second_II = second_II + ridge * torch.eye(len(second_II), dtype=torch.float64)
    if weight is None:
        tasks = [method.task(view, request, prepared.contexts) for request in pilots(PILOTS)]
        keys_IN = _grouped(method.read(view, 1, tasks))
        energy = (keys_IN * torch.linalg.solve(second_II, keys_IN)).sum(0).median()
        gain = method.config.gain
        weight = float(energy) * (1 - gain) / gain
    tasks = [method.task(view, request, prepared.contexts) for request in FACTS]
    now = Tap(view.roles.blocks[1].module, "output")
    facts = method.read(view, 1, tasks, [now])
    keys_IN = _grouped(facts)
    gap_ND = _wanted(method, view, tasks) - torch.stack([fact.outputs[now][0] for fact in facts])
    solved_IN = torch.linalg.solve(weight * second_II + keys_IN @ keys_IN.T, keys_IN)
    plain_DI = gap_ND.T @ solved_IN.T
    found_DI = method.role(view, 1).oriented(_dense(delta))
    assert (found_DI - plain_DI).norm() <= 1e-4 * plain_DI.norm()


class Idle:
    """Leaves everything alone by changing nothing, and remembers what it was asked to write."""

    def __init__(self):
        self.asked = []

    def update(self, residuals_DF, keys_IN, owner_N=None):
        self.asked.append(residuals_DF)
        return 0 * residuals_DF, torch.zeros(residuals_DF.shape[1], len(keys_IN)).double()


@pytest.mark.parametrize(("name", "power"), [("memit", 1.0), ("pmet", 0.5)])
def test_each_layer_is_asked_for_its_share_of_the_gap(known, name, power):
    """R (m - i) in MEMIT, R sqrt(m - i) in PMET, is the gap measured at the module optimised."""
    view, method = known().view, _method(name, layers=[0, 1, 2])
    contexts = method.contexts(view)
    keeps = {layer: Idle() for layer in (0, 1, 2)}
    method.edit(view, FACTS, Prepared(contexts, keeps, None, dict.fromkeys(keeps)), None)

    tasks = [method.task(view, request, contexts) for request in FACTS]
    now = Tap(method.value_modules(view)[0], "output")
    outputs_ND = torch.stack([f.outputs[now][0] for f in method.read(view, 0, tasks, [now])])
    gap_DN = (_wanted(method, view, tasks) - outputs_ND).T
    for number, keep in enumerate(keeps.values()):
        (residuals_DN,) = keep.asked
        assert (residuals_DN * (3 - number) ** power - gap_DN).norm() <= 1e-4 * gap_DN.norm()


@pytest.mark.parametrize("gap", ["stream", "map"])
def test_pmet_measures_what_is_missing_where_it_is_told(known, gap):
    """Behind the block what the layer below has written counts, at the map it does not."""
    view, method = known().view, _method("pmet", layers=[0, 1], gap=gap)
    prepared, idle = method.prepare(view), Idle()
    prepared = replace(prepared, keeps={0: prepared.keeps[0], 1: idle})
    written = method.edit(view, FACTS, prepared, None).deltas[:1]

    tasks = [method.task(view, request, prepared.contexts) for request in FACTS]
    values = optimise(view, method.value_modules(view), tasks, method.settings(view))
    wanted_ND = torch.stack([value.delta_D.double() for value in values])
    module = view.roles.blocks[1].module if gap == "stream" else method.role(view, 1).module
    before_ND = torch.stack(method.outputs(view, module, tasks))
    with view.trying(written):
        moved_ND = torch.stack(method.outputs(view, module, tasks)) - before_ND
    assert moved_ND.norm() > 0.01 * wanted_ND.norm()
    (residuals_DN,) = idle.asked
    missing_ND = wanted_ND - moved_ND
    assert (residuals_DN.T - missing_ND).norm() <= 1e-4 * missing_ND.norm()


def test_pmet_without_attention_is_a_value_of_romes_kind(known, monkeypatch):
    """One layer, no KL, attention's vector frozen at 0: it asks for exactly ROME's value."""
    same = {"kl_factor": 0.0, "steps": 12, "clamp": 4.0, "enough": 0.03}
    view, method = known().view, _method("pmet", layers=[1], gap="map", **same)
    rome, idle = _method("rome", **{**same, "layer": 1}), Idle()
    contexts = method.contexts(view)
    prepared = Prepared(contexts, {1: idle}, None, {1: None})
    method.edit(view, FACTS, prepared, None)
    (with_attention_DN,) = idle.asked
    mlp = (method.role(view, 1).module,)
    monkeypatch.setattr(type(method), "value_modules", lambda self, view: mlp)
    method.edit(view, FACTS, prepared, None)
    residuals_DN = idle.asked[1]

    tasks = [rome.task(view, request, contexts) for request in FACTS]
    values = rome.values(view, tasks)
    wanted_DN = torch.stack([value.delta_D.double() for value in values], dim=1)
    assert (residuals_DN - wanted_DN).norm() <= 1e-6 * wanted_DN.norm()
    assert (with_attention_DN - wanted_DN).norm() > 1e-2 * wanted_DN.norm()


def test_the_state_is_that_of_the_live_patches(known):
    """One key a layer while a patch is live, added to its form; none later or with memory=false."""
    model, method = known(), _method("memit")
    patch = edit(model, FRANCE, method=method)
    assert set(patch.traces) == {"keys.0", "keys.1"}
    bare = prepare(model, method).prepared.keeps
    with model.applied(patch):
        keeps = prepare(model, method).state.keeps
        for layer, keep in keeps.items():
            key_1I = patch.traces[f"keys.{layer}"].double()
            assert (keep.form.kept, bare[layer].form.kept) == (1, 0)
            grown = keep.form.matrix() - bare[layer].form.matrix()
            assert torch.allclose(grown, key_1I.T @ key_1I, atol=1e-8)
    assert prepare(model, method).state is None


def test_what_is_prepared_is_that_of_the_model_as_it_came(known, tmp_path, monkeypatch):
    """Made while a patch is live, with an empty cache: the same prefixes and statistics."""
    method, patch, found = _method("memit", tokens=300), None, []
    for number in ("1", "2"):
        monkeypatch.setenv("KNOWPATCH_CACHE", str(tmp_path / number))
        model = known()
        if patch is not None:
            model.apply(patch)
        live = model.live, state(model)["weights"]
        found.append(prepare(model, method).prepared)
        assert (model.live, state(model)["weights"]) == live
        patch = patch or edit(model, FRANCE, method=method)
    first, second = found
    assert first.contexts == second.contexts
    for layer, keep in first.keeps.items():
        assert torch.equal(keep.form.matrix(), second.keeps[layer].form.matrix())

    model.drop(patch.id)
    method = _method("memit", memory=False)
    assert not edit(model, FRANCE, method=method).traces
    with model.applied(patch):
        keeps = prepare(model, method).state.keeps
    assert [keep.form.kept for keep in keeps.values()] == [0, 0]


def test_the_same_prompt_again_replaces_what_was_written(known):
    """Its old key is not kept, another prompt's is; and the new target comes before the old."""
    model, method = known(), _method("memit", layers=[0], steps=30, gain=0.9)
    again = FRANCE.model_copy(update={"target": "Tokyo"})
    model.apply(edit(model, FRANCE, method=method))
    ready = prepare(model, method)
    for request, kept in ((again, 0), (JAPAN, 1)):
        keeps = method._keeps([request], ready.prepared, ready.state)
        assert [keep.form.kept for keep in keeps.values()] == [kept]
    model.apply(edit(model, again, method=method))
    assert _probability(model, again) > _probability(model, FRANCE)


def _traced(traces, method="memit"):
    made = Provenance(
        method=method, config={}, seed=0, fingerprint="f" * 64, requests=(ITALY,), version="0"
    )
    return Patch(made, traces=traces)


def _refused(tmp_path, patch, change):
    """How a patch file is refused once its tensors were changed."""
    with safe_open(patch.save(tmp_path / "good"), framework="pt") as file:
        metadata = file.metadata()
    tensors = load((tmp_path / "good").read_bytes())
    change(tensors)
    (tmp_path / "bad").write_bytes(save(tensors, metadata=metadata))
    with pytest.raises(PatchError) as caught:
        Patch.load(tmp_path / "bad")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_traces_are_saved_and_loaded(known, tmp_path):
    """Bit by bit, under the same id and in the same bytes; other traces are another id."""
    patch = edit(known(), FRANCE, method=_method("memit"))
    again = Patch.load(patch.save(tmp_path / "p"))
    assert (again.id, again.to_bytes()) == (patch.id, patch.to_bytes())
    assert set(again.traces) == set(patch.traces) != set()
    assert all(torch.equal(again.traces[name], patch.traces[name]) for name in patch.traces)
    one, two = torch.ones(1, 3), 2 * torch.ones(1, 3)
    kinds = [{}, {"keys.0": one}, {"keys.0": two}, {"keys.1": one}, {"keys.0": one, "keys.1": one}]
    assert len({_traced(traces).id for traces in kinds}) == len(kinds)


def test_a_file_with_other_traces_is_damaged(tmp_path):
    """One missing, one too many, another number and one that is not finite are refused."""
    with pytest.raises(PatchError, match="not finite"):
        _traced({"keys.0": torch.full((1, 3), torch.nan)}).save(tmp_path / "p")
    assert not list(tmp_path.iterdir())
    patch = _traced({"keys.0": torch.ones(1, 3)})
    assert "damaged" in _refused(tmp_path, patch, lambda t: t.pop("t.keys.0"))
    assert "damaged" in _refused(tmp_path, patch, lambda t: t.update({"t.k": torch.ones(1)}))
    zero, infinite = torch.zeros(1, 3), torch.full((1, 3), torch.inf)
    assert "damaged" in _refused(tmp_path, patch, lambda t: t.update({"t.keys.0": zero}))
    assert "not finite" in _refused(tmp_path, patch, lambda t: t.update({"t.keys.0": infinite}))


@pytest.mark.parametrize(("name", "twice"), [("alphaedit", 6), ("evoedit", 3)])
def test_room_falls_by_what_was_written(known, name, twice):
    """From the width of the space: by the facts in AlphaEdit, by the rank of keys in EvoEdit."""
    model, method = known(), _method(name, layers=[0])
    patch = edit(model, FACTS, method=method)
    width = prepare(model, method).prepared.keeps[0].space.width
    assert room(model, method) == width
    assert room(model, method, [patch]) == width - 3
    assert room(model, method, [patch, patch]) == width - twice
    with model.applied(patch):
        assert room(model, method) == width - 3


@pytest.mark.parametrize("name", ["alphaedit", "evoedit"])
def test_no_room_is_one_line(known, name):
    """Once all directions were written at, an edit is refused and told how much room there is."""
    view, method = known().view, _method(name, layers=[0])
    prepared = method.prepare(view)
    space = prepared.keeps[0].space
    made = torch.Generator().manual_seed(0)
    keys = torch.randn(space.width, view.base(method.role(view, 0)).shape[1], generator=made)
    spent = method.fold(prepared, None, _traced({"keys.0": keys}, name))
    assert method.room(prepared, spent) == 0
    with pytest.raises(EditError, match=r"room for 0 more facts .* not for 1") as caught:
        method.edit(view, [FRANCE], prepared, spent)
    assert "\n" not in str(caught.value)


def test_betaedit_refuses_an_absurd_change(known):
    """A change that is too large for the map is refused by block; nothing has been changed."""
    model = known()
    before = state(model)
    with pytest.raises(EditError, match=r"change of block 0 .* raise the option largest"):
        edit(model, FRANCE, method=_method("betaedit", largest=1e-6))
    assert state(model) == before


def test_betaedit_looks_at_its_space_anew(known):
    """With refresh=2 the second fact changes the space: what was written is reached less."""
    model, method = known(), _method("betaedit", layers=[0], refresh=2)
    patches = edit_each(model, [FRANCE, JAPAN], method=method)
    prepared = prepare(model, method).prepared
    one = method.fold(prepared, None, patches[0])
    two = method.fold(prepared, one, patches[1])
    first, second = one.keeps[0].space, two.keeps[0].space
    assert first is prepared.keeps[0].space
    keys_IN = torch.cat([patch.traces["keys.0"] for patch in patches]).T
    assert second.inside(keys_IN).norm() < first.inside(keys_IN).norm()
    assert two.keeps[0].form.kept == 2


def test_betaedit_without_leak_is_alphaedit(known):
    """leak=0 and the same weight, before and after another edit: the same change to 1e-5."""
    model, found = known(), []
    for name in ("alphaedit", "betaedit"):
        method = _method(name, weight=0.1, **({"leak": 0.0} if name == "betaedit" else {}))
        first = edit(model, [FRANCE, JAPAN], method=method)
        with model.applied(first):
            found.append([first, edit(model, NILE, method=method)])
    assert all(_apart(mine, other) <= 1e-5 for mine, other in zip(*found, strict=True))


def test_a_preset_is_what_was_published():
    """An option that is given goes before it; one that is not there is refused in one line."""
    config = choose("memit", {"preset": "gpt2-xl"}).config
    assert (config.layers, config.weight) == ((13, 14, 15, 16, 17), 20_000.0)
    config = choose("memit", {"preset": "gpt2-xl", "layers": [3], "weight": 5}).config
    assert (config.layers, config.weight, config.memory) == ((3,), 5.0, False)
    with pytest.raises(OptionError, match="'gpt2-x' of memit: did you mean 'gpt2-xl'") as caught:
        choose("memit", {"preset": "gpt2-x"})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "preset"), [(n, p) for n in METHODS.names() for p in METHODS.get(n).presets]
)
def test_every_preset_configures(name, preset):
    """And what a patch keeps of a configuration configures to the same again."""
    config = choose(name, {"preset": preset}).config
    for mode in ("python", "json"):
        assert choose(name, config.model_dump(mode=mode)).config == config


def test_layers_are_a_range_a_number_or_a_list():
    """As they are given on the command line; anything else is refused in one line."""
    for given, layers in {"4-6": (4, 5, 6), "4 - 5": (4, 5), "4": (4,), "[4, 5]": (4, 5)}.items():
        assert choose("memit", parse_options([f"layers={given}"])).config.layers == layers
    for given in ("8-4", [5, 4], [4, 4], [], "a-b", -1, [-1, 2]):
        with pytest.raises(OptionError, match="option layers of memit cannot be") as caught:
            choose("memit", {"layers": given})
        assert "\n" not in str(caught.value)
