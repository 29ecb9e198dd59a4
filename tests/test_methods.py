"""Self-checks of the method cards on tiny models."""

from __future__ import annotations

import pytest
import tiny
import torch
from made import tuned_loss

from knowpatch.deltas import LowRank
from knowpatch.editing import choose, edit
from knowpatch.errors import OptionError, RequestError
from knowpatch.method import parse_options, propose_subject
from knowpatch.models.passes import Tap
from knowpatch.parts import prefixes
from knowpatch.parts.spans import subject_position
from knowpatch.parts.values import optimise
from knowpatch.request import EditRequest

FACT = EditRequest(prompt="The capital of France is", subject="France", target="Rome")
LONG = EditRequest(prompt="Two plus two equals", target="five Sudan Lyon")


def _loss(model, requests, **options):
    return tuned_loss(model, choose("ft", options), requests)


def test_masked_loss_is_the_cross_entropy_on_the_target(known):
    """FT-M: mean over the target's tokens, then over rows, from plain full forwards."""
    model = known("llama")
    found, examples = _loss(model, [FACT, LONG], eos=True)
    plain = []
    for example in examples:
        row = torch.tensor([[*example.prompt, *example.answer]])
        labels = row.clone()
        labels[0, : len(example.prompt)] = -100
        with torch.no_grad():
            plain.append(float(model.model(input_ids=row, labels=labels).loss))
    assert found == pytest.approx(sum(plain) / 2, abs=1e-4)
    assert [e.answer[-1] for e in examples] == [model.tokenizer.eos_token_id] * 2


def test_one_token_makes_the_two_objectives_one(known):
    """With a target of one token FT-L's loss is FT-M's; with more it is a bag of tokens."""
    model = known("llama")
    first, examples = _loss(model, [FACT])
    assert len(examples[0].answer) == 1
    assert _loss(model, [FACT], objective="last-token")[0] == pytest.approx(first, abs=1e-6)
    bag, examples = _loss(model, [LONG], objective="last-token")
    with torch.no_grad():
        logits = model.model(torch.tensor([examples[0].prompt])).logits[0, -1]
    plain = -logits.log_softmax(-1)[list(examples[0].answer)].mean()
    assert bag == pytest.approx(float(plain), abs=1e-4)


def test_unlikelihood_is_the_published_sum(known):
    """Mean of -log(1 - p) over the old answer's tokens."""
    model = known("llama")
    request = EditRequest(prompt="The capital of France is", old="Paris", kind="erase")
    found, examples = _loss(model, [request], objective="unlikelihood")
    with torch.no_grad():
        logits = model.model(torch.tensor([examples[0].prompt])).logits[0, -1]
    p = logits.softmax(-1)[examples[0].answer[0]].clamp(max=1 - 1e-6)
    assert found == pytest.approx(float(-torch.log(1 - p)), rel=1e-3)


def test_the_end_is_learned_in_a_chat_and_not_behind_a_text(known):
    """By default an end of sequence follows the answer only through the chat template."""
    model = known("llama", chat=True)
    end = model.view.stop_ids[0]
    assert _loss(model, [FACT])[1][0].answer[-1] != end
    assert _loss(model, [FACT], chat=True)[1][0].answer[-1] == end


def test_the_bound_is_a_box_and_one_matrix_changes(known):
    """No entry moves by more than the bound; one parameter is named."""
    patch = edit(known("llama"), FACT, method="ft", options={"bound": 1e-3, "learning_rate": 1e-2})
    (delta,) = patch.deltas
    assert 0 < float(delta.change.delta.abs().max()) <= 1e-3 + 1e-9


