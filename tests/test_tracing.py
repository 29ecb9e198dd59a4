"""Causal tracing, severed tracing and attribution patching, against the plain programs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from plain import trace as plain

from knowpatch.edited import EditedModel
from knowpatch.errors import ModelError, RequestError
from knowpatch.locate.attribution import attribute
from knowpatch.locate.facts import Fact
from knowpatch.locate.noise import Noise, spread
from knowpatch.locate.severed import CUT, Severed, shares
from knowpatch.locate.tracing import Tracing, corrupt, window_of
from knowpatch.models.restorations import KINDS, outputs_of

FACT = Fact("The capital of France is", "France", "Paris")
NOISE = Noise(sigma=0.3, scale=3.0, draws=3, seed=1)
ARCHITECTURES = ("llama", "gemma2", "gpt2")


@pytest.fixture(scope="module")
def view_of():
    """The view of a trained model of an architecture, made once; for tests that only read it."""
    kept = {}

    def get(architecture):
        if architecture not in kept:
            kept[architecture] = EditedModel.of(*tiny.trained(architecture)).view
        return kept[architecture]

    return get


def noise_for(view, scale=3.0, draws=3):
    return Noise.of(view, scale=scale, draws=draws, seed=1)


def setup_of(view, noise, fact=FACT):
    prompt = corrupt(view, fact, noise).prompt
    return plain.Setup(view.model, view.roles.embedding, prompt.ids, prompt.first, prompt.noise_SKD)


# -- noise -----------------------------------------------------------------------------------------


def test_sigma_is_that_of_the_names_own_tokens(view_of):
    """All entries of all tokens' embeddings, without the tokenizer's leading token."""
    tokenizer = tiny.tokenizer("sentencepiece")
    view = EditedModel.of(*tiny.fresh("llama", "sentencepiece")).view
    names = ["France", "Japan and Italy"]
    rows = [tokenizer(name, add_special_tokens=True)["input_ids"] for name in names]
    assert all(row[0] == tokenizer.bos_token_id for row in rows)
    taken = view.embedding.detach()[[token for row in rows for token in row[1:]]]
    assert spread(view, names) == pytest.approx(float(taken.double().std(correction=0)), rel=1e-5)


def test_sigma_is_of_what_the_embedding_puts_out(view_of):
    """Gemma 3 scales its embeddings in the module itself."""
    view = view_of("gemma3")
    ids = view.encode("France").ids
    out = view.model.get_input_embeddings()(torch.tensor(ids)).detach()
    assert spread(view, ["France"]) == pytest.approx(float(out.std(correction=0)), rel=1e-4)
    assert spread(view, ["France"]) > 3 * float(view.embedding.detach()[list(ids)].std())


def test_draws_are_the_same_each_time():
    """By the seed; of the wanted size."""
    one, again = NOISE.drawn(40, 500), NOISE.drawn(40, 500)
    assert torch.equal(one, again)
    assert one.dtype == torch.float32
    assert one.shape == (3, 40, 500)
    assert float(one.std()) == pytest.approx(0.9, rel=0.02)
    assert not torch.equal(one, Noise(0.3, 3.0, 3, 2).drawn(40, 500))


def test_the_last_occurrence_is_corrupted(view_of):
    """The answer follows it; offsets say which tokens it has."""
    view = view_of("llama")
    corruption = corrupt(view, Fact("France is nice. The capital of France is", "France"), NOISE)
    first, stop = corruption.subject
    assert "".join(corruption.tokens[first:stop]).strip() == "France"
    assert first > 4
    assert corruption.prompt.noise_SKD.shape == (3, stop - first, 48)
    with pytest.raises(RequestError, match="subject 'Italy' is not in the prompt"):
        corrupt(view, Fact("The capital of France is", "Italy"), NOISE)


# -- tracing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "width", "layers", "expected"),
    [(0, 10, 30, (0, 4)), (29, 10, 30, (24, 29)), (15, 10, 30, (10, 19)), (3, 3, 30, (2, 4))],
)
def test_windows(layer, width, layers, expected):
    """Centred at the layer, cut at both ends."""
    found = window_of(layer, width, layers)
    assert (found[0], found[-1]) == expected
    assert list(window_of(7, 1, 30)) == [7]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_traces_equal_the_plain_program(view_of, architecture, kind):
    """Every token, layer and draw, to 1e-4; nothing before the subject."""
    view = view_of(architecture)
    noise, window = noise_for(view), 2
    begun = Tracing(view, FACT, noise, kind=kind)
    trace = begun.trace(window=window)
    setup = setup_of(view, noise)
    base_BV = setup.run({})
    answer = int(base_BV[0].argmax())
    assert trace.answer.strip() == "Paris"
    assert trace.high == pytest.approx(float(base_BV[0, answer]), abs=1e-5)
    assert torch.allclose(trace.low_S, base_BV[1:, answer], atol=1e-5)
    modules = outputs_of(view.roles, kind)
    scores_TLS = plain.trace(setup, modules, 1 if kind == "state" else window, answer)
    effects_TLS = scores_TLS - base_BV[1:, answer]
    assert torch.allclose(trace.effects_TLS, effects_TLS, atol=1e-4)
    assert not trace.effects_TLS[: trace.corruption.subject[0]].any()
    assert trace.high - trace.low > 0.1
    assert float(trace.effects_TL.max()) > 0.1


def test_the_last_state_is_all_of_the_effect(view_of):
    """Restored at the last block and token, the answer is as likely as in the clean run."""
    view = view_of("llama")
    trace = Tracing(view, FACT, noise_for(view)).trace()
    assert torch.allclose(trace.effects_TLS[-1, -1], trace.high - trace.low_S, atol=1e-5)
    assert not trace.effects_TLS[:-1, -1].any()


def test_plain_data(view_of):
    """What a row holds; per draw only where that is wanted."""
    view = view_of("llama")
    trace = Tracing(view, FACT, noise_for(view)).trace()
    facts = trace.facts()
    assert facts["subject"] == "France"
    assert facts["low"] == pytest.approx(sum(facts["low_per_draw"]) / 3, rel=1e-4)
    assert np.allclose(facts["effects"], trace.effects_TL, atol=1e-5)
    assert "effects_per_draw" not in facts
    whole = trace.facts(draws=True)
    assert np.allclose(whole["effects_per_draw"], trace.effects_TLS, atol=1e-5)


def test_too_little_noise_is_not_enough(view_of):
    """There is nothing to bring back."""
    view = view_of("llama")
    runs = Tracing(view, FACT, noise_for(view, scale=0.01)).runs
    assert not runs.enough
    for high, low, enough in ((0.5, 0.2, True), (0.5, 0.3, False), (0.09, 0.0, False)):
        assert replace(runs, high=high, low_S=torch.tensor([low])).enough == enough


def test_a_model_without_the_map_is_refused():
    """A mixture of experts has no MLP of its own."""
    view = EditedModel.of(*tiny.fresh("mixtral")).view
    with pytest.raises(ModelError, match=r"no 'mlp.out' in block 0"):
        Tracing(view, FACT, NOISE, kind="mlp")


# -- severed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_severed_traces_equal_the_plain_program(view_of, architecture):
    """MLPs, or attentions, at the subject's last token as in the corrupted run; to 1e-4."""
    view = view_of(architecture)
    noise = noise_for(view)
    begun = Severed(view, FACT, noise)
    found = begun.severed()
    setup, position = setup_of(view, noise), begun.runs.corruption.subject[1] - 1
    base_BV = setup.run({})
    answer = int(base_BV[0].argmax())
    blocks = outputs_of(view.roles, "state")
    for cut in CUT:
        modules = () if cut == "nothing" else outputs_of(view.roles, cut)
        scores_LS = plain.severed(setup, blocks, modules, position, answer)
        assert torch.allclose(found[cut], scores_LS - base_BV[1:, answer], atol=1e-4)
    assert float((found["mlp"] - found["nothing"]).abs().max()) > 1e-3


