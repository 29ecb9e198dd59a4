"""Lifelong normalisation: the self-checks of UltraEdit's and StableEdit's cards, on tiny models."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from torch.testing import assert_close

from knowpatch.deltas import LowRank
from knowpatch.editing import choose, edit, prepare
from knowpatch.errors import EditError, ModelError, OptionError, RequestError
from knowpatch.files import cache_folder
from knowpatch.method import Shape
from knowpatch.parts.lifelong import blocks
from knowpatch.parts.pilots import pilots
from knowpatch.parts.seen import Running, Scale, Step, merged, seen_in, traces_of
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

FACTS = [
    EditRequest(prompt="The capital of France is", target="Rome"),
    EditRequest(prompt="Two plus two equals", target="five Sudan Lyon"),
    EditRequest(prompt="The Nile flows through", target="Tokyo"),
    EditRequest(prompt="The capital of Japan is", target="Paris London"),
    EditRequest(prompt="The colour of the sky is", target="green"),
]
EARLY = {"gate": [1], "up": [1, 2]}
PLAIN = {"eta": 1e-3, "alpha": 0.5, "rounds": 1, "warmup": "none"}
BOTH = pytest.mark.parametrize("name", ["ultraedit", "stableedit"])


def rows(count, width, seed=0):
    """Correlated rows, their mean and sizes unlike by coordinate."""
    drawn = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=drawn, dtype=torch.float64)
    sizes = torch.logspace(-2, 1, width, dtype=torch.float64)
    plain = torch.randn(count, width, generator=drawn, dtype=torch.float64)
    return plain @ mixed * sizes + 3 * sizes


def changes(model, patch):
    """Each change as (out, in), by address."""
    found = {}
    for delta in patch.deltas:
        low = delta.change
        assert isinstance(low, LowRank)
        whole = low.left @ low.right
        found[delta.address] = whole
    return found


def same(one, other, rtol=1e-6):
    """Two states hold the same."""
    assert one.keys() == other.keys()
    for name in one:
        for a, b in (
            (one[name].inputs, other[name].inputs),
            (one[name].gradients, other[name].gradients),
        ):
            assert a.count == b.count
            # Of the size of the whole: what is next to nothing carries the rounding of the rest.
            for x, y in (
                (a.mean_F, b.mean_F),
                (a.square_F, b.square_F),
                (a.scatter_FF, b.scatter_FF),
            ):
                if x is None or y is None:
                    assert x is y
                else:
                    assert float((x - y).norm()) <= rtol * float(y.norm())


# -- statistics ------------------------------------------------------------------------------------


def test_streaming_is_the_whole():
    """Turns of any size, one row too, merge to mean, deviation and covariance of all the rows."""
    all_TF = rows(200, 7)
    parts = all_TF.split([1, 1, 60, 3, 135])
    state = {}
    for part in parts:
        state = merged(state, seen_in(traces_of("m", part, part, root=True)))
    found = state["m"].gradients
    assert found.count == 200
    assert_close(found.mean_F, all_TF.mean(0), rtol=1e-6, atol=0)
    assert_close(found.sigma_F, all_TF.std(0, correction=0), rtol=1e-6, atol=0)
    covariance_FF = torch.cov(all_TF.T, correction=0)
    assert float((found.scatter_FF / 200 - covariance_FF).norm()) < 1e-6 * float(
        covariance_FF.norm()
    )


def test_a_root_has_no_more_rows_than_columns():
    """R^T R is the scatter, R being (min(T, O), O), in float32."""
    for count in (3, 40):
        gradients_TO = rows(count, 8)
        traces = traces_of("m", gradients_TO, gradients_TO, root=True)
        assert traces["root.m"].shape == (min(count, 8), 8)
        assert all(trace.dtype == torch.float32 for trace in traces.values())
        (seen,) = seen_in(traces).values()
        assert_close(
            seen.gradients.scatter_FF.diagonal(), seen.gradients.square_F, rtol=1e-5, atol=0
        )


def test_one_row_and_dead_coordinates_are_numbers():
    """Nothing is divided by nothing: one row, or a coordinate that never moves."""
    for count in (1, 30):
        dead_TF = rows(count, 6).index_fill(1, torch.tensor([2]), 0.0)
        (seen,) = seen_in(traces_of("m", dead_TF, dead_TF, root=True)).values()
        step = Step(seen.inputs, Scale.diagonal(seen.gradients), alpha=1.0, eta=1.0)
        for factor in step.factors(dead_TF, dead_TF):
            assert bool(torch.isfinite(factor).all())


def test_whitened_values_have_the_identity_as_covariance():
    """To 5 %, where there are rows enough; below twice the width each coordinate is divided."""
    method = choose("stableedit")
    for count, whitened in ((15, False), (16, True), (2000, True)):
        gradients_TO = rows(count, 8)
        (seen,) = seen_in(traces_of("m", gradients_TO, gradients_TO, root=True)).values()
        scale = method.scale(seen.gradients)
        assert scale.by.ndim == (2 if whitened else 1)
    whole_OO = torch.cov(scale(gradients_TO).T)
    assert float((whole_OO - torch.eye(8)).abs().max()) < 0.05


def test_the_size_of_a_scale_is_what_gradients_have():
    """The mean of g times g^, by both scales, with which eta is chosen."""
    gradients_TO = rows(4000, 8)
    (seen,) = seen_in(traces_of("m", gradients_TO, gradients_TO, root=True)).values()
    for name in ("ultraedit", "stableedit"):
        scale = choose(name).scale(seen.gradients)
        mean = float((gradients_TO * scale(gradients_TO)).sum(1).mean())
        assert scale.size == pytest.approx(mean, rel=0.01)


# -- the solve -------------------------------------------------------------------------------------


def _step(inputs_TI, gradients_TO, alpha, eta=0.1):
    seen_I, seen_O = (
        Running.of(rows(50, inputs_TI.shape[1])),
        Running.of(rows(50, gradients_TO.shape[1])),
    )
    step = Step(seen_I, Scale.diagonal(seen_O), alpha, eta)
    h_TI = (inputs_TI - seen_I.mean_F) / seen_I.sigma_F
    g_TO = (gradients_TO - seen_O.mean_F) / seen_O.sigma_F
    return step, -eta * (h_TI**2).sum(1)[:, None] * g_TO


@pytest.mark.parametrize("count", [1, 5, 9, 30])
def test_primal_is_dual(count):
    """The factors give (H^T H + alpha I)^-1 H^T V, to 1e-9."""
    inputs_TI, gradients_TO = rows(count, 9, seed=1), rows(count, 6, seed=2)
    step, values_TO = _step(inputs_TI, gradients_TO, alpha=0.7)
    assert torch.allclose(step.values(inputs_TI, gradients_TO), values_TO)
    left, right = step.factors(inputs_TI, values_TO)
    gram_II = inputs_TI.T @ inputs_TI + 0.7 * torch.eye(9, dtype=torch.float64)
    plain_IO = torch.linalg.solve(gram_II, inputs_TI.T @ values_TO)
    assert float((left @ right - plain_IO.T).norm()) < 1e-9 * float(plain_IO.norm())
    assert left.shape[1] <= count


def test_one_row_gets_its_share():
    """delta W h = v |h|^2 / (|h|^2 + alpha)."""
    inputs_TI, gradients_TO = rows(1, 9, seed=1), rows(1, 6, seed=2)
    step, values_TO = _step(inputs_TI, gradients_TO, alpha=2.0)
    left, right = step.factors(inputs_TI, values_TO)
    energy = float(inputs_TI.square().sum())
    assert_close(left @ right @ inputs_TI[0], values_TO[0] * energy / (energy + 2.0))


# -- on a model ------------------------------------------------------------------------------------


def _plain_rows(model, requests, module):
    """Inputs and gradients of a map at the answers' tokens: full forward passes, autograd hooks."""
    kept = {}

    def see(module, args, output):
        output.requires_grad_()
        output.retain_grad()
        kept["h"], kept["g"] = args[0].detach(), output

    hook = model.model.get_submodule(module).register_forward_hook(see)
    inputs, gradients = [], []
    total = 0
    for request in requests:
        prompt = list(model.encode(request.prompt).ids)
        text = model.tokenizer(f" {request.target}", add_special_tokens=False)["input_ids"]
        labels = [-100] * (len(prompt) - 1) + list(text)
        logits = model.model(torch.tensor([[*prompt, *text[:-1]]])).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, kept["g"])
        at = [i for i, label in enumerate(labels) if label >= 0]
        inputs.append(kept["h"].reshape(len(labels), -1)[at])
        gradients.append(gradient.reshape(len(labels), -1)[at])
        total += len(at)
    hook.remove()
    return torch.cat(inputs).double(), torch.cat(gradients).double() / total


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
@BOTH
def test_a_turn_is_the_published_program(known, architecture, name):
    """Full passes, autograd hooks and the primal solve give the same change, to 1e-5."""
    model = known(architecture)
    where = {"up": [1, 2]} if name == "ultraedit" else {"out": [2]}
    options = {**PLAIN, **where, "loss": "mean"}
    patch = edit(model, FACTS, method=name, options=options)
    for role, (address, change) in zip(
        [model.view.roles.linear(f"mlp.{r}", b) for r, bs in where.items() for b in bs],
        changes(model, patch).items(),
        strict=True,
    ):
        assert address == role.address
        h_TI, g_TO = _plain_rows(model, FACTS, role.module)
        g_TO = role.address.narrow(g_TO.T).T
        hat_TI = (h_TI - h_TI.mean(0)) / h_TI.std(0, correction=0)
        hat_TO = (g_TO - g_TO.mean(0)) / g_TO.std(0, correction=0)
        values_TO = -1e-3 * (hat_TI**2).sum(1, keepdim=True) * hat_TO
        gram_II = h_TI.T @ h_TI + 0.5 * torch.eye(h_TI.shape[1], dtype=torch.float64)
        plain_OI = torch.linalg.solve(gram_II, h_TI.T @ values_TO).T
        found_OI = role.oriented(change).double()
        assert float((found_OI - plain_OI).norm()) < 1e-5 * float(plain_OI.norm())