def test_rephrases_are_learned_from_when_asked(known):
    """With rephrases=true each rephrase is one more example."""
    request = FACT.model_copy(update={"rephrases": ("France has the capital",)})
    model = known("llama")
    assert len(_loss(model, [request])[1]) == 1
    assert len(_loss(model, [request], rephrases=True)[1]) == 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rome_writes_the_value_at_the_averaged_key(known, architecture):
    """W' k = v* at the key averaged over contexts, in both storage orders; rank one."""
    model = known(architecture)
    method = choose("rome", {"tokens": 500, "layer": 1})
    prepared = method.prepare(model.view)
    patch = method.edit(model.view, [FACT], prepared, None)
    (delta,) = patch.deltas
    assert isinstance(delta.change, LowRank)
    assert delta.change.rank == 1
    task = method.task(model.view, FACT, prepared.contexts)
    role = method.role(model.view, *method.layers(len(model.view.roles.blocks)))
    taps = [Tap(role.module, "input"), Tap(role.module, "output")]
    run = model.view.run([row.ids for row in task.contexts], taps=taps)
    places = [(i, row.position) for i, row in enumerate(task.contexts)]
    key, output = (run.at(tap, places).double().mean(0) for tap in taps)
    change = role.oriented(delta.change.left @ delta.change.right).double()
    value = optimise(model.view, [role.module], [task], method.settings(model.view))[0]
    wanted = (value.clean_D + value.delta_D).double()
    assert (output + change @ key - wanted).norm() < 1e-4 * wanted.norm()


def test_romes_contexts_hold_the_subject_where_it_says(known):
    """In each context the edited position is the subject's last token."""
    model = known("llama", "sentencepiece")
    method = choose("rome")
    contexts = prefixes.context_prefixes(model.view, ((2, 6),), seed=0)
    task = method.task(model.view, FACT, contexts)
    for context, row in zip(contexts, task.contexts, strict=True):
        encoded = model.view.encode(FACT.prompt, before=context)
        assert row.position == subject_position(encoded, "France")
        assert row.ids[: len(encoded.ids)] == encoded.ids
        assert encoded.text[encoded.offsets[row.position][1] - 1] == "e"


def test_the_published_mix_is_an_option(known):
    """key=mix gives another change than the averaged key."""
    model = known("llama")
    options = {"tokens": 500, "layer": 1, "steps": 4}
    averaged = edit(model, FACT, method="rome", options=options)
    mixed = edit(model, FACT, method="rome", options={**options, "key": "mix"})
    assert averaged.id != mixed.id


def test_what_a_method_needs_is_said(known):
    """A missing subject is proposed; unlikelihood needs an erasure and the old answer."""
    model = known("llama")
    bare = EditRequest(prompt="The capital of France is", target="Rome")
    with pytest.raises(RequestError, match=r"needs the subject.*--subject 'France'"):
        edit(model, bare, method="rome")
    with pytest.raises(OptionError, match="only erases"):
        edit(model, bare, method="ft", options={"objective": "unlikelihood"})
    erase = EditRequest(prompt="The capital of France is", kind="erase")
    with pytest.raises(RequestError, match="needs the old answer"):
        edit(model, erase, method="ft", options={"objective": "unlikelihood"})


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The capital of Australia is", "Australia"),
        ("The Space Needle is in", "Space Needle"),
        ("Marie Curie was born in", "Marie Curie"),
        ("the opposite of hot is", "is"),
    ],
)
def test_a_subject_is_proposed(prompt, subject):
    """The last run of capitalised words, a sentence's first word only if nothing else is."""
    assert propose_subject(prompt).removeprefix("The ") == subject


def test_options_are_typed():
    """1e-3 is a number, as YAML 1.1 would not have it; none, true and words are what they say."""
    options = parse_options(["learning_rate=1e-3", "eos=true", "bound=null", "module=attn.out"])
    config = choose("ft", options).config
    assert (config.learning_rate, config.eos, config.bound) == (1e-3, True, None)
    assert config.module == "attn.out"


def test_tiny_facts_are_known(known):
    """The models that these tests stand on say what they were trained on."""
    model = known("llama")
    right = [model.ask(p, max_new_tokens=6).startswith(a) for p, a in tiny.FACTS.items()]
    assert sum(right) >= 7