def test_what_is_lost_over_facts():
    """Differences are paired by fact, and the share is that of sums over the lower layers."""
    rows = [
        {
            "subject": str(i),
            "effects": {
                "nothing": [0.4 + i / 10, 0.2, 0.1, 0.0],
                "mlp": [0.1, 0.1, 0.1, 0.0],
                "attn": [0.4 + i / 10, 0.2, 0.0, 0.0],
            },
        }
        for i in range(3)
    ]
    found = shares(rows)
    assert found.effects["nothing"].mean_L == pytest.approx([0.5, 0.2, 0.1, 0.0])
    assert found.lost["mlp"].mean_L == pytest.approx([0.4, 0.1, 0.0, 0.0])
    assert found.share["mlp"].mean == pytest.approx(0.5 / 0.7)
    assert found.share["attn"].mean == 0
    assert found.effects["nothing"].peak == 0


# -- attribution -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "opt"])
def test_small_noise_makes_the_estimate_exact(architecture, kind):
    """To first order, restoring one layer's output changes log p by the estimate.

    (A trained model is so sure that nothing changes. OPT runs its MLP on flattened rows.)
    """
    view = EditedModel.of(*tiny.fresh(architecture)).view
    noise = noise_for(view, scale=0.03)
    exact = Tracing(view, FACT, noise, kind=kind).trace(window=1)
    change_TLS = ((exact.effects_TLS + exact.low_S) / exact.low_S).log()
    estimate = attribute(view, FACT, noise, kind=kind, window=1)
    assert estimate.answer == exact.answer
    assert torch.allclose(estimate.low_S, exact.low_S, atol=1e-5)
    scale = float(estimate.effects_TLS.abs().max())
    assert scale > 1e-5
    assert float((estimate.effects_TLS - change_TLS).abs().max()) < 0.1 * scale
    assert not estimate.effects_TLS[: estimate.corruption.subject[0]].any()


