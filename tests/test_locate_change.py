"""What a patch does to the weights: numbers against plain ones, the card's self-checks."""

from __future__ import annotations

import math

import pytest
import torch
from shell import FRANCE as TOLD
from shell import run as shell

from knowpatch.deltas import Address, Dense, LowRank, Rows, WeightDelta
from knowpatch.editing import edit
from knowpatch.locate.change import Changed, besides, changed
from knowpatch.locate.sparsity import (
    curve,
    gini,
    held,
    hoyer,
    pooled,
    singular_values,
    singular_values_of,
    sparsity,
)
from knowpatch.locate.vocabulary import columns, project, ranks
from knowpatch.patch import Patch, Provenance
from knowpatch.request import EditRequest

FRANCE = EditRequest(
    prompt="The capital of France is", subject="France", target="Rome", old="Paris"
)


def _patch(model, *deltas, requests=()):
    provenance = Provenance(
        method="none",
        config={},
        seed=0,
        fingerprint=model.view.fingerprint,
        requests=requests,
        version="0",
    )
    return Patch(provenance, deltas)


# -- one matrix ------------------------------------------------------------------------------------


def _sparsity(change):
    return sparsity(change, torch.ones_like(change), singular_values(change))


def test_one_column_is_as_sparse_as_can_be():
    """Hoyer of the columns' norms 1, all mass in one column, stable rank 1."""
    change = torch.zeros(6, 10)
    change[:, 3] = torch.arange(1.0, 7)
    found = _sparsity(change)
    assert found.hoyer_columns == pytest.approx(1)
    assert found.top_columns == found.percent_columns == pytest.approx(1)
    assert found.stable_rank == found.participation == pytest.approx(1)
    assert found.untouched == pytest.approx(0.9)
    assert found.gini_columns == pytest.approx(0.9)
    assert found.relative == pytest.approx(float(change.norm()) / math.sqrt(60))


def test_a_change_everywhere_alike_is_not_sparse():
    """Ones: Hoyer and Gini 0, of rank one all the same."""
    found = _sparsity(torch.ones(4, 200))
    for value in (found.hoyer_entries, found.hoyer_columns, found.hoyer_rows, found.gini_columns):
        assert value == pytest.approx(0, abs=1e-6)
    assert found.stable_rank == pytest.approx(1)
    assert found.top_columns == pytest.approx(5 / 200)
    assert found.percent_columns == pytest.approx(2 / 200)


def test_an_identity_is_sparse_in_entries_alone():
    """I_4: columns alike (Hoyer 0), entries not (2/3), stable rank 4."""
    found = _sparsity(torch.eye(4))
    assert found.hoyer_columns == pytest.approx(0)
    assert found.hoyer_entries == pytest.approx((4 - 4 / 2) / 3)
    assert found.stable_rank == found.participation == pytest.approx(4)


def test_gini_and_hoyer_by_hand():
    """(1, 3): Gini 1/4; (0, 1) for both the largest there is; one number has no sparsity."""
    assert gini(torch.tensor([1.0, 3.0])) == pytest.approx(0.25)
    assert gini(torch.tensor([0.0, 1.0])) == pytest.approx(0.5)
    assert hoyer(torch.tensor([0.0, 1.0])) == pytest.approx(1)
    assert hoyer(torch.tensor([3.0])) == 0


def test_the_curve_of_mass_ends_with_all_of_it():
    """It begins with the largest column, rises, and ends at (1, 1)."""
    norms = torch.tensor([3.0, 1.0, 4.0, 1.0])
    points = curve(norms)
    assert points == [
        (0.25, pytest.approx(16 / 27)),
        (0.5, pytest.approx(25 / 27)),
        (0.75, pytest.approx(26 / 27)),
        (1.0, pytest.approx(1)),
    ]
    assert held(norms, 2) == pytest.approx(25 / 27)


def test_pooled_cells_are_means_over_what_there_is():
    """A last cell that is half full is not diluted; the largest cell is 1."""
    change = torch.arange(15.0).reshape(3, 5) - 7
    found = pooled(change, 2)
    plain = torch.tensor(
        [
            [change[:2, :3].abs().mean(), change[:2, 3:].abs().mean()],
            [change[2:, :3].abs().mean(), change[2:, 3:].abs().mean()],
        ]
    ).double()
    assert torch.allclose(found, plain / plain.max(), atol=1e-6)
    assert pooled(torch.eye(70, 3)).shape == (35, 3)


def test_singular_values_come_from_the_factors():
    """Those of the product, which is never formed."""
    left, right = torch.randn(20, 3), torch.randn(3, 30)
    whole = singular_values(left @ right)[:3].double()
    assert torch.allclose(singular_values_of(left, right), whole, rtol=1e-5)


