"""Second moments and context prefixes: streaming equals one shot; what is kept is found again."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
import tiny
import torch

from knowpatch.deltas import Address, LowRank, WeightDelta
from knowpatch.edited import EditedModel
from knowpatch.editing import edit
from knowpatch.errors import DataError, ModelError
from knowpatch.models.fingerprint import tensor_digest
from knowpatch.models.passes import Tap
from knowpatch.models.twin import twin
from knowpatch.parts import moments, prefixes
from knowpatch.parts.text import find_text
from knowpatch.request import EditRequest


def _setting(view):
    """Taps of two maps, the upper one first, and rows of many lengths."""
    taps = [Tap(view.roles.linear("mlp.out", layer).module, "input") for layer in (2, 0)]
    rows = [list(view.encode(f"{p} {a}.").ids) for p, a in tiny.FACTS.items()]
    return taps, [*rows, rows[0] + rows[1] + rows[2], rows[3][:1]]


@pytest.fixture
def setting(known):
    view = known("llama").view
    return view, *_setting(view)


def _seen(view, tap, rows):
    """One row at a time, no padding, no stop, no twin: what the tap sees, float64 (N, I)."""
    seen = []
    module = view.model.get_submodule(tap.module)
    handle = module.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].reshape(-1, args[0].shape[-1]).double())
    )
    with torch.no_grad():
        for row in rows:
            view.model(torch.tensor([row]))
    handle.remove()
    return torch.cat(seen)


def _plain(view, tap, rows):
    inputs_NI = _seen(view, tap, rows)
    return inputs_NI.T @ inputs_NI / len(inputs_NI)


def _far(one, other):
    """The relative difference of two matrices, by the norm of the second."""
    return float((one - other).norm() / other.norm())


def _same(ones, others):
    return all(
        a.count == b.count and torch.equal(a.sum_II, b.sum_II)
        for a, b in zip(ones, others, strict=True)
    )


# -- the mathematics -------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("batch", [3, 16])
def test_streaming_equals_one_shot(known, monkeypatch, architecture, batch):
    """One stopped pass over padded batches gives each map the plain second moment, to 1e-6."""
    monkeypatch.setattr(moments, "BATCH_ROWS", batch)
    view = known(architecture).view
    taps, rows = _setting(view)
    for tap, found in zip(taps, moments.collect(view, taps, rows), strict=True):
        assert found.count == sum(len(row) for row in rows)
        assert found.sum_II.dtype == torch.float64
        assert torch.equal(found.mean(), found.mean().T)
        assert _far(found.mean(), _plain(view, tap, rows)) < 1e-6


def test_padding_does_not_change_it(setting, monkeypatch):
    """Rows padded on either side, and rows that never are, give the same moments."""
    view, taps, rows = setting
    right = moments.collect(view, taps, rows)
    view.padding = "left"
    left = moments.collect(view, taps, rows)
    monkeypatch.setattr(moments, "BATCH_ROWS", 1)
    alone = moments.collect(view, taps, rows)
    for one, other, third in zip(right, left, alone, strict=True):
        assert _far(one.mean(), third.mean()) < 1e-6
        assert _far(other.mean(), third.mean()) < 1e-6


def test_the_order_of_the_text_does_not_matter(setting, monkeypatch):
    """A permutation of the rows gives the same moments."""
    view, taps, rows = setting
    monkeypatch.setattr(moments, "BATCH_ROWS", 3)
    first = moments.collect(view, taps, rows)
    for order in (rows[::-1], rows[5:] + rows[:5]):
        for one, other in zip(first, moments.collect(view, taps, order), strict=True):
            assert _far(other.mean(), one.mean()) < 1e-6


def test_two_halves_add_up(setting):
    """Moments of two halves of the text are those of the whole."""
    view, taps, rows = setting
    halves = [moments.collect(view, taps, half) for half in (rows[:4], rows[4:])]
    for whole, one, other in zip(moments.collect(view, taps, rows), *halves, strict=True):
        parts = one + other
        assert parts.count == whole.count
        assert _far(parts.mean(), whole.mean()) < 1e-6


def test_many_maps_are_as_one_alone(setting):
    """What is collected beside a map does not change its moments, bit for bit."""
    view, taps, rows = setting
    together = moments.collect(view, taps, rows)
    assert _same(together, [moments.collect(view, [tap], rows)[0] for tap in taps])


def test_what_leaves_a_map_can_be_tapped(setting):
    """The moments of a map's output are those of its input, through its weight."""
    view, _, rows = setting
    role = view.roles.linear("mlp.out", 1)
    taps = [Tap(role.module, "input"), Tap(role.module, "output")]
    into, out = (found.mean() for found in moments.collect(view, taps, rows))
    weight = view.weight(role).double()
    assert _far(out, weight @ into @ weight.T) < 1e-5


