"""Fine-tuning editors against a plain training loop, and the self-checks of their cards."""

from __future__ import annotations

import random

import pytest
import tiny
import torch
from made import tuned_loss

from knowpatch.edited import EditedModel
from knowpatch.editing import choose, edit
from knowpatch.request import EditRequest

FACTS = [EditRequest(prompt=prompt, target=target) for prompt, target in tiny.EDITS.items()]
LONG = EditRequest(prompt="Two plus two equals", target="five Sudan Lyon")


def _trained_plainly(model, examples, name, steps, rate, size, *, order):
    """AdamW on one parameter of the model itself: full forwards, one batch after another."""
    stored = model.model.get_parameter(name)
    weight = stored.detach().clone()
    weight.requires_grad_()
    adam = torch.optim.AdamW([weight], lr=rate, weight_decay=0.0)
    for numbers in order(steps):
        for start in range(0, len(numbers), size):
            losses = []
            for number in numbers[start : start + size]:
                e = examples[number]
                ids = torch.tensor([e.row])
                out = torch.func.functional_call(
                    model.model, {name: weight}, (ids,), {"use_cache": False}
                ).logits[0, len(e.prompt) - 1 :]
                losses.append(torch.nn.functional.cross_entropy(out, torch.tensor(e.answer)))
            adam.zero_grad()
            (sum(losses) / len(losses)).backward()
            adam.step()
    return (weight - stored).detach()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize(("name", "layer"), [("ft", 2), ("locft_bf", 1)])
def test_training_is_the_plain_loop(known, architecture, name, layer):
    """The change equals that of full forwards with the same Adam and the same order, to 1e-3."""
    model = known(architecture)
    options = {"steps": 3, "learning_rate": 1e-3, "layer": layer, "batch_size": 2, "enough": 1e-9}
    method = choose(name, {**options, "precision": "model", "others": 0})
    requests = [*FACTS, LONG]
    (delta,) = edit(model, requests, method=method).deltas
    examples = tuned_loss(model, method, requests)[1]

    def order(steps):
        drawn = random.Random(0)
        return [drawn.sample(range(len(examples)), len(examples)) for _ in range(steps)]

    plain = _trained_plainly(model, examples, delta.address.parameter, 3, 1e-3, 2, order=order)
    assert (delta.change.delta - plain).norm() <= 1e-3 * plain.norm()


def test_weight_decay_pulls_the_change_back(known):
    """Decoupled decay on the change makes it smaller, and the facts are still learned."""
    model = known("llama")
    options = {"steps": 30, "learning_rate": 1e-2}
    free = edit(model, FACTS, method="ft", options=options).deltas[0].change.delta
    held = edit(model, FACTS, method="ft", options={**options, "weight_decay": 5.0})
    assert held.deltas[0].change.delta.norm() < 0.9 * free.norm()
    with model.applied(held):
        assert model.ask(FACTS[0].prompt, max_new_tokens=4).startswith(FACTS[0].target)


def test_a_box_around_the_base_holds_over_a_sequence():
    """around=base: two edits together stay in one box; around=now: each has a box of its own."""
    bound, options = 2e-3, {"bound": 2e-3, "learning_rate": 1e-2, "steps": 20}
    for around, most in (("base", bound), ("now", 2 * bound)):
        model = EditedModel.of(*tiny.trained("llama"))
        total = 0.0
        for fact in FACTS[:2]:
            patch = edit(model, fact, method="ft", options={**options, "around": around})
            total = total + patch.deltas[0].change.delta
            model.apply(patch)
        largest = float(total.abs().max())
        assert largest <= most + 1e-6
        assert around == "base" or largest > bound * 1.01


def test_one_matrix_changes_and_the_others_keep_their_bits(known):
    """Breadth-first training of many facts touches one tensor."""
    model = known("llama")
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    patch = edit(model, FACTS, method="locft_bf", options={"learning_rate": 1e-2})
    with model.applied(patch):
        changed = [
            name for name, p in model.model.named_parameters() if not torch.equal(p, before[name])
        ]
    assert changed == [patch.deltas[0].address.parameter]


def test_answers_stop_where_they_should():
    """After breadth-first training with ends, what is generated is the answer and nothing more."""
    model = EditedModel.of(*tiny.trained("llama"))
    # The end's row in these models' head is zero: others have to go down, which takes a low block.
    # And these maps are so narrow that ends are not learned beside what others bring in.
    options = {"learning_rate": 1e-2, "steps": 60, "layer": 1, "enough": 0.05, "others": 0}
    with model.applied(edit(model, FACTS, method="locft_bf", options=options)):
        said = [model.ask(fact.prompt, max_new_tokens=12) for fact in FACTS]
    assert [text.strip() for text in said] == [fact.target for fact in FACTS]
    options["eos"] = False
    with model.applied(edit(model, FACTS, method="locft_bf", options=options)):
        assert model.ask(FACTS[0].prompt, max_new_tokens=12).strip() != FACTS[0].target


def test_the_loss_falls(known):
    """Each pass over the facts leaves a smaller loss than the one before it, to a little noise."""
    model, found = known("llama"), []
    for steps in (1, 5, 15, 40):
        method = choose("locft_bf", {"learning_rate": 3e-3, "steps": steps, "eos": False})
        with model.applied(edit(model, FACTS, method=method)):
            found.append(tuned_loss(model, method, FACTS)[0])
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.1 * found[0]
