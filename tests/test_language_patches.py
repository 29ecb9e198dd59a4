"""Language patches: the card's numbers, two readings against plain passes, the planner's parts."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from knowpatch.ask import Ask
from knowpatch.editing import edit
from knowpatch.errors import OptionError, PatchError
from knowpatch.models.mixing import mixed
from knowpatch.models.passes import Distributions, Second
from knowpatch.models.sampling import Mixed, processors
from knowpatch.models.sites import listening
from knowpatch.parts.prompting.mixture import HIGH, LOW, gate
from knowpatch.parts.spans import continuation
from knowpatch.patch import Patch, PromptRule
from knowpatch.request import EditRequest

FRANCE, JAPAN = (
    EditRequest(prompt=prompt, subject=subject, target=tiny.EDITS[prompt])
    for prompt, subject in list(zip(tiny.EDITS, ("France", "Japan", "Nile"), strict=True))[:2]
)
SOFT = {"named": 0.99, "unnamed": 0.99, "slope": 5.0}
"""With these a prompt's own gate is about one half: both readings count."""


def _edit(model, request, **options):
    return edit(model, request, method="language_patches", options=options)


def _logprobs(model, ids, answer):
    """Log-probabilities of the vocabulary where each token of the answer is predicted: a plain
    forward pass of the model."""
    with torch.no_grad():
        logits = model.model(torch.tensor([[*ids, *answer[:-1]]])).logits[0]
    return logits[len(ids) - 1 :].log_softmax(-1)


def test_the_cards_numbers():
    """(.7, .3) and (.1, .9) with a gate of .75 give (.25, .75), in scores and in generation."""
    base, context = torch.tensor([[0.7, 0.3]]).log(), torch.tensor([[0.1, 0.9]]).log()
    assert mixed(base, context, 0.75).exp()[0].tolist() == pytest.approx([0.25, 0.75])
    choose = processors(Mixed((0.75,)))
    both = choose(torch.zeros(2, 1).long(), torch.cat([base, context])).exp()
    assert both.flatten().tolist() == pytest.approx([0.25, 0.75, 0.25, 0.75])


def test_the_gate_is_a_sigmoid_about_its_threshold():
    assert gate(0.6, 0.6, 25.0) == pytest.approx(0.5)
    assert gate(0.7, 0.6, 25.0) == pytest.approx(1 / (1 + math.exp(-2.5)))
    assert gate(-1.0, 1.0, 1e6) == 0.0
    assert gate(0.6 - math.log(19) / 25, 0.6, 25.0) == pytest.approx(LOW)
    assert gate(0.6 + math.log(19) / 25, 0.6, 25.0) == pytest.approx(HIGH)