def test_without_rows_to_whiten_by_both_methods_are_one(known):
    """StableEdit with each coordinate divided writes what UltraEdit writes."""
    model = known("llama")
    options = {**PLAIN, "out": [1, 2], "alpha": 10.0}
    one, other = (
        edit(model, FACTS, method=m, options=options) for m in ("ultraedit", "stableedit")
    )
    for a, b in zip(one.deltas, other.deltas, strict=True):
        assert torch.equal(a.change.left, b.change.left)
        assert torch.equal(a.change.right, b.change.right)


@BOTH
def test_the_rank_is_that_of_the_tokens(known, name):
    """One for each answer token, however many the rounds."""
    model = known("llama")
    tokens = sum(len(a.target) for a in choose(name).answers(model.view, FACTS))
    options = {"enough": 0.0, "gain": 0.1}
    assert edit(model, FACTS, method=name, options={**options, "rounds": 1}).rank == tokens
    assert edit(model, FACTS, method=name, options={**options, "rounds": 12}).rank == tokens


@BOTH
def test_no_step_is_no_change(known, name):
    """eta = 0 changes nothing."""
    model = known("llama")
    patch = edit(model, FACTS, method=name, options={"eta": 0, "rounds": 2})
    assert all(not bool(change.any()) for change in changes(model, patch).values())


