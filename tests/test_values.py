"""Optimising a value, against a plain loop that injects by a hand-made hook."""

from __future__ import annotations

import pytest
import tiny
import torch
from plain import rome as plain

from knowpatch.edited import EditedModel
from knowpatch.errors import EditError
from knowpatch.models.passes import Row, Shift, Tap
from knowpatch.parts.spans import continuation, subject_position
from knowpatch.parts.tasks import ValueTask
from knowpatch.parts.values import ValueSettings, optimise

SETTINGS = ValueSettings(
    steps=8, learning_rate=0.2, clamp=4.0, weight_decay=0.5, kl_factor=0.0625, enough=0.0
)


def _task(view, prompt, subject, target, prefixes=("", "You know. ")):
    rows = []
    for prefix in prefixes:
        encoded = view.encode(prompt, before=prefix)
        ids = continuation(view.tokenizer, encoded, target)
        rows.append(Row((*encoded.ids, *ids[:-1]), subject_position(encoded, subject)))
    kl = view.encode(f"{subject} is a")
    return ValueTask(ids, tuple(rows), Row(kl.ids, subject_position(kl, subject)))


@pytest.fixture
def case(known):
    model = known("llama")
    view = model.view
    france = _task(view, "The capital of France is", "France", "Lyon")
    egypt = _task(view, "The capital of Egypt is", "Egypt", "New London")
    return view, view.roles.linear("mlp.out", 1).module, [france, egypt]


def _plain(view, module, task, settings):
    """The card's loop, row by row, with torch's own Adam and a hook written here."""
    model = view.model
    delta = torch.zeros(view.roles.hidden_size, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=settings.learning_rate)

    def logits(row, *, inject):
        def hook(mod, args, out):
            out = out.clone()
            out[0, row.position] = out[0, row.position] + delta
            return out

        handle = model.get_submodule(module).register_forward_hook(hook) if inject else None
        found = model(torch.tensor([row.ids])).logits[0].float()
        if handle:
            handle.remove()
        return found

    seen = []
    handle = model.get_submodule(module).register_forward_hook(lambda m, a, o: seen.append(o))
    with torch.no_grad():
        old = logits(task.kl, inject=False)[task.kl.position].log_softmax(-1)
        model(torch.tensor([task.contexts[0].ids]))
    handle.remove()
    clean = seen[-1][0, task.contexts[0].position]
    for step in range(settings.steps):
        losses = []
        for row in task.contexts:
            logprobs = logits(row, inject=True).log_softmax(-1)[-len(task.target) :]
            losses.append(-logprobs[range(len(task.target)), task.target].mean())
        new = logits(task.kl, inject=True)[task.kl.position].log_softmax(-1)
        kl = (new.exp() * (new - old)).sum()
        nll = torch.stack(losses).mean()
        loss = nll + settings.kl_factor * kl
        loss = loss + settings.weight_decay * delta.norm() / clean.norm() ** 2
        if step == settings.steps - 1:
            break
        adam.zero_grad()
        (delta.grad,) = torch.autograd.grad(loss, delta)
        adam.step()
        with torch.no_grad():
            radius = settings.clamp * clean.norm()
            if delta.norm() > radius:
                delta.mul_(radius / delta.norm())
    return delta.detach(), float(nll.detach()), float(kl.detach())


def test_equals_the_plain_loop(case):
    """Delta, NLL and KL are those of the plain loop, to 1e-3 of delta's length."""
    view, module, tasks = case
    value = optimise(view, [module], tasks[:1], SETTINGS)[0]
    delta, nll, kl = _plain(view, module, tasks[0], SETTINGS)
    assert (value.delta_D - delta).norm() < 1e-3 * delta.norm()
    assert value.nll == pytest.approx(nll, abs=1e-3)
    assert value.kl == pytest.approx(kl, abs=1e-3)


def test_the_ball_holds_with_and_without_it_biting(case):
    """|delta| <= clamp |v0| (1 + 1e-6); and equal to the plain loop where the clamp bites."""
    view, module, tasks = case
    tight = ValueSettings(8, 0.2, 0.3, 0.5, 0.0625, 0.0)
    value = optimise(view, [module], tasks[:1], tight)[0]
    assert value.delta_D.norm() <= 0.3 * value.clean_D.norm() * (1 + 1e-6)
    delta, _, _ = _plain(view, module, tasks[0], tight)
    assert (value.delta_D - delta).norm() < 1e-3 * delta.norm()