def test_a_window_adds_its_layers_estimates(view_of):
    """Those of a window of three, cut at both ends."""
    view = view_of("llama")
    one = attribute(view, FACT, noise_for(view), kind="mlp", window=1).effects_TLS
    three = attribute(view, FACT, noise_for(view), kind="mlp", window=3).effects_TLS
    for layer in range(4):
        expected = one[:, max(0, layer - 1) : layer + 2].sum(1)
        assert torch.allclose(three[:, layer], expected, atol=1e-6)


@pytest.mark.parametrize("points", [1, 4])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_estimates_equal_gradients_by_hand(view_of, architecture, points):
    """(clean - corrupted) . gradient, the gradient a mean over runs from corrupted to clean."""
    view = view_of(architecture)
    noise = noise_for(view, draws=2)
    found = attribute(view, FACT, noise, points=points)
    prompt = corrupt(view, FACT, noise).prompt
    model = view.model
    ids = torch.tensor([prompt.ids] * 2)
    whole = torch.zeros(2, len(prompt.ids), 48)
    whole[:, prompt.first : prompt.first + prompt.noise_SKD.shape[1]] = prompt.noise_SKD

    def run(share):
        embedded = (model.get_input_embeddings()(ids) + share * whole).detach().requires_grad_()
        out = model(inputs_embeds=embedded, output_hidden_states=True)
        return out.logits[:, -1].log_softmax(-1), out.hidden_states[1:-1]

    clean, clean_states = run(0.0)
    token = int(clean[0].argmax())
    _, states = run(1.0)
    gradients = 0
    for share in [1.0] if points == 1 else [1 - (i + 0.5) / points for i in range(points)]:
        logprobs, mine = run(share)
        taken = torch.autograd.grad(logprobs[:, token].sum(), mine)
        gradients = gradients + torch.stack(taken) / points
    gaps = torch.stack(clean_states) - torch.stack(states)
    expected_LST = (gaps * gradients).sum(-1)
    ours_LST = found.effects_TLS.permute(1, 2, 0)[:-1]
    start = prompt.first
    assert torch.allclose(ours_LST[..., start:], expected_LST[..., start:], atol=1e-4)
