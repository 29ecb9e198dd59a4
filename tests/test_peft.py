"""LoRA and AdaLoRA against PEFT's own, step by step: values, gradients, losses, scores, masks."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch

from knowpatch.editing import choose
from knowpatch.methods.merged.adalora import Adalora, Allocator
from knowpatch.parts.adapters import Adapter
from knowpatch.parts.descent import Passes
from knowpatch.parts.tuned import Trial, passes_over
from knowpatch.request import EditRequest

FACT = EditRequest(prompt="The capital of France is", target="Rome Sudan five Lyon")
RATE, TOLERANCE = 1e-2, 1e-5
STEPS, INITIAL, FINAL, INTERVAL = 12, 2, 3, 2


@pytest.fixture(scope="module")
def peft():
    """Imported here, since it takes ten seconds and warns of what it does not find."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

    return peft


def _started(known, name, architecture, options, seed=0):
    """A method, the maps that it trains with their changes, and its passes over FACT."""
    model = known(architecture)
    method = choose(name, {"learning_rate": RATE, "enough": 1e-9, **options}, seed=seed)
    roles = method.trained(model.view, [FACT])
    maps = [Trial(role, method.change(model.view, role, None, None)) for role in roles]
    examples = method.examples(model.view, FACT)
    return method, maps, passes_over(model.view, maps, examples), examples[0]


def _wrapped(architecture, config, peft, start):
    """PEFT's model on the same weights, with the same first factors."""
    base, _ = tiny.trained(architecture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(start(name).view_as(parameter))
    return model


def _inputs(example):
    ids = [*example.prompt, *example.answer]
    labels = [-100] * len(example.prompt) + list(example.answer)
    return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}


@pytest.mark.parametrize(
    ("architecture", "modules"),
    [("llama", {"attn.v": "v_proj", "mlp.out": "down_proj"}), ("gpt2", {"mlp.out": "c_proj"})],
)
def test_lora_is_pefts(known, peft, architecture, modules):
    """Three steps from the same factors: the same losses and factors, to 1e-5."""
    method, maps, passes, example = _started(
        known,
        "lora",
        architecture,
        {"modules": list(modules), "layers": [1, 2], "rank": 3, "alpha": 6.0, "steps": 3},
    )
    adapters: dict[str, Adapter] = {each.role.module: each.change for each in maps}
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        lora_dropout=0.0,
        target_modules=list(adapters),
        fan_in_fan_out=architecture == "gpt2",
    )

    def of(name):
        adapter = adapters[name.removeprefix("base_model.model.").partition(".lora_")[0]]
        return adapter.down_KI if "lora_A" in name else adapter.up_DK

    model = _wrapped(architecture, config, peft, of)
    adam = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0
    )
    losses = []
    for _ in range(3):
        loss = model(**_inputs(example)).loss
        losses.append(float(loss.detach()))
        adam.zero_grad()
        loss.backward()
        adam.step()
    mine, plain = [], method.loss
    method.loss = lambda *given: mine.append(plain(*given)) or mine[-1]
    method.train([each.change for each in maps], passes)
    assert [float(loss.detach()) for loss in mine] == pytest.approx(losses, abs=TOLERANCE)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert torch.allclose(parameter, of(name), atol=TOLERANCE), name


def _recorded(monkeypatch, method, maps, passes):
    """What our training has after each step: losses, values, gradients, scores, kept triplets."""
    steps, losses = [], []
    allocate, loss_of, beside = Allocator.after, method.loss, method.beside

    def after(self, step):
        grads = [leaf.grad.clone() for each in maps for leaf in each.change.leaves]
        allocate(self, step)
        values = [leaf.detach().clone() for each in maps for leaf in each.change.leaves]
        steps.append((values, grads, self.scores(), self.kept_N.clone()))

    def loss(*given):
        losses.append(loss_of(*given))
        return losses[-1]

    def penalty(*given):
        found = beside(*given)
        losses[-1] = losses[-1].detach() + found.detach()
        return found

    monkeypatch.setattr(Allocator, "after", after)
    monkeypatch.setattr(method, "loss", loss)
    monkeypatch.setattr(method, "beside", penalty)
    method.train([each.change for each in maps], passes)
    return steps, [float(each) for each in losses]


