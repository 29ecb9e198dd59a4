"""Adapters: factors of sums, and PEFT folders that peft itself loads."""

from __future__ import annotations

import builtins
import json

import pytest
import torch
from made import state
from patches import FRANCE, NILE, address, answering, change_of, changed, patch_of, shape_at
from safetensors.torch import load_file

from knowpatch.deltas import Address, Dense, LowRank, Rows, WeightDelta
from knowpatch.editing import load
from knowpatch.errors import OptionError, PatchError
from knowpatch.export import factors as factors_module
from knowpatch.export.factors import DENSE_RANK, summed
from knowpatch.export.peft import CONFIG, WEIGHTS, Peft
from knowpatch.export.ship import ship

ARCHITECTURES = ("llama", "gemma2", "gpt2")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft's, about what it does not find


def worst(parity):
    return max(parity.edits_difference, parity.controls_difference)


# -- factors ---------------------------------------------------------------------------------------

SHAPE = (24, 40)
SLICES = {
    "all": {},
    "rows": {"start": 4, "stop": 20},
    "columns": {"dim": 1, "start": 7, "stop": 30},
}


def delta(form, where, seed=0, rank=2):
    part = Address(parameter="w", **SLICES[where])
    shape = part.narrow(torch.zeros(SHAPE)).shape
    return WeightDelta(part, change_of(form, shape, seed=seed, rank=rank))


def dense(deltas):
    whole = torch.zeros(SHAPE)
    for one in deltas:
        whole = one.added_to(whole)
    return whole


@pytest.mark.parametrize("where", SLICES)
@pytest.mark.parametrize("form", [LowRank, Rows])
def test_one_change_keeps_its_factors(form, where):
    """A low-rank change of all, or of a slice, comes out as its own factors with zeros around."""
    one = delta(form, where)
    left, right, lost = summed([one], SHAPE, None)
    assert (left.shape[1], lost) == (2, 0.0)
    assert torch.equal(left @ right, dense([one]))


@pytest.mark.parametrize("where", SLICES)
def test_a_sum_has_the_rank_that_it_needs(where):
    """Changes that share directions come to fewer factors than they bring, with the same sum."""
    first, second = delta(LowRank, where), delta(Rows, "all", seed=1)
    again = WeightDelta(first.address, LowRank(first.change.left * 3, first.change.right))
    left, right, lost = summed([first, again, second, first], SHAPE, None)
    assert (left.shape[1], lost) == (4, 0.0)
    assert torch.allclose(left @ right, dense([first, again, second, first]), atol=1e-6)


def test_more_factors_than_the_matrix_has_rows():
    """A hundred factors of a 24-row matrix come to 24."""
    one = delta(LowRank, "all", rank=100)
    left, right, lost = summed([one], SHAPE, None)
    assert (left.shape[1], lost) == (24, 0.0)
    assert torch.allclose(left @ right, dense([one]), atol=1e-5)


@pytest.mark.parametrize("form", [LowRank, Dense])
def test_what_is_cut_off_is_stated(form):
    """A rank below the change's: the best of that rank, and the share that it leaves out."""
    one = delta(form, "all", rank=12)
    whole = dense([one])
    left, right, lost = summed([one], SHAPE, 5)
    assert left.shape[1] == 5
    assert lost == pytest.approx(float((whole - left @ right).norm() / whole.norm()), rel=1e-5)
    values = torch.linalg.svdvals(whole.double())
    assert lost == pytest.approx(float(values[5:].norm() / values.norm()), rel=1e-5)


def test_a_dense_change_of_low_rank_is_exact():
    """What is given whole but has a low rank needs no more than that, and loses nothing."""
    low = delta(LowRank, "all", rank=3)
    left, right, lost = summed([WeightDelta(low.address, Dense(dense([low])))], SHAPE, None)
    assert (left.shape[1], lost) == (3, 0.0)
    assert torch.allclose(left @ right, dense([low]), atol=1e-6)


def test_changes_that_cancel():
    """Two changes whose sum is nothing are an adapter that does nothing."""
    one = delta(LowRank, "all")
    less = WeightDelta(one.address, LowRank(-one.change.left, one.change.right))
    left, right, lost = summed([one, less], SHAPE, None)
    assert lost == 0.0
    assert float((left @ right).abs().max()) < 1e-6


def test_a_dense_change_has_a_rank_by_default():
    """Wider than DENSE_RANK, it is cut to that."""
    wide = Dense(torch.randn(100, 90, generator=torch.Generator().manual_seed(0)))
    left, _, lost = summed([WeightDelta(Address(parameter="w"), wide)], (100, 90), None)
    assert left.shape[1] == DENSE_RANK
    assert lost > 0.01


# -- PEFT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_several_patches_are_one_adapter(folders, tmp_path, architecture):
    """Edits of several maps, one of them twice: one rank, alpha equal to it, the same logits."""
    model = load(str(folders(architecture)))
    before = state(model)
    patches = [
        answering(model),
        changed(model, LowRank, seed=1, rank=3),
        changed(model, Rows, seed=2, layer=0, role="attn.out"),
        changed(model, LowRank, seed=3, rank=1),
    ]
    shipped = ship(model, patches, "peft", tmp_path / "adapter")
    assert state(model) == before
    assert worst(shipped.parity) < 1e-4
    assert shipped.parity.after == shipped.parity.before
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 4
    assert config["fan_in_fan_out"] == (architecture == "gpt2")
    assert config["base_model_name_or_path"] == str(folders(architecture).resolve())
    assert len(config["target_modules"]) == 3
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {4}