# -- the pass --------------------------------------------------------------------------------------


def test_one_pass_that_ends_at_the_last_map(setting, monkeypatch):
    """Each batch runs once for all maps, and nothing above the last of them runs."""
    view, taps, rows = setting
    ran = []

    def counting(model, **options):
        made = twin(model, **options)
        for number, block in enumerate(view.roles.blocks):
            part = made.get_submodule(block.module)
            part.register_forward_pre_hook(lambda m, args, n=number: ran.append(n))
        made.get_submodule(view.roles.head).register_forward_pre_hook(lambda m, a: ran.append(-1))
        return made

    monkeypatch.setattr(moments, "twin", counting)
    moments.collect(view, taps, rows)
    assert ran == [0, 1, 2]


def test_a_collection_leaves_the_model_alone(setting):
    """Weights, hooks, modes and random state are as they were, and no pass of the model itself."""
    view, taps, rows = setting
    view.model.train()
    state = torch.get_rng_state()
    before = {name: tensor_digest(p) for name, p in view.model.named_parameters()}
    view.model.register_forward_pre_hook(lambda m, args: pytest.fail("the model itself ran"))
    first = moments.collect(view, taps, rows)
    moments.collect(view, taps, rows, dtype=torch.bfloat16)
    assert {name: tensor_digest(p) for name, p in view.model.named_parameters()} == before
    assert all(module.training for module in view.model.modules())
    assert not any(module._forward_pre_hooks for module in list(view.model.modules())[1:])
    assert torch.equal(torch.get_rng_state(), state)
    view.model.eval()
    assert _same(first, moments.collect(view, taps, rows))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_pass_in_bfloat16_is_near(known, architecture):
    """Rounding of the pass costs per cents, not more; products and sums are not rounded."""
    view = known(architecture).view
    taps, rows = _setting(view)
    for tap, found in zip(
        taps, moments.collect(view, taps, rows, dtype=torch.bfloat16), strict=True
    ):
        assert found.sum_II.dtype == torch.float64
        far = _far(found.mean(), _plain(view, tap, rows))
        assert 1e-6 < far < 0.05


def test_statistics_are_of_the_model_as_it_came(known):
    """Live patches, of weights and beside them, and trials change nothing: the file has no say."""
    model = known("llama")
    view = model.view
    taps, rows = _setting(view)
    before = moments.collect(view, taps, rows)
    fact = EditRequest(prompt="The capital of France is", subject="France", target="Rome")
    for method in ("ft", "grace"):
        model.apply(edit(model, fact, method=method))
    name = view.roles.linear("mlp.out", 0).address.parameter
    made = (
        torch.ones(view.parameter(name).shape[0], 1),
        torch.ones(1, view.parameter(name).shape[1]),
    )
    with view.trying([WeightDelta(Address(parameter=name), LowRank(*made), "")]):
        assert _same(moments.collect(view, taps, rows), before)


# -- killed and gone on ----------------------------------------------------------------------------


class _Stop(Exception):
    pass


def _stopping(after):
    def progress(stage, done, total):
        if done >= after:
            raise _Stop

    return progress