def _pefts(model, example, names):
    """The same of PEFT's model, trained as its documentation says."""
    adam = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0
    )
    parameters = dict(model.named_parameters())
    allocator, steps, losses, kept = model.base_model.rankallocator, [], [], {}
    for step in range(1, STEPS + 1):
        loss = model(**_inputs(example)).loss
        losses.append(float(loss.detach()))
        loss.backward()
        adam.step()
        means, spreads = dict(allocator.exp_avg_ipt), dict(allocator.exp_avg_unc)
        model.base_model.update_and_allocate(step)
        means, spreads = allocator.exp_avg_ipt or means, allocator.exp_avg_unc or spreads
        kept = model.peft_config["default"].rank_pattern or kept
        values = [parameters[name].detach().clone() for group in names for name in group]
        grads = [parameters[name].grad.clone() for group in names for name in group]
        scores = []
        for group in names if means else ():
            down, value, up = (
                means[n.removeprefix("base_model.model.")]
                * spreads[n.removeprefix("base_model.model.")]
                for n in group
            )
            scores.append(value.view(-1) + down.mean(1) + up.mean(0))
        steps.append((values, grads, torch.cat(scores) if scores else None, dict(kept)))
        adam.zero_grad()
    return steps, losses


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_adalora_is_pefts(known, peft, monkeypatch, architecture):
    """Every step: the same loss, factors, gradients and scores to 1e-5, and the same ranks."""
    modules = {"llama": ["attn.v", "mlp.out"], "gpt2": ["attn.out", "mlp.out"]}[architecture]
    method, maps, passes, example = _started(
        known,
        "adalora",
        architecture,
        {
            "modules": modules,
            "layers": [1, 2],
            "initial_rank": 4,
            "target_rank": 2,
            "alpha": 8.0,
            "steps": STEPS,
            "initial": INITIAL,
            "final": FINAL,
            "interval": INTERVAL,
        },
    )
    assert isinstance(method, Adalora)
    assert isinstance(passes, Passes)
    triplets = {each.role.module: each.change for each in maps}
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM",  # without it the penalty is left out
        init_r=4,
        target_r=2,
        lora_alpha=8,
        lora_dropout=0.0,
        tinit=INITIAL,
        tfinal=FINAL,
        deltaT=INTERVAL,
        total_step=STEPS,
        target_modules=list(triplets),
        fan_in_fan_out=architecture == "gpt2",
    )

    def start(name):
        module, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
        down, value, up = triplets[module].leaves
        return {"A": down, "E": value, "B": up}[rest[0]]

    model = _wrapped(architecture, config, peft, start)
    names = [
        [f"base_model.model.{module}.lora_{part}.default" for part in "AEB"] for module in triplets
    ]
    theirs, their_losses = _pefts(model, example, names)
    mine, my_losses = _recorded(monkeypatch, method, maps, passes)
    assert my_losses == pytest.approx(their_losses, abs=TOLERANCE)
    assert len(mine) == len(theirs) == STEPS
    ranks = []
    for step, (ours, other) in enumerate(zip(mine, theirs, strict=True), 1):
        for part in (0, 1):
            for one, two in zip(ours[part], other[part], strict=True):
                assert torch.allclose(one, two.view_as(one), atol=TOLERANCE), (step, part)
        if other[2] is not None:
            assert torch.allclose(ours[2], other[2], rtol=1e-3, atol=1e-12), step
        if other[3]:
            flags = [flag for group in names for flag in other[3][_key(other[3], group[1])]]
            assert ours[3].tolist() == flags, step
        ranks.append(int(ours[3].sum()))
    assert ranks[0] == 16
    assert ranks[-1] == 8
    assert sorted(ranks, reverse=True) == ranks


def _key(pattern, name):
    """PEFT leaves parts of a parameter's name out of its pattern."""
    return next(key for key in pattern if key in name or name in key)