def test_together_equals_alone(case):
    """Two tasks in one batch get the values they get alone, to 1e-4."""
    view, module, tasks = case
    together = optimise(view, [module], tasks, SETTINGS)
    for task, value in zip(tasks, together, strict=True):
        alone = optimise(view, [module], [task], SETTINGS)[0]
        assert (alone.delta_D - value.delta_D).norm() < 1e-4 * alone.delta_D.norm()


def test_a_task_that_is_done_stops_alone(case):
    """One task stops early while the other goes on as if it were alone."""
    view, module, tasks = case
    tasks = [tasks[0], _task(view, "The capital of Egypt is", "Egypt", "Cairo")]
    settings = ValueSettings(12, None, 8.0, 0.0, 0.0, 0.5)
    together = optimise(view, [module], tasks, settings)
    assert [value.steps for value in together] == [11, 0]
    assert float(together[1].delta_D.abs().max()) == 0
    alone = optimise(view, [module], tasks[:1], settings)[0]
    assert (together[0].delta_D - alone.delta_D).norm() < 1e-3 * alone.delta_D.norm()


def test_injecting_the_value_gives_the_reported_loss(case):
    """Forward with the final delta injected has the reported NLL on the contexts."""
    view, module, tasks = case
    task = tasks[0]
    value = optimise(view, [module], [task], SETTINGS)[0]
    nlls = []
    for row in task.contexts:
        shift = Shift(module, [(0, row.position)], value.delta_D[None])
        count = len(task.target)
        places = [(0, len(row.ids) - count + i) for i in range(count)]
        logprobs = view.run([row.ids], logits_at=places, shifts=[shift]).logits_MV.log_softmax(-1)
        nlls.append(-float(logprobs[range(count), task.target].mean()))
    assert sum(nlls) / len(nlls) == pytest.approx(value.nll, abs=1e-4)


def test_no_shift_reproduces_clean_logits_exactly(case):
    """A zero delta changes no bit of the logits."""
    view, module, tasks = case
    row = tasks[0].contexts[0]
    place = [(0, len(row.ids) - 1)]
    clean = view.run([row.ids], logits_at=place).logits_MV
    zero = Shift(module, [(0, row.position)], torch.zeros(1, view.roles.hidden_size))
    assert torch.equal(clean, view.run([row.ids], logits_at=place, shifts=[zero]).logits_MV)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_either_padding_gives_the_same_value(architecture):
    """Left and right padding agree to 1e-4."""
    deltas = []
    for side in ("left", "right"):
        model = EditedModel.of(*tiny.trained(architecture))
        model.view.padding = side
        task = _task(model.view, "The capital of France is", "France", "Lyon")
        module = model.view.roles.linear("mlp.out", 1).module
        deltas.append(optimise(model.view, [module], [task], SETTINGS)[0].delta_D)
    assert (deltas[0] - deltas[1]).norm() < 1e-4 * deltas[0].norm()


def test_a_loss_that_is_not_finite_is_one_line(case):
    """A broken weight ends the optimisation with what to do, not with a NaN value."""
    view, module, tasks = case
    weight = view.parameter(view.roles.linear("mlp.out", 2).address.parameter)
    with torch.no_grad():
        weight[0, 0] = float("nan")
    with pytest.raises(EditError, match="not finite at step 0"):
        optimise(view, [module], tasks, SETTINGS)


def test_tap_sees_what_the_module_sees(case):
    """A tap on input and output of a linear map satisfies output = W input."""
    view, module, tasks = case
    role = view.roles.linear("mlp.out", 1)
    taps = [Tap(module, "input"), Tap(module, "output")]
    run = view.run([tasks[0].contexts[0].ids], taps=taps)
    expected = run.tapped[taps[0]] @ view.weight(role).T
    assert torch.allclose(run.tapped[taps[1]], expected, atol=1e-5)


def test_the_benchmarks_plain_side_is_right(case):
    """The plain value of the benchmarks is the card's: delta and v0 as optimised, to 1e-3."""
    view, module, tasks = case
    task = tasks[0]
    fact = plain.Fact(
        task.target,
        tuple((row.ids, row.position) for row in task.contexts),
        (task.kl.ids, task.kl.position),
    )
    settings = plain.Settings(8, 0.2, 4.0, 0.5, 0.0625, 0.0)
    clean, delta = plain.value(view.model, module, fact, settings)
    value = optimise(view, [module], [task], SETTINGS)[0]
    assert torch.allclose(clean, value.clean_D, atol=1e-5)
    assert (delta - value.delta_D).norm() < 1e-3 * delta.norm()