def test_micro_batches_only_matter_to_the_mean(known):
    """A token's gradient is its own, whoever shares the pass; the published mean divides it."""
    model = known("llama")

    def traces(**options):
        return edit(model, FACTS, method="ultraedit", options={**PLAIN, **EARLY, **options}).traces

    name = "gradients.mlp.up.2"
    assert_close(traces(micro=1)[name], traces(micro=10)[name], rtol=1e-3, atol=1e-6)
    assert not torch.allclose(traces(micro=1, loss="mean")[name], traces(loss="mean")[name], 0.1)
    assert all(bool(torch.isfinite(t).all()) for t in traces(micro=1, loss="mean").values())


def test_rounds_go_on_until_it_is_enough(known):
    """More rounds learn more; they end when the answers' NLL is small enough."""
    model = known("llama")
    method = choose("ultraedit", {"rounds": 30, "enough": 0.3, **EARLY})
    patch = edit(model, FACTS[:1], method=method)
    with model.applied(patch):
        nll, _ = method.read(
            model.view, method.maps(model.view), method.answers(model.view, FACTS[:1])
        )
    assert nll < 0.3
    longer = choose("ultraedit", {"rounds": 60, "enough": 0.3, **EARLY})
    same_again = edit(model, FACTS[:1], method=longer)
    for one, other in zip(patch.deltas, same_again.deltas, strict=True):
        assert torch.equal(one.change.left, other.change.left)


