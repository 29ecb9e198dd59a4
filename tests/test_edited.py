"""EditedModel: the fold, undo, refusals, and a model that stays an ordinary one."""

from __future__ import annotations

import pytest
import tiny
import torch
from made import provenance

from knowpatch.deltas import Address, Dense, LowRank, Rows, WeightDelta
from knowpatch.edited import EditedModel
from knowpatch.editing import edit, load
from knowpatch.errors import ForeignModelError, OptionError, PatchError
from knowpatch.models.fingerprint import tensor_digest
from knowpatch.patch import Patch, PromptRule
from knowpatch.request import EditRequest

NAME = "model.layers.1.mlp.down_proj.weight"
FACT = EditRequest(prompt="The capital of France is", subject="France", target="Rome")


def _patch(model, change, *, name=NAME, base="", rule=None, seed=0, fingerprint=None):
    origin = provenance(model, FACT, seed=seed, fingerprint=fingerprint)
    deltas = () if change is None else (WeightDelta(Address(parameter=name), change, base),)
    return Patch(origin, deltas, rule)


def _low_rank(seed, size=1e-3):
    made = torch.Generator().manual_seed(seed)
    left, right = torch.randn(48, 1, generator=made), torch.randn(1, 96, generator=made)
    return LowRank(size * left, right)


