"""Values of several modules at once, and of whole blocks; and when an optimisation is done."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from knowpatch.models.passes import Row, Shift
from knowpatch.models.replay import Replay, Whole, passes
from knowpatch.parts.spans import continuation, subject_position
from knowpatch.parts.tasks import ValueTask
from knowpatch.parts.values import EASY_KL, ValueSettings, optimise

SETTINGS = ValueSettings(
    steps=8, learning_rate=0.2, clamp=4.0, weight_decay=0.5, kl_factor=0.0625, enough=0.0
)
# Steps so small that every prompt is answered as before.
STILL = replace(SETTINGS, steps=6, learning_rate=1e-6)
FRANCE, EGYPT = "The capital of France is", "The capital of Egypt is"


def _task(view, prompt, subject, target, prefixes=("", "You know. ")):
    rows = []
    for prefix in prefixes:
        encoded = view.encode(prompt, before=prefix)
        ids = continuation(view.tokenizer, encoded, target)
        position = subject_position(encoded, subject)
        rows.append(Row((*encoded.ids, *ids[:-1]), position, len(encoded.ids)))
    kl = view.encode(f"{subject} is a")
    return ValueTask(ids, tuple(rows), Row(kl.ids, subject_position(kl, subject)))


def _modules(view, what="both"):
    if what == "block":
        return [view.roles.blocks[1].module]
    return [view.roles.linear(role, 1).module for role in ("mlp.out", "attn.out")]


@pytest.fixture
def case(known):
    view = known("llama").view
    tasks = [_task(view, FRANCE, "France", "Lyon"), _task(view, EGYPT, "Egypt", "New London")]
    return view, _modules(view), tasks


def _nll_and_leads(view, modules, task, delta_SD):
    """The mean NLL of the target with the deltas injected, and whether it leads everywhere."""
    nlls, leads = [], True
    for row in task.contexts:
        place, count = [(0, row.position)], len(task.target)
        shifts = [Shift(m, place, d_D[None]) for m, d_D in zip(modules, delta_SD, strict=True)]
        places = [(0, i) for i in range(len(row.ids) - count, len(row.ids))]
        logits = view.run([row.ids], logits_at=places, shifts=shifts, prompts=[row.end]).logits_MV
        nlls.append(-float(logits.log_softmax(-1)[range(count), task.target].mean()))
        leads = leads and tuple(logits.argmax(-1).tolist()) == task.target
    return sum(nlls) / len(nlls), leads


def test_nothing_added_is_the_clean_pass(case):
    """Zero deltas change no bit of the logits; the first step's KL is 0, its NLL the clean one."""
    view, modules, tasks = case
    row, zero = tasks[0].contexts[0], torch.zeros(1, view.roles.hidden_size)
    shifts, last = [Shift(m, [(0, row.position)], zero) for m in modules], (0, len(row.ids) - 1)
    clean, moved = (view.run([row.ids], logits_at=[last], shifts=s) for s in ((), shifts))
    assert torch.equal(clean.logits_MV, moved.logits_MV)
    values = optimise(view, modules, tasks, replace(SETTINGS, steps=1))
    for task, value in zip(tasks, values, strict=True):
        assert (value.kl, value.steps, float(value.delta_SD.abs().max())) == (0, 0, 0)
        plain = _nll_and_leads(view, modules, task, value.delta_SD)[0]
        assert value.nll == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("clamp", [4.0, 0.1])
def test_each_module_has_a_ball_of_its_own(case, clamp):
    """|delta| <= clamp |v0| for each module, by its own v0; a tight ball is filled by both."""
    view, modules, tasks = case
    for value in optimise(view, modules, tasks, replace(SETTINGS, clamp=clamp)):
        assert value.delta_SD.shape == value.clean_SD.shape == (2, view.roles.hidden_size)
        for share in value.delta_SD.norm(dim=1) / value.clean_SD.norm(dim=1):
            assert (0.99 * clamp if clamp < 1 else 0) < share <= clamp * (1 + 1e-6)