# -- a patch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_what_a_patch_changes_is_what_merging_changes(known, architecture):
    """Edited weights less base weights, map by map, in the map's own orientation."""
    model = known(architecture)
    patch = edit(model, FRANCE, method="rome", options={"layer": 1, "moments": "identity"})
    (one,) = changed(model.view, patch)
    assert (one.layer, one.role) == (1, "mlp.out")
    role = model.view.roles.linear("mlp.out", 1)
    before = model.view.weight(role).clone()
    with model.applied(patch):
        after = model.view.weight(role).clone()
        (again,) = changed(model.view, patch)  # live patches make no difference
    assert torch.allclose(one.change_DI, after - before, atol=1e-6)
    assert torch.equal(one.weight_DI, before)
    assert torch.equal(again.weight_DI, before)
    plain = singular_values(one.change_DI)[: len(one.singular_S)].double()
    assert torch.allclose(one.singular_S.double(), plain, atol=1e-5 * float(plain[0]))
    assert one.sparsity.stable_rank == pytest.approx(1, rel=1e-4)


def test_pieces_of_a_fused_map_are_told_apart(known):
    """What lies in the keys' part of GPT-2's one map is a change of the keys."""
    model = known("gpt2")
    keys = model.view.roles.linear("attn.k", 2)
    whole = Address(parameter=keys.address.parameter)
    change = torch.zeros(model.view.parameter(whole.parameter).shape)
    keys.address.narrow(change)[3, 4] = 2.0
    part = LowRank(torch.ones(48, 1), torch.ones(1, 48))
    deltas = WeightDelta(whole, Dense(change)), WeightDelta(keys.address, part)
    (one,) = changed(model.view, _patch(model, *deltas))
    assert (one.layer, one.role) == (2, "attn.k")
    assert float(one.change_DI[4, 3]) == 3.0
    assert float(one.change_DI.sum()) == 48 * 48 + 2


def test_changes_come_from_the_lowest_block_up_and_others_first(known):
    """A row of the head has no block; a delta of zeros is no change."""
    model = known("gpt2")
    view = model.view
    head = Address(parameter=f"{view.roles.head}.weight")
    row = Rows(torch.tensor([3]), torch.ones(1, 48))
    low = LowRank(torch.ones(96, 2), torch.ones(2, 48))
    none = LowRank(torch.zeros(96, 1), torch.ones(1, 48))
    maps = [view.roles.linear("mlp.out", layer).address for layer in (3, 1, 0)]
    assert view.parameter(maps[0].parameter).shape == (192, 48)
    low, none = (LowRank(torch.cat([x.left, x.left]), x.right) for x in (low, none))
    changes = zip([*maps, head], [low, low, none, row], strict=True)
    patch = _patch(model, *(WeightDelta(a, c) for a, c in changes))
    found = list(changed(view, patch))
    assert [(one.layer, one.role) for one in found] == [
        (None, None),
        (1, "mlp.out"),
        (3, "mlp.out"),
    ]
    assert found[0].label == head.parameter
    assert found[1].label == "block 1, mlp.out"


def test_of_what_changes_no_weight_it_says_so(known):
    """A codebook is told as such; there is no matrix."""
    model = known("llama")
    patch = edit(model, FRANCE, method="grace", options={"layer": 2, "radius": 1.0})
    assert list(changed(model.view, patch)) == []
    (line,) = besides(patch)
    assert line.startswith("codebook@")
    assert "acts while the model runs" in line
    assert besides(edit(model, FRANCE, method="ice"))[0].endswith("a prompt rule")


# -- in vocabulary space ---------------------------------------------------------------------------


def test_ranks_of_a_column_by_hand():
    """E = I, column (0, 0, 5, 1): token 2 is first, token 3 second; equals share the last place."""
    scores = torch.tensor([[0.0, 0.0, 5.0, 1.0]])
    assert ranks(scores, [2, 3, 0]).tolist() == [[1, 2, 4]]


