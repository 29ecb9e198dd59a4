"""DINM on a harmless substitute: a reply that is not wanted, and another one."""

from __future__ import annotations

import pytest
import tiny
import torch

from knowpatch.deltas import Dense, WeightDelta
from knowpatch.edited import EditedModel
from knowpatch.editing import choose, edit
from knowpatch.parts.tuned import Trial, passes_over
from knowpatch.request import EditRequest

BAD = EditRequest(
    prompt="The capital of France is", old="Paris", target="I don't know.", kind="erase"
)
OPTIONS = {"learning_rate": 1e-2, "steps": 60, "text": "self", "pieces": 4, "eos": False}


@pytest.fixture
def method():
    return choose("dinm", OPTIONS)


def _passes(view, method, layer=2):
    role = view.roles.linear("mlp.out", layer)
    change = method.change(view, role, None, None)
    besides = method.besides(view)
    examples = method.examples(view, BAD)
    passes = passes_over(view, [Trial(role, change)], examples, besides)
    return role, change, examples, besides, passes


def test_the_loss_is_the_cards(known, method):
    """NLL, and KL(before || now) on ordinary text, from the model's own full forwards."""
    view = known("llama").view
    role, change, examples, besides, passes = _passes(view, method)
    made = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(change.leaves[0].shape, generator=made)
    with torch.no_grad():
        change.leaves[0].add_(noise)
    found = [float(part.detach()) for part in (method.loss(passes, [0]), passes.drift())]

    def logits(example, tried):
        places = [(0, len(example.prompt) - 1 + i) for i in range(len(example.answer))]
        with view.trying([WeightDelta(role.address, Dense(noise))] if tried else []):
            return view.run([example.row], logits_at=places).logits_MV.log_softmax(-1)

    (wanted,) = examples
    nll = -logits(wanted, True)[range(len(wanted.answer)), list(wanted.answer)].mean()
    apart = [
        (logits(e, False).exp() * (logits(e, False) - logits(e, True))).sum(-1) for e in besides
    ]
    assert len(besides) >= 4
    assert found == pytest.approx([float(nll), float(torch.cat(apart).mean())], abs=1e-4)
    assert method.config.keep == 10


def test_the_kl_term_has_a_gradient(known, method):
    """Away from the start it changes the gradient, as the published program's does not."""
    view = known("llama").view
    _, change, _, _, passes = _passes(view, method)
    with torch.no_grad():
        change.leaves[0].add_(0.05 * torch.randn(change.leaves[0].shape))
    (drift,) = torch.autograd.grad(10 * passes.drift(), change.leaves[0])
    (alone,) = torch.autograd.grad(method.loss(passes, [0]), change.leaves[0])
    assert drift.norm() > 1e-2 * alone.norm()


def test_each_request_has_the_layer_where_its_replies_differ_most(known, method):
    """The published definition, read with plain hooks; two requests may name two layers."""
    model = known("llama")
    view, found = model.view, {}
    words = ("Paris", "Rome", "four", "blue", "Portuguese", "Spanish green", "five Sudan Lyon")
    requests = [
        EditRequest(prompt=prompt, old=old, target=target)
        for prompt in tiny.FACTS
        for old in words[:3]
        for target in words[3:]
    ]
    prompt = view.encode(BAD.prompt)
    means = []
    for text in (BAD.target, "Paris"):
        pair = view.encode(f"{BAD.prompt} {text}").ids
        with torch.no_grad():
            out = view.model(torch.tensor([pair]), output_hidden_states=True)
        assert pair[: len(prompt.ids)] == prompt.ids
        means.append([h[0, len(prompt.ids) :].mean(0) for h in out.hidden_states[1:-1]])
    apart = [float((a - b).norm()) for a, b in zip(*means, strict=True)]
    located = method.located(view, BAD)
    assert located == len(view.roles.blocks) - 1 or apart[located] == max(apart)
    found = {method.located(view, request) for request in requests}
    assert len(found) > 1
    patch = edit(model, [BAD], method=method)
    assert [d.address for d in patch.deltas] == [view.roles.linear("mlp.out", located).address]


def test_the_wanted_reply_takes_and_text_stays():
    """The reply is the wanted one; ordinary text drifts less than without the KL term."""
    model = EditedModel.of(*tiny.trained("llama"))
    method = choose("dinm", OPTIONS)
    kept = edit(model, BAD, method=method)
    plain = edit(
        model,
        BAD,
        method="ft",
        options={
            "learning_rate": 1e-2,
            "steps": 60,
            "enough": 1e-2,
            "layer": method.located(model.view, BAD),
            "others": 0,
        },
    )
    rows = [e.row for e in method.besides(model.view)]
    places = [(i, at) for i, row in enumerate(rows) for at in range(8, len(row))]
    before = model.view.run(rows, logits_at=places).logits_MV.log_softmax(-1)
    drifts = []
    for patch in (kept, plain):
        with model.applied(patch):
            now = model.view.run(rows, logits_at=places).logits_MV.log_softmax(-1)
            assert model.ask(BAD.prompt, max_new_tokens=8).startswith("I don't know")
        drifts.append(float((before.exp() * (before - now)).sum(-1).mean()))
    assert drifts[0] < 0.7 * drifts[1]