@pytest.mark.parametrize("what", ["both", "block"])
def test_injecting_the_values_gives_the_reported_loss(case, what):
    """Full passes with all deltas added have the NLL that was reported, to 1e-4."""
    view, _, tasks = case
    modules = _modules(view, what)
    for task, value in zip(tasks, optimise(view, modules, tasks, SETTINGS), strict=True):
        found = _nll_and_leads(view, modules, task, value.delta_SD)
        assert value.nll == pytest.approx(found[0], abs=1e-4)


def test_together_equals_alone(case):
    """Two tasks in one batch get, for both modules, the values they get alone, to 1e-4."""
    view, modules, tasks = case
    for task, value in zip(tasks, optimise(view, modules, tasks, SETTINGS), strict=True):
        (alone,) = optimise(view, modules, [task], SETTINGS)
        for mine_D, alone_D in zip(value.delta_SD, alone.delta_SD, strict=True):
            assert (mine_D - alone_D).norm() < 1e-4 * alone_D.norm()


@pytest.mark.parametrize("what", ["both", "block"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_replay_equals_the_whole_pass(known, architecture, what):
    """Logits at each place, and the gradient of each row and module, to 1e-4; after `keep` too."""
    view = known(architecture).view
    modules, made = _modules(view, what), torch.Generator().manual_seed(0)
    one, two, three = torch.randint(view.vocabulary, (3, 10), generator=made).tolist()
    rows = [Row(tuple(one), 4), Row((*one[:3], *two[:5]), 5), Row(tuple(three), 0)]
    places = [(0, 4), (0, 9), (1, 5), (1, 7), (2, 3), (2, 8)]
    shift_BSD = torch.randn(3, len(modules), view.roles.hidden_size, generator=made)
    way, whole = passes(view, modules, rows, places), Whole(view, modules, rows, places)
    assert isinstance(way, Replay)
    for kept in (None, [0, 2]):
        if kept is not None:
            way.keep(kept)
            whole.keep(kept)
            shift_BSD = shift_BSD[kept]
        found = []
        for each in (whole, way):
            leaf = shift_BSD.clone().requires_grad_()
            logits = each.run(leaf).logits_MV
            (grad,) = torch.autograd.grad(logits.log_softmax(-1)[:, :7].sum(), leaf)
            found.append((logits.detach(), grad))
        for plain, fast in zip(*found, strict=True):
            assert ((plain - fast).norm(dim=-1) <= 1e-4 * plain.norm(dim=-1)).all()


def test_easing_is_done_once_the_target_leads_and_little_drifts(case):
    """At once where the model says it already; else never before it leads with a KL <= 0.01."""
    view, modules, tasks = case
    cairo = _task(view, EGYPT, "Egypt", "Cairo")
    for easing in (True, False):
        (value,) = optimise(view, modules, [cairo], replace(STILL, easing=easing))
        assert value.steps == (0 if easing else STILL.steps - 1)
    values = optimise(view, modules, tasks, replace(SETTINGS, steps=30, kl_factor=1.0, easing=True))
    for task, value in zip(tasks, values, strict=True):
        leads = _nll_and_leads(view, modules, task, value.delta_SD)[1]
        assert value.steps == 29 or (leads and value.kl <= EASY_KL)


def test_hits_are_steps_in_which_every_context_leads(case):
    """Three of three where all contexts say it; none where one of them, or all, say otherwise."""
    view, modules, tasks = case
    cairo = _task(view, EGYPT, "Egypt", "Cairo")
    france = _task(view, FRANCE, "France", "Cairo", prefixes=("",))
    mixed = replace(cairo, contexts=(*cairo.contexts, *france.contexts))
    values = optimise(view, modules, [cairo, mixed, tasks[0]], replace(STILL, hits=3))
    assert [value.steps for value in values] == [2, 5, 5]