def test_the_most_changed_columns_are_found_over_all_matrices():
    """Norms of columns decide, whichever matrix they are in; what writes no state is left out."""
    small, large = torch.zeros(4, 6), torch.zeros(4, 6)
    small[:, 2] = torch.tensor([0.0, 0.0, 5.0, 1.0])
    large[2, :] = torch.tensor([9.0, 8.0, 7.0, 0.1, 6.0, 0.2])
    ones = torch.ones(4, 6)
    reading = Changed("c", 0, "mlp.up", 100 * ones, ones)
    matrices = [
        Changed("a", 1, "mlp.out", small, ones),
        Changed("b", 2, "mlp.out", large, ones),
        reading,
    ]
    found = columns(matrices)
    assert found is not None
    assert found.places == ((2, 0), (2, 1), (2, 2), (2, 4), (1, 2))
    assert torch.equal(found.after_CD[4], torch.tensor([1.0, 1.0, 6.0, 2.0]))
    assert torch.equal(found.before_CD, torch.ones(5, 4))
    assert found.direction_D.abs().tolist() == pytest.approx([0, 0, 1, 0], abs=1e-6)
    assert columns([reading]) is None
    assert columns([]) is None


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("normed", [False, True])
def test_a_column_that_writes_a_word_hits_it(known, architecture, normed):
    """A change of one column along a token's own row of the head puts that token first."""
    model = known(architecture)
    view = model.view
    role = view.roles.linear("mlp.out", 2)
    head_VD = view.values(f"{view.roles.head}.weight")
    token = view.tokenizer(" Rome", add_special_tokens=False)["input_ids"][0]
    word_D = head_VD[token] - head_VD.mean(0)
    column_I = torch.zeros(view.weight(role).shape[1])
    column_I[7] = 100.0
    patch = _patch(
        model,
        WeightDelta(role.address, role.factored(word_D[:, None], column_I[None])),
        requests=(FRANCE,),
    )
    found = columns(list(changed(view, patch)))
    assert found.places[0] == (2, 7)
    (one,) = project(view, found, patch.provenance.requests, normed=normed)
    assert one.token.strip() == "Rome"
    assert one.telling
    assert one.new.after == one.new.change == one.new.direction == 1
    assert one.new.before > 1
    assert one.old.after > 1
    assert one.new.hits(1) == {"before": 0.0, "after": 1.0, "random": pytest.approx(0, abs=0.3)}


# -- the command -----------------------------------------------------------------------------------


def test_the_command_shows_draws_and_refuses(folder, tmp_path):
    """One patch matrix by matrix, several as means; a picture; what cannot be used in one line."""
    model = ("--model", folder)
    lora = ("--method", "lora", "--set", "layers=0-2", "--set", "steps=2", "--set", "rank=1")
    made = shell(*TOLD, *model, *lora, "--out", "a.safetensors", cwd=tmp_path)
    assert made.code in (0, 1), made
    shown = shell("locate", "change", "a.safetensors", *model, "--out", "c.png", cwd=tmp_path)
    assert shown.code == 0, shown
    assert "block 2, mlp.out" in shown.out
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    other = shell(*TOLD, *model, "--method", "ft", "--set", "steps=2", "--out", "b.safetensors",
                  cwd=tmp_path)  # fmt: skip
    assert other.code in (0, 1), other
    both = ("locate", "change", "a.safetensors", "b.safetensors", *model)
    means = shell(*both, "--out", "c.svg", cwd=tmp_path)
    assert "mean over patches" in means.out
    told = shell(*both, "--json", cwd=tmp_path).json()
    assert [one["method"] for one in told["patches"]] == ["lora", "ft"]
    first = told["patches"][0]["matrices"]
    assert [one["layer"] for one in first] == [0, 1, 2]
    assert all(one["sparsity"]["stable_rank"] == pytest.approx(1, rel=1e-3) for one in first)
    assert len(first[0]["map"]) == 48
    assert set(told["hits"]["new"]["normed"]["10"]) == {"before", "after", "random"}
    for wrong, words in (
        (("a.safetensors", "--out", "c.gif"), "ends in .png or .svg"),
        (("none.safetensors",), "no such patch"),
    ):
        refused = shell("locate", "change", *wrong, *model, cwd=tmp_path)
        assert refused.code == 2
        assert words in refused.complaints[-1]


def test_a_memory_has_nothing_to_draw(folder, tmp_path):
    """It is told as what it is; a picture of it is refused, and none is written."""
    made = shell(*TOLD, "--model", folder, "--method", "grace", "--set", "layer=2", "--set",
                 "radius=1", "--out", "g.safetensors", cwd=tmp_path)  # fmt: skip
    assert made.code in (0, 1), made
    shown = shell("locate", "change", "g.safetensors", "--model", folder, cwd=tmp_path)
    assert "codebook@" in shown.out
    assert "changes no weight" in shown.out
    drawn = ("locate", "change", "g.safetensors", "--model", folder, "--out", "g.png")
    refused = shell(*drawn, cwd=tmp_path)
    assert refused.code == 2
    assert "nothing to draw" in refused.complaints[-1]
    assert not (tmp_path / "g.png").exists()