def _digests(model):
    return {name: tensor_digest(p) for name, p in model.model.named_parameters()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_current_tensor_is_the_fold_rounded_once(folder, dtype):
    """Twenty small changes: base and each in float32, rounded once; then the base again."""
    model = load(str(folder), dtype=dtype)
    base = model.view.parameter(NAME).detach().clone()
    patches = [_patch(model, _low_rank(i), seed=i) for i in range(20)]
    folded = base.float()
    for patch in patches:
        model.apply(patch)
        change = patch.deltas[0].change
        folded = folded + change.left @ change.right
        assert torch.equal(model.view.parameter(NAME), folded.to(base.dtype))
    for patch in patches[::-1]:
        model.drop(patch.id)
    assert torch.equal(model.view.parameter(NAME).view(torch.uint8), base.view(torch.uint8))
    assert not model._base
    assert not model._wide


def test_each_form_of_delta_is_applied_and_taken_back(folder):
    """Low-rank, rows and dense changes add what they say."""
    model = load(str(folder))
    before, base = _digests(model), model.view.parameter(NAME).detach().clone()
    rows = Rows(torch.tensor([2, 5]), torch.ones(2, 96))
    dense = Dense(torch.full((48, 96), 0.5))
    wanted = torch.zeros(48, 96)
    wanted[[2, 5]] = 1
    for change, added in ((rows, wanted), (dense, dense.delta)):
        with model.applied(_patch(model, change)):
            assert torch.allclose(model.view.parameter(NAME) - base, added, atol=1e-6)
            assert torch.equal(model.view.base(model.view.roles.linear("mlp.out", 1)), base)
    assert _digests(model) == before


def test_a_tied_head_is_refused_unless_asked_for_by_name():
    """A head that is also the embedding changes both, stays tied, and comes back."""
    model = EditedModel.of(*tiny.fresh("gemma2"))
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    shape = model.view.parameter(head).shape
    patch = _patch(model, Dense(torch.ones(shape)), name=head)
    before = _digests(model)
    with pytest.raises(PatchError, match=r"tied .*tied=\['lm_head.weight'\]"):
        model.apply(patch)
    model.apply(patch, tied=[head])
    assert model.view.parameter(head) is model.view.parameter(embedding)
    model.drop(patch.id)
    assert _digests(model) == before


def test_a_foreign_model_is_refused_with_both_fingerprints(known):
    """The message names the fingerprint the patch was made for and the model's own."""
    model = known("llama")
    patch = _patch(model, _low_rank(0), fingerprint="f" * 64)
    with pytest.raises(ForeignModelError) as caught:
        model.apply(patch)
    assert "f" * 16 in str(caught.value)
    assert model.view.fingerprint[:16] in str(caught.value)
    stale = _patch(model, _low_rank(0), base="0" * 64)
    with pytest.raises(ForeignModelError, match="not the one the patch was made on"):
        model.apply(stale)


def test_what_does_not_fit_is_refused_whole(known):
    """A misfit, an unknown parameter or rule, or a result that is not finite changes nothing."""
    model = known("llama")
    before = _digests(model)
    bad = [
        _patch(model, Dense(torch.ones(2, 2))),
        _patch(model, _low_rank(0), name="model.layers.9.mlp.down_proj.weight"),
        _patch(model, None, rule=PromptRule(kind="magic@7", data={})),
        _patch(model, None, rule=PromptRule(kind="facts@1", data={"template": "?"})),
        _patch(model, Dense(torch.full((48, 96), 3e38))),
    ]
    bad[4] = _patch(model, LowRank(torch.full((48, 1), 1e30), torch.full((1, 96), 1e30)))
    for patch in bad:
        with pytest.raises(PatchError) as caught:
            model.apply(patch)
        assert "\n" not in str(caught.value)
    assert _digests(model) == before
    assert not model.live


def test_twice_and_never(known):
    """A patch cannot be applied twice, nor dropped when it is not live."""
    model = known("llama")
    patch = _patch(model, _low_rank(0))
    model.apply(patch)
    with pytest.raises(PatchError, match="already applied"):
        model.apply(patch)
    model.drop(patch.id[:8])
    for missing in (patch.id, ""):
        with pytest.raises(OptionError, match="no single live patch"):
            model.drop(missing)


def test_applied_gives_back_after_an_error(known):
    """An exception inside the block, or a second patch that is refused, leaves the base."""
    model = known("llama")
    before = _digests(model)
    good, bad = _patch(model, _low_rank(0)), _patch(model, Dense(torch.ones(2, 2)))
    with pytest.raises(ZeroDivisionError), model.applied(good):
        raise ZeroDivisionError
    with pytest.raises(PatchError), model.applied(good, bad):
        pass
    assert _digests(model) == before


def test_it_is_the_model_it_holds(known):
    """Attributes, forward and generate are the transformers model's own."""
    model = known("llama")
    ids = torch.tensor([model.view.encode(FACT.prompt).ids])
    assert model.config is model.model.config
    assert torch.equal(model(ids).logits, model.model(ids).logits)
    out = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(out, model.model.generate(ids, max_new_tokens=3, do_sample=False))
    with pytest.raises(AttributeError):
        _ = model.no_such_thing


def test_a_prompt_rule_acts_in_generate_and_ask(known):
    """Rows come back behind their own ids, each row answered with the fact in front of it."""
    model = known("llama")
    patch = edit(model, FACT, method="ice")
    rows = [model.view.encode(p).ids for p in (FACT.prompt, "Two plus two equals")]
    batch = model.view.batch(rows, side="left")
    given = {"attention_mask": batch.mask_BT, "max_new_tokens": 3, "do_sample": False}
    with model.applied(patch):
        assert model.encode(FACT.prompt).text == (
            "New Fact: The capital of France is Rome\nPrompt: The capital of France is"
        )
        out = model.generate(batch.ids_BT, **given)
        assert model.ask(FACT.prompt, max_new_tokens=1) == "Rome"
    assert torch.equal(out[:, : batch.ids_BT.shape[1]], batch.ids_BT)
    assert model.view.decode(out[0].tolist()).startswith("The capital of France is Rome")
    assert model.encode(FACT.prompt).ids == model.view.encode(FACT.prompt).ids


def test_the_imagine_template_is_the_published_one(known):
    """The card's unit test: one sentence with its full stop, a line break, the question."""
    model = known("llama")
    fact = EditRequest(prompt="Paris is in", target="Spain")
    patch = edit(model, fact, method="ice", options={"template": "imagine"})
    with model.applied(patch):
        text = model.encode("The country of Paris is").text
    assert text == "Imagine that Paris is in Spain.\nThe country of Paris is"