@pytest.mark.parametrize("role", ["attn.q", "attn.k", "attn.v"])
@pytest.mark.parametrize("architecture", ["gpt2", "phi3"])
def test_a_part_of_a_fused_map(folders, tmp_path, architecture, role):
    """Queries, keys and values computed by one map: the adapter changes their part of it."""
    model = load(str(folders(architecture)))
    patch = changed(model, role=role, size=0.5)
    assert patch.deltas[0].address.stop is not None
    ids = model.tokenizer(FRANCE.prompt, return_tensors="pt").input_ids
    before = model(ids).logits
    with model.applied(patch):
        assert not torch.allclose(model(ids).logits, before, atol=1e-2)
    assert worst(ship(model, [patch], "peft", tmp_path / "adapter").parity) < 1e-4


def test_the_adapter_is_loaded_by_its_own_description(folders, tmp_path):
    """peft alone, from the folder alone, finds the base and answers as the patched model."""
    from peft import AutoPeftModelForCausalLM

    model = load(str(folders("llama")))
    patch = answering(model)
    ship(model, [patch], "peft", tmp_path / "adapter")
    ids = model.tokenizer(FRANCE.prompt, return_tensors="pt").input_ids
    other = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with model.applied(patch), torch.no_grad():
        assert torch.allclose(other(input_ids=ids).logits, model(ids).logits, atol=1e-4)
    assert not torch.allclose(other(input_ids=ids).logits, model(ids).logits, atol=1e-1)


def test_a_dense_patch_is_truncated_with_the_error_stated(folders, tmp_path):
    """The note states what is left out; a higher rank leaves out less, the full one nothing."""
    model = load(str(folders("llama")))
    patch = changed(model, Dense)
    apart = []
    for rank in (4, 24, 48):
        shipped = ship(model, [patch], Peft(rank), tmp_path / str(rank))
        apart.append(worst(shipped.parity))
        values = torch.linalg.svdvals(patch.deltas[0].change.delta.double())
        lost = float(values[rank:].norm() / values.norm())
        truncated = [note for note in shipped.notes if "truncated" in note]
        assert bool(truncated) == (rank < 48)
        if truncated:
            assert f"{lost:.2%}" in truncated[0]
    assert apart[0] > apart[1] > apart[2]
    assert apart[2] < 1e-4


def test_the_same_patches_are_the_same_files(folders, tmp_path):
    """Two exports of the same patches differ in no byte."""
    model = load(str(folders("gpt2")))
    patches = [changed(model), changed(model, Rows, layer=2, seed=1), changed(model, seed=2)]
    for name in ("one", "two"):
        ship(model, patches, "peft", tmp_path / name)
    for file in (CONFIG, WEIGHTS):
        one, two = ((tmp_path / name / file).read_bytes() for name in ("one", "two"))
        assert one == two


def test_what_is_no_linear_map_is_refused(folders, tmp_path):
    """An embedding, a bias and a norm cannot be changed by an adapter; the reason is given."""
    model = load(str(folders("llama")))
    embedding = f"{model.view.roles.embedding}.weight"
    norm = next(name for name, p in model.model.named_parameters() if p.ndim == 1)
    for name in (embedding, norm):
        shape = model.view.parameter(name).shape
        patch = patch_of(model, (name, Dense(0.01 * torch.ones(shape))))
        with pytest.raises(PatchError, match="not the weight of a linear map"):
            ship(model, [patch], "peft", tmp_path / "adapter")
        assert ship(model, [patch], "merged", tmp_path / name).parity.exact
    assert not (tmp_path / "adapter").exists()


def test_without_peft(folders, tmp_path, monkeypatch):
    """Where the library is not installed, one line says how to get it, and nothing is written."""
    real = builtins.__import__

    def absent(name, *rest, **more):
        if name == "peft":
            raise ImportError(name)
        return real(name, *rest, **more)

    model = load(str(folders("llama")))
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(OptionError, match=r"pip install 'knowpatch\[peft\]'"):
        ship(model, [changed(model)], "peft", tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_an_untied_head_may_be_adapted(folders, tmp_path):
    """A head of its own is a linear map like any other."""
    model = load(str(folders("llama")))
    head = f"{model.view.roles.head}.weight"
    change = change_of(LowRank, model.view.parameter(head).shape)
    assert (
        worst(ship(model, [patch_of(model, (head, change))], "peft", tmp_path / "a").parity) < 1e-4
    )


def test_live_and_more_in_one_adapter(folders, tmp_path):
    """A workspace's list, part of it live: the adapter holds all of it."""
    model = load(str(folders("llama")))
    first, second = answering(model), answering(model, NILE)
    model.apply(first)
    parity = ship(model, [first, second], "peft", tmp_path / "a").parity
    assert worst(parity) < 1e-4
    assert (parity.edits, parity.after) == (2, 2)
    assert model.live == (first,)


def test_padding_adds_nothing(folders, tmp_path):
    """Maps of different ranks are brought to one by zeros, exactly."""
    model = load(str(folders("llama")))
    patches = [changed(model, rank=1), changed(model, rank=5, layer=2, seed=1)]
    ship(model, patches, "peft", tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    for patch in patches:
        module = patch.deltas[0].address.parameter.removesuffix(".weight")
        up, down = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "BA")
        assert up.shape[1] == down.shape[0] == 5
        change = patch.deltas[0].change
        assert torch.equal(up @ down, change.left @ change.right)
    assert factors_module.DENSE_RANK == 64


def test_shapes_of_hand_made_patches(known):
    """The helpers address what they say: a slice's change has the slice's shape."""
    model = known("gpt2")
    where = address(model, role="attn.k")
    assert shape_at(model, where) == (48, 48)