def test_a_round_that_goes_too_far_is_taken_back(known):
    """Where one edited map feeds another, a step ten times too large still ends at the answer."""
    model = known("llama")
    method = choose("ultraedit", {"rounds": 30, "gain": 50.0})
    patch = edit(model, FACTS[:1], method=method)
    with model.applied(patch):
        nll, _ = method.read(
            model.view, method.maps(model.view), method.answers(model.view, FACTS[:1])
        )
    assert nll < 0.5


# -- state -----------------------------------------------------------------------------------------


@BOTH
def test_the_state_is_folded_from_the_live_patches(known, name, tmp_path):
    """Three turns are one pass over all their rows; without the middle one it never was."""
    model = known("llama")
    method = choose(name, {"rounds": 2})
    patches, turns = [], []
    for part in (FACTS[:1], FACTS[1:3], FACTS[3:]):
        _, read = method.read(model.view, method.maps(model.view), method.answers(model.view, part))
        turns.append(read)
        patches.append(edit(model, part, method=method))
        model.apply(Patch.load(patches[-1].save(tmp_path / "p.safetensors")))
    ready = prepare(model, method)

    def whole(*chosen):
        joined = {
            key: tuple(torch.cat([turn[key][side] for turn in chosen]) for side in (0, 1))
            for key in chosen[0]
        }
        return merged(ready.prepared, seen_in(method.traces(joined)))

    same(ready.state, whole(*turns))
    model.drop(patches[1].id)
    same(prepare(model, method).state, whole(turns[0], turns[2]))
    fresh = known("llama")
    for patch in (patches[0], patches[2]):
        fresh.apply(patch)
    never = prepare(fresh, method).state
    for key, seen in prepare(model, method).state.items():
        assert torch.equal(seen.gradients.mean_F, never[key].gradients.mean_F)
        assert torch.equal(seen.inputs.square_F, never[key].inputs.square_F)


@BOTH
def test_what_is_folded_is_what_was_used(known, name, tmp_path):
    """A patch read back gives the state its edit was made with, to the last bit."""
    model = known("llama")
    method = choose(name)
    patch = edit(model, FACTS, method=method)
    again = Patch.load(patch.save(tmp_path / "p.safetensors"))
    prepared = prepare(model, method).prepared
    for one, other in zip(
        method.fold(prepared, None, patch).values(),
        method.fold(prepared, None, again).values(),
        strict=True,
    ):
        assert torch.equal(one.gradients.square_F, other.gradients.square_F)
        assert torch.equal(one.inputs.mean_F, other.inputs.mean_F)
    used = merged(prepared, seen_in(patch.traces))
    same(method.fold(prepared, None, patch), used, rtol=0)


@BOTH
def test_statistics_are_made_once_and_announced(known, name):
    """They start from the pilot facts, are kept by content, and read back to the same bits."""
    model = known("llama")
    method = choose(name, {"micro": 30})
    view = model.view
    shape = Shape(4, 48, 96, view.fingerprint)
    (item,) = method.preparations(shape)
    item.path.unlink(missing_ok=True)
    made = method.prepare(view)
    assert item.path.is_file()
    assert cache_folder() in item.path.parents
    same(method.prepare(view), made, rtol=0)
    counted = sum(len(a.target) for a in method.answers(view, pilots()))
    assert all(seen.inputs.count == counted for seen in made.values())
    item.path.write_bytes(b"damaged")
    same(method.prepare(view), made, rtol=1e-6)
    assert choose(name, {"warmup": "none"}).preparations(shape) == []
    assert choose(name, {"warmup": "none"}).prepare(view) == {}


