"""The logit lens: equal to the model at the last block, plain at the others, before and after."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from shell import FRANCE as FRANCE_TOLD
from shell import run as shell

from knowpatch.editing import edit
from knowpatch.errors import OptionError
from knowpatch.locate.lens import before_and_after, lens, plain
from knowpatch.models.passes import Tap
from knowpatch.patch import Procedure
from knowpatch.request import EditRequest

PROMPT = "The capital of France is"
PATCH = "p.safetensors"
FRANCE = EditRequest(prompt=PROMPT, subject="France", target="Rome", old="Paris")


def _token(model, text):
    return model.tokenizer(f" {text}", add_special_tokens=False)["input_ids"][0]


def _answers(model):
    return {"target": _token(model, "Rome"), "old answer": _token(model, "Paris")}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_the_lens_is_the_plain_computation(known, architecture):
    """At the last state the model's own logits; before it, norm and head of a block's output."""
    model = known(architecture)
    ids = model.encode(PROMPT).ids
    found = lens(model.view, ids, _answers(model))
    logits = model.model(torch.tensor([ids])).logits[0].detach().float()
    p_TV = logits.softmax(-1)
    assert torch.allclose(found.p_LTA[-1], p_TV[:, list(_answers(model).values())], atol=1e-5)
    assert torch.equal(found.top_LTK[-1, :, 0], logits.argmax(-1))
    assert float(found.kl_LT[-1].max()) == pytest.approx(0, abs=1e-5)
    entropy = -(p_TV * p_TV.log()).sum(-1)
    assert torch.allclose(found.entropy_LT[-1], entropy, atol=1e-4)
    norm = dict(model.model.named_modules())
    norm = norm[next(name for name in ("model.norm", "transformer.ln_f") if name in norm)]
    tap = Tap(model.view.roles.blocks[1].module, "output")
    states = model.view.run([ids], taps=[tap]).tapped[tap][0]
    with torch.no_grad():
        plain_TV = model.model.get_output_embeddings()(norm(states))
    if cap := getattr(model.model.config, "final_logit_softcapping", None):
        plain_TV = torch.tanh(plain_TV / cap) * cap
    expected = plain_TV.softmax(-1)[:, _token(model, "Paris")]
    assert torch.allclose(found.p_LTA[2, :, 1], expected, atol=1e-5)
    embedded = Tap(model.view.roles.blocks[0].module, "input")
    first = model.view.run([ids], taps=[embedded]).tapped[embedded][0]
    with torch.no_grad():
        start_TV = model.model.get_output_embeddings()(norm(first)).softmax(-1)
    assert found.top_LTK[0, 0, 0] == start_TV[0].argmax()


def test_ranks_entering_and_crossing(known):
    """Ranks count from 1; an answer enters where it is first near, and crosses for good."""
    model = known("llama")
    found = lens(model.view, model.encode(PROMPT).ids, _answers(model))
    assert int(found.rank_LTA[-1, -1, 1]) == 1  # Paris
    assert found.enters("old answer", 1) <= 4
    assert found.enters("old answer", 10) <= found.enters("old answer", 1)
    assert found.crosses("target", "old answer") is None
    first = found.crosses("old answer", "target")
    ahead = (found.p_LTA[:, -1, 1] > found.p_LTA[:, -1, 0]).tolist()
    assert all(ahead[first:])
    assert first == 0 or not ahead[first - 1]


def test_a_patch_moves_the_lens_and_is_taken_back(known):
    """With the patch the new answer comes out first; below the changed block nothing moves."""
    model = known("llama")
    patch = edit(model, FRANCE, method="ft", options={"layer": 1, "learning_rate": 0.01})
    without, changed = before_and_after(model, PROMPT, [patch], _answers(model))
    again, nothing = before_and_after(model, PROMPT, [], _answers(model))
    assert nothing is None
    assert torch.equal(again.p_LTA, without.p_LTA)
    assert not model.live
    assert int(changed.rank_LTA[-1, -1, 0]) == 1
    assert changed.crosses("target", "old answer") is not None
    # What enters block 1 does not know of a change in it.
    assert torch.allclose(changed.p_LTA[:2], without.p_LTA[:2], atol=1e-6)


def test_a_memory_and_a_prompt_rule_are_looked_into(known):
    """A wrap acts in the pass; of a rewritten prompt only the common end is compared."""
    model = known("llama", chat=True)
    memory = edit(model, FRANCE, method="grace", options={"layer": 2, "radius": 1.0, "steps": 60})
    _, changed = before_and_after(model, PROMPT, [memory], _answers(model))
    assert int(changed.rank_LTA[-1, -1, 0]) == 1
    rule = edit(model, FRANCE, method="ice")
    without, changed = before_and_after(model, PROMPT, [rule], _answers(model))
    assert without.tokens == changed.tokens
    assert "".join(changed.tokens).strip() in PROMPT
    assert not torch.allclose(without.p_LTA[-1, -1], changed.p_LTA[-1, -1], atol=1e-3)


def test_what_answers_in_steps_is_refused(known):
    """There is no one pass to look into."""
    model = known("llama")
    made = edit(model, FRANCE, method="ice")
    patch = replace(made, rule=None, procedure=Procedure("steps@1", {}))
    with pytest.raises(OptionError, match="several calls"):
        before_and_after(model, PROMPT, [patch], {})


def test_json_has_every_state_and_token(known):
    """Five states of four blocks, the tokens, the likeliest words of each cell."""
    model = known("llama")
    found = lens(model.view, model.encode(PROMPT).ids, _answers(model))
    told = json.loads(json.dumps(plain(found, model.view)))
    assert len(told["states"]) == 5
    assert len(told["states"][0]) == len(told["tokens"]) == len(found.tokens)
    cell = told["states"][-1][-1]
    assert cell["top"][0]["token"].strip() == "Paris"
    assert cell["answers"]["old answer"]["rank"] == 1


def test_the_command_shows_draws_and_refuses(folder, tmp_path):
    """A table, a picture, JSON; a bad picture name, a blank prompt, a missing patch in one line."""
    model = ("--model", folder)
    edited = shell(
        *FRANCE_TOLD, *model, "--set", "learning_rate=0.01", "--out", PATCH, cwd=tmp_path
    )
    assert edited.code == 0
    asked = ("locate", "lens", PROMPT, "--patch", PATCH, *model)
    shown = shell(*asked, "--out", "lens.png", cwd=tmp_path)
    assert shown.code == 0, shown
    assert "rank of Rome" in shown.out
    assert "stays ahead of 'Paris'" in shown.out
    assert (tmp_path / "lens.png").read_bytes()[:4] == b"\x89PNG"
    told = shell(*asked, "--json", cwd=tmp_path).json()
    assert told["answers"] == {"target": " Rome", "old answer": " Paris"}
    assert told["with"]["states"][-1][-1]["answers"]["target"]["p"] > 0.5
    bare = shell("locate", "lens", PROMPT, "--target", "Rome", *model, "--json", cwd=tmp_path)
    assert bare.json()["with"] is None
    for wrong, words in (
        (("locate", "lens", " ", *model), "the prompt is empty"),
        ((*asked, "--out", "lens.txt"), "ends in .png or .svg"),
        (("locate", "lens", PROMPT, "--patch", "none.safetensors", *model), "no such patch"),
    ):
        refused = shell(*wrong, cwd=tmp_path)
        assert refused.code == 2
        assert words in refused.complaints[-1]
        assert len(refused.complaints) == 1