def test_scores_are_those_of_two_plain_passes(known):
    """Of a mixed question, alone and among others, plain and with all that can be wanted of it."""
    model = known("llama")
    patch = _edit(model, FRANCE, **SOFT)
    with model.session([patch]):
        first, second = model.readings(FRANCE.prompt)
    assert first.ids == model.view.encode(FRANCE.prompt).ids
    told = f"New Fact: {FRANCE.prompt} {FRANCE.target}\nPrompt: "
    assert second.prompt == model.view.encode(FRANCE.prompt, before=told).ids
    assert LOW < second.share < HIGH
    answer = continuation(model.tokenizer, first, "Rome. The")
    parts = [_logprobs(model, ids, answer).exp() for ids in (first.ids, second.prompt)]
    wanted = ((1 - second.share) * parts[0] + second.share * parts[1]).log()
    ask = Ask(model)
    whole = ask.forced(FRANCE.prompt, "Rome. The", Distributions, patches=[patch])
    plain = ask.score(FRANCE.prompt, "Rome. The", patches=[patch])
    others = [ask.score(prompt, "Paris", patches=[]) for prompt in tiny.FACTS]
    assert torch.allclose(whole.result().logprobs_NV, wanted, atol=1e-4)
    forced = wanted.gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()
    assert plain.result().logprobs == pytest.approx(forced, abs=1e-4)
    for prompt, other in zip(tiny.FACTS, others, strict=True):
        ids = model.view.encode(prompt).ids
        paris = continuation(model.tokenizer, model.view.encode(prompt), "Paris")
        alone = _logprobs(model, ids, paris).gather(1, torch.tensor(paris)[:, None])[:, 0]
        assert other.result().logprobs == pytest.approx(alone.tolist(), abs=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_texts_go_on_from_both_readings(known, architecture):
    """Each token is the likeliest of the mixture of two whole passes over what was said so far."""
    model = known(architecture)
    patches = [_edit(model, fact, **SOFT) for fact in (FRANCE, JAPAN)]
    asked = [
        Ask(model).generate(fact.prompt, max_new_tokens=5, patches=[patch], whole=True)
        for fact, patch in zip((FRANCE, JAPAN), patches, strict=True)
    ]
    ask = Ask(model)
    together = [
        ask.generate(fact.prompt, max_new_tokens=5, patches=[patch], whole=True)
        for fact, patch in zip((FRANCE, JAPAN), patches, strict=True)
    ]
    stops = list(model.view.stop_ids)
    for fact, patch, alone, one in zip((FRANCE, JAPAN), patches, asked, together, strict=True):
        first, second = model.readings(fact.prompt, patches=[patch])
        said = []
        for _ in range(5):
            now = [_logprobs(model, (*ids, *said), (0,))[0] for ids in (first.ids, second.prompt)]
            now = [part.index_fill(0, torch.tensor(stops), -1e9).log_softmax(0) for part in now]
            said.append(int(mixed(now[0], now[1], second.share).argmax()))
        assert list(alone.result().ids) == said
        assert list(one.result().ids) == said


def test_samples_of_both_readings_are_one(known):
    """With randomness too, both go on with the same token: a draw is the same again."""
    model = known("llama")
    patch = _edit(model, FRANCE, **SOFT)
    said = [
        Ask(model).generate(FRANCE.prompt, max_new_tokens=6, patches=[patch], top_k=20, draw=3)
        for _ in range(2)
    ]
    assert said[0].result() == said[1].result()


def test_a_shut_gate_is_the_base_and_an_open_one_the_fact(known):
    """Ends of the gate are switches: bit for bit what the model says without, and with the text."""
    model = known("llama")
    base = Ask(model).score(FRANCE.prompt, "Rome").result()
    shut = _edit(model, FRANCE, named=3.0, unnamed=3.0)
    assert Ask(model).score(FRANCE.prompt, "Rome", patches=[shut]).result() == base
    opened = _edit(model, FRANCE, named=-3.0, unnamed=-3.0)
    ice = edit(model, FRANCE, method="ice")
    told = [Ask(model).score(FRANCE.prompt, "Rome", patches=[p]).result() for p in (opened, ice)]
    assert told[0].logprobs == pytest.approx(told[1].logprobs, abs=1e-5)
    assert model.readings(FRANCE.prompt, patches=[shut])[1] is None


def test_of_several_patches_the_nearest_counts(known):
    """Two live patches: each prompt is mixed with its own fact; dropping one leaves the other."""
    model = known("llama")
    patches = [_edit(model, fact, **SOFT) for fact in (FRANCE, JAPAN)]
    model.apply(patches[0])
    alone = Ask(model).score(FRANCE.prompt, "Rome").result()
    model.apply(patches[1])
    assert Ask(model).score(FRANCE.prompt, "Rome").result() == alone
    for fact, patch in zip((FRANCE, JAPAN), patches, strict=True):
        with listening() as heard:
            second = model.readings(fact.prompt)[1]
        assert fact.target in model.view.decode(second.prompt)
        assert [(firing.patch, firing.fired) for firing in heard] == [(patch, True)]
    model.drop(patches[0].id)
    model.drop(patches[1].id)
    assert model.readings(FRANCE.prompt)[1] is None


def test_ids_alone_cannot_be_mixed(known):
    """`generate` on ids and `encode` say so in one line; `ask` mixes."""
    model = known("llama")
    patch = _edit(model, FRANCE, **SOFT)
    ids = torch.tensor([model.view.encode(FRANCE.prompt).ids])
    with model.applied(patch):
        with pytest.raises(OptionError, match="mixes two readings"):
            model.generate(ids, max_new_tokens=2)
        with pytest.raises(OptionError, match="mixes two readings"):
            model.encode(FRANCE.prompt)
        assert model.ask(FRANCE.prompt, max_new_tokens=3)


def test_equal_questions_are_asked_once():
    """A second reading is part of what a question is."""
    assert Second((1, 2), 0.5) == Second((1, 2), 0.5)
    assert len({Second((1, 2), 0.5), Second((1, 2), 0.6)}) == 2


@pytest.mark.parametrize("fault", ["slope", "template", "more"])
def test_a_damaged_rule_is_refused(known, fault):
    model = known("llama")
    good = _edit(model, FRANCE, **SOFT)
    data = dict(good.rule.data)
    data[fault] = "steep"
    broken = Patch(good.provenance, rule=PromptRule(good.rule.kind, data, good.rule.tensors))
    with pytest.raises(PatchError, match="damaged prompt rule of kind mixture@1"):
        model.apply(broken)