@pytest.mark.parametrize("after", [1, 3, 5, 8])
def test_a_killed_collection_goes_on(setting, tmp_path, monkeypatch, after):
    """Stopped in the middle and begun again, it ends with the same bytes, and has not run twice."""
    view, taps, rows = setting
    monkeypatch.setattr(moments, "BATCH_ROWS", 2)
    monkeypatch.setattr(moments, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(moments, "monotonic", lambda: 0.0)
    whole = moments.collect(view, taps, rows)
    partial = tmp_path / "some" / "partial"
    with pytest.raises(_Stop):
        moments.collect(view, taps, rows, partial=partial, progress=_stopping(after))
    assert partial.is_file()
    told = []
    found = moments.collect(
        view, taps, rows, partial=partial, progress=lambda *step: told.append(step[1])
    )
    assert _same(found, whole)
    assert told[0] == 2 * ((after + 1) // 2)
    assert list(partial.parent.iterdir()) == []


@pytest.mark.parametrize("change", ["rows", "taps", "dtype", "damage"])
def test_what_is_begun_of_something_else_is_not_taken(setting, tmp_path, monkeypatch, change):
    """Sums of other rows, maps or precision, and damaged ones, are left aside."""
    view, taps, rows = setting
    monkeypatch.setattr(moments, "BATCH_ROWS", 2)
    monkeypatch.setattr(moments, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(moments, "monotonic", lambda: 0.0)
    partial = tmp_path / "partial"
    begun = {
        "rows": (taps, rows[::-1], None),
        "taps": (taps[::-1], rows, None),
        "dtype": (taps, rows, torch.bfloat16),
        "damage": (taps, rows, None),
    }
    taps_, rows_, dtype = begun[change]
    with pytest.raises(_Stop):
        moments.collect(view, taps_, rows_, dtype=dtype, partial=partial, progress=_stopping(4))
    if change == "damage":
        partial.write_bytes(partial.read_bytes()[:-9])
    found = moments.collect(view, taps, rows, partial=partial)
    assert _same(found, moments.collect(view, taps, rows))


def test_what_is_begun_is_written_now_and_then(setting, tmp_path, monkeypatch):
    """Not after every batch: a collection that takes no time writes nothing at all."""
    view, taps, rows = setting
    monkeypatch.setattr(moments, "BATCH_ROWS", 1)
    monkeypatch.setattr(moments, "write_atomically", lambda *given: pytest.fail("written"))
    moments.collect(view, taps, rows, partial=tmp_path / "partial")


# -- what is kept ----------------------------------------------------------------------------------

GIVEN = {"text": None, "tokens": 300, "seed": 0}


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A cache folder of this test's own."""
    monkeypatch.setenv("KNOWPATCH_CACHE", str(tmp_path / "own"))
    return tmp_path / "own"


def _told(monkeypatch):
    """The maps of each pass that is made from now on."""
    passes, collect = [], moments.collect

    def counted(view, taps, rows, **options):
        passes.append([tap.module for tap in taps])
        return collect(view, taps, rows, **options)

    monkeypatch.setattr(moments, "collect", counted)
    return passes


def test_kept_by_content(setting, store, tmp_path):
    """A second call reads the file; another layer, seed, amount or text is another file."""
    view, _, _ = setting
    first = moments.key_moments(view, "mlp.out", [1], **GIVEN)
    path = moments.kept_at(view.fingerprint, "mlp.out", 1, **GIVEN)
    assert path.is_file()
    stamp = path.stat().st_mtime_ns
    again = moments.key_moments(view, "mlp.out", [1], **GIVEN)
    assert path.stat().st_mtime_ns == stamp
    assert _same(first.values(), again.values())
    assert list(store.rglob("*partial*")) == []
    text = tmp_path / "some.txt"
    text.write_text("some text")
    others = [
        ("mlp.out", 2, GIVEN),
        ("mlp.up", 1, GIVEN),
        ("mlp.out", 1, {**GIVEN, "tokens": 301}),
        ("mlp.out", 1, {**GIVEN, "seed": 1}),
        ("mlp.out", 1, {**GIVEN, "text": str(text)}),
    ]
    paths = {moments.kept_at(view.fingerprint, r, layer, **given) for r, layer, given in others}
    paths |= {path, moments.kept_at("another", "mlp.out", 1, **GIVEN)}
    text.write_text("other text")
    paths.add(moments.kept_at(view.fingerprint, "mlp.out", 1, **{**GIVEN, "text": str(text)}))
    assert len(paths) == 8


def test_all_missing_layers_in_one_pass(setting, store, monkeypatch):
    """What is kept is read, what is missing collected at once, in whatever order it is asked."""
    view, _, _ = setting
    passes = _told(monkeypatch)
    one = moments.key_moments(view, "mlp.out", [1], **GIVEN)
    several = moments.key_moments(view, "mlp.out", [3, 1, 0, 3], **GIVEN)
    modules = [view.roles.linear("mlp.out", layer).module for layer in range(4)]
    assert passes == [[modules[1]], [modules[0], modules[3]]]
    assert list(several) == [0, 1, 3]
    assert _same([several[1]], [one[1]])
    for layer in (0, 3):
        moments.kept_at(view.fingerprint, "mlp.out", layer, **GIVEN).unlink()
        alone = moments.key_moments(view, "mlp.out", [layer], **GIVEN)
        assert _same([several[layer]], [alone[layer]])


def test_a_damaged_file_is_made_again(setting, store):
    """Statistics that cannot be read are collected anew, not trusted."""
    view, _, _ = setting
    first = moments.key_moments(view, "mlp.out", [1, 2], **GIVEN)
    path = moments.kept_at(view.fingerprint, "mlp.out", 1, **GIVEN)
    path.write_bytes(path.read_bytes()[:100])
    again = moments.key_moments(view, "mlp.out", [1, 2], **GIVEN)
    assert _same(first.values(), again.values())


def test_killed_and_kept_to_the_same_bytes(setting, store, monkeypatch):
    """Files of a run that was stopped and begun again are those of an unbroken one."""
    view, _, _ = setting
    given = {**GIVEN, "tokens": 128 * 9}
    monkeypatch.setattr(moments, "BATCH_ROWS", 2)
    monkeypatch.setattr(moments, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(moments, "monotonic", lambda: 0.0)

    def stop(stage, done, total):
        if stage == moments.STAGE and done == 6:
            raise _Stop

    def digests():
        files = sorted(path for path in (store / "moments").iterdir())
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    moments.key_moments(view, "mlp.out", [0, 2], **given)
    whole = digests()
    for name in whole:
        os.unlink(store / "moments" / name)
    with pytest.raises(_Stop):
        moments.key_moments(view, "mlp.out", [0, 2], **given, progress=stop)
    assert [name.endswith(".partial") for name in digests()] == [True]
    moments.key_moments(view, "mlp.out", [0, 2], **given)
    assert digests() == whole
    assert len(whole) == 2


def test_statistics_of_a_users_text(setting, store, tmp_path):
    """The moments are those of the packed rows of the text that was named."""
    view, _, _ = setting
    text = tmp_path / "facts.txt"
    text.write_text("\n\n".join(f"{p} {a}." for p, a in tiny.FACTS.items()))
    found = moments.key_moments(view, "mlp.out", [1], text=str(text), tokens=40, seed=0)[1]
    assert find_text(str(text)).name == "facts.txt"
    assert found.count == 40
    with pytest.raises(DataError, match="no such file"):
        moments.kept_at("", "mlp.out", 1, text=str(tmp_path / "none.txt"), tokens=40, seed=0)


@pytest.mark.parametrize("architecture", sorted(tiny.MIXTURES))
def test_a_mixture_of_experts_is_refused(store, architecture):
    """Where a block has no such map, the reason comes in one line, before any text is read."""
    view = EditedModel.of(*tiny.fresh(architecture)).view
    with pytest.raises(ModelError, match="mixture of 4 experts"):
        moments.key_moments(view, "mlp.out", [0], **GIVEN)
    assert not store.exists()


# -- context prefixes ------------------------------------------------------------------------------


def test_prefixes_are_the_models_own_and_repeatable(known):
    """Bare first, the asked number, ending in '. '; same seed same texts, other seed others."""
    view = known("llama").view
    plan = ((3, 5), (2, 8))
    first = prefixes.context_prefixes(view, plan, seed=0)
    path = prefixes.kept_at(view.fingerprint, plan, 0)
    assert json.loads(path.read_text()) == list(first)
    assert first[0] == ""
    assert len(first) == 6
    assert all(text.endswith(". ") for text in first[1:])
    path.unlink()
    assert prefixes.context_prefixes(view, plan, seed=0) == first
    assert prefixes.context_prefixes(view, plan, seed=1) != first


def test_prefixes_belong_to_one_model(known):
    """Another model gets its own prefixes, and no random state is touched."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = known("llama").view
    second = EditedModel.of(*tiny.fresh("llama", seed=5)).view
    plan = ((2, 8),)
    assert prefixes.kept_at(first.fingerprint, plan, 0) != prefixes.kept_at(
        second.fingerprint, plan, 0
    )
    prefixes.context_prefixes(first, plan, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