def test_a_file_of_facts_warms_up_and_whitens(known, tmp_path):
    """With enough facts of one's own the gradients are whitened from the first edit."""
    model = known("llama")
    lines = [
        {"prompt": f"{prompt} {number}", "target": target}
        for prompt in tiny.FACTS
        for number, target in enumerate(
            ["Lyon Berlin five", "Spanish green Sudan", "London Lyon", "Madrid four five"]
        )
    ]
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    method = choose("stableedit", {"warmup": str(path), "out": [2]})
    (seen,) = method.prepare(model.view).values()
    scale = method.scale(seen.gradients)
    assert (scale.by.ndim == 2) == (seen.gradients.count >= 96)
    assert seen.gradients.count >= 96
    before = model.view.score([(a.prompt, a.target) for a in method.answers(model.view, FACTS[:1])])
    with model.applied(edit(model, FACTS[:1], method=method)):
        after = model.view.score(
            [(a.prompt, a.target) for a in method.answers(model.view, FACTS[:1])]
        )
    assert after[0].probability > before[0].probability


# -- what is edited, and what is refused -----------------------------------------------------------


def test_maps_by_depth_and_by_name(known):
    """Late blocks of a deep model; where there is no gate, up does its work; a fused map once."""
    assert choose("ultraedit").places(30) == (
        *(("mlp.gate", b) for b in blocks(20, 28)),
        *(("mlp.out", b) for b in blocks(20, 28)),
    )
    assert choose("stableedit").places(30) == tuple(("mlp.out", b) for b in blocks(20, 28))
    assert {name.rpartition(".")[0] for name in choose("ultraedit").maps(known("gpt2").view)} == {
        "mlp.up",
        "mlp.out",
    }
    fused = choose("ultraedit", {"gate": 1, "up": "1-2"}).maps(known("phi3").view)
    assert list(fused) == ["mlp.gate.1", "mlp.up.1", "mlp.up.2"]
    assert fused["mlp.gate.1"].module == fused["mlp.up.1"].module


def test_presets_are_the_published_settings():
    """eta and alpha themselves, one round, maps of that model; the relative option overrules."""
    config = choose("ultraedit", {"preset": "llama-3-8b"}).config
    assert (config.eta, config.alpha, config.rounds, config.warmup) == (1e-6, 1.0, 1, "none")
    assert (config.gate, config.up) == (blocks(11, 15), blocks(18, 24))
    assert choose("stableedit", {"preset": "gpt-j-6b"}).config.eta == 2e-6
    assert choose("stableedit", {"preset": "gpt-j-6b", "gain": 2}).config.eta is None


def test_faults_are_one_line(known, tmp_path):
    """Blocks in the wrong order, a map or block that is not there, no file to warm up on."""
    for given in ("8-4", [3, 1], [-1], True):
        with pytest.raises(OptionError, match="option up of ultraedit cannot be"):
            choose("ultraedit", {"up": given})
    with pytest.raises(ModelError, match="ultraedit cannot edit GPT2"):
        edit(known("gpt2"), FACTS[0], method="ultraedit", options={"gate": [1]})
    with pytest.raises(ModelError, match="layer 9 does not exist"):
        edit(known("llama"), FACTS[0], method="ultraedit", options={"up": [9]})
    missing = str(tmp_path / "none.jsonl")
    with pytest.raises(RequestError, match=r"none\.jsonl"):
        edit(known("llama"), FACTS[0], method="stableedit", options={"warmup": missing})


def test_one_token_alone_cannot_be_normalised(known):
    """Without anything to start from, a single token has no deviation: said in one line."""
    with pytest.raises(EditError, match="warmup=pilots"):
        edit(known("llama"), FACTS[0], method="ultraedit", options={"warmup": "none"})
