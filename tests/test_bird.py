"""BIRD: a relation both ways as a term of the value's loss (specification card bird.md)."""

from __future__ import annotations

import pytest
import tiny
import torch

from knowpatch.editing import choose, edit
from knowpatch.errors import OptionError, RequestError
from knowpatch.methods.intrinsic.bird import without_subject
from knowpatch.models.passes import Row
from knowpatch.models.replay import Replay, Whole
from knowpatch.parts.relation import Phrase, Relation, states_of
from knowpatch.parts.spans import subject_position
from knowpatch.request import EditRequest

SMALL = {"clamp": 4.0, "kl_factor": 0.0, "tokens": 1000, "ridge": 0.01, "layer": 0}
SMALL |= {"precision": "model"}
PAIRS = {"pairs": [["Japan", "Tokyo"], ["Italy", "Rome"]]}
PROMPT = "The capital of France is"
FRANCE = EditRequest(prompt=PROMPT, subject="France", target=tiny.EDITS[PROMPT], old="Paris")


def _value(model, requests=(FRANCE,), **options):
    """The relations and the values of the requests."""
    method, view = choose("bird", {**SMALL, **options}), model.view
    prepared = method.prepare(view)
    tasks = [method.task(view, request, prepared.contexts) for request in requests]
    terms = method.terms(view, requests, prepared)
    return terms, method.values(view, tasks, terms)


def _states(model, value):
    """What enters the head at the subject's last token, with the value in force (C, D)."""
    method, view = choose("bird", SMALL), model.view
    task = method.task(view, FRANCE, method.contexts(view))
    way = Whole(view, method.value_modules(view), task.contexts, [(0, task.contexts[0].position)])
    return way.run(value.delta_SD.repeat(len(task.contexts), 1, 1)).states_BD.detach()


def _relation(generator, **more):
    def states():
        return torch.randn(3, 8, generator=generator)

    given = {"inverse_D": torch.randn(8, generator=generator), "old_CD": states(), "beta": 1.0}
    return Relation(
        rest_CD=states(),
        count_C=torch.tensor([1, 2, 3]),
        forward_CD=states(),
        new_CD=states(),
        share=0.2,
        **{**given, **more},
    )


def test_without_weight_it_is_rome_bit_for_bit(known):
    """A factor of 0: the same changes as rome makes, to the last bit."""
    model = known()
    plain = edit(model, FRANCE, method="rome", options=SMALL)
    zero = edit(model, FRANCE, method="bird", options={**SMALL, **PAIRS, "factor": 0})
    assert torch.equal(plain.deltas[0].change.left, zero.deltas[0].change.left)
    assert torch.equal(plain.deltas[0].change.right, zero.deltas[0].change.right)


def test_with_weight_it_is_not_rome(known):
    """And with the default share another value is written."""
    model = known()
    plain = edit(model, FRANCE, method="rome", options=SMALL)
    told = edit(model, FRANCE, method="bird", options={**SMALL, **PAIRS})
    assert not torch.allclose(plain.deltas[0].change.left, told.deltas[0].change.left)


@pytest.mark.parametrize("old", ["Paris", None])
def test_the_relation_is_closer_than_without_it(known, old):
    """What the term measures is smaller where it counts than where it weighs nothing."""
    request = FRANCE.model_copy(update={"old": old})
    model, measured = known(), []
    for factor in (0.0, 1.0):
        _, (value,) = _value(model, [request], **PAIRS, factor=factor)
        (term,), _ = _value(model, [request], **PAIRS, factor=1.0, steps=2)
        measured.append(float(term(torch.tensor(1.0), _states(model, value))))
    assert measured[1] < measured[0]


def test_old_and_new_object_change_places():
    """With beta = 1 the term changes its sign when the two objects are exchanged."""
    one = _relation(torch.Generator().manual_seed(0), factor=1.0)
    other = _relation(torch.Generator().manual_seed(0), factor=1.0)
    other.new_CD, other.old_CD = one.old_CD, one.new_CD
    states_CD = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    nll = torch.tensor(1.0)
    assert float(one(nll, states_CD)) == pytest.approx(-float(other(nll, states_CD)), abs=1e-5)


def test_the_term_is_the_formula_of_its_card():
    """|s + r - o'| + |o' + i - s| - beta (|s + r - o| + |o + i - s|), summed over contexts."""
    term = _relation(torch.Generator().manual_seed(2), factor=0.5, beta=0.3)
    states_CD = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))
    total = 0.0
    for c in range(3):
        s = term.rest_CD[c] + states_CD[c] / term.count_C[c]
        r, i, new, old = term.forward_CD[c], term.inverse_D, term.new_CD[c], term.old_CD[c]
        total += torch.dist(s + r, new) + torch.dist(new + i, s)
        total -= 0.3 * (torch.dist(s + r, old) + torch.dist(old + i, s))
    assert float(term(torch.tensor(1.0), states_CD)) == pytest.approx(0.5 * float(total), rel=1e-5)


def test_the_term_has_its_share_of_the_first_loss():
    """Its first value is the share of the NLL then; its weight stays what it was then."""
    term = _relation(torch.Generator().manual_seed(4), old_CD=None)
    states_CD = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))
    assert float(term(torch.tensor(7.0), states_CD)) == pytest.approx(0.2 * 7.0, rel=1e-5)
    assert float(term(torch.tensor(1.0), states_CD)) == pytest.approx(0.2 * 7.0, rel=1e-5)


def test_without_words_of_the_inverse_there_is_no_way_back(known):
    """Neither pairs nor reverse: the inverse is left out; each of them gives one of its own."""
    model = known()
    found = [_value(model, **more)[0][0] for more in ({}, {"reverse": "is of"}, PAIRS)]
    assert found[0].inverse_D is None
    assert not torch.allclose(found[1].inverse_D, found[2].inverse_D)


def test_only_the_value_is_trained(known):
    """All vectors of the term but the subject's last state are constants."""
    (term,), _ = _value(known(), **PAIRS)
    states_CD = torch.randn(term.rest_CD.shape, requires_grad=True)
    term(torch.tensor(1.0), states_CD).backward()
    assert states_CD.grad.norm() > 0
    constants = (term.rest_CD, term.forward_CD, term.new_CD, term.old_CD, term.inverse_D)
    assert not any(constant.requires_grad for constant in constants)


def test_early_stop_does_not_look_at_the_term(known):
    """A heavy term leaves the target's NLL to say when it is enough."""
    steps = [_value(known(), enough=100.0, factor=f, **PAIRS)[1][0].steps for f in (0.0, 1e3)]
    assert steps == [0, 0]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_states_are_those_of_the_last_layer(known, architecture):
    """The mean over a phrase's tokens of transformers' own last hidden states, to 1e-5."""
    model = known(architecture)
    phrases = [Phrase(PROMPT, part="France"), Phrase("the Nile", before="Well. ")]
    found = states_of(model.view, phrases, chat=False)
    for row, phrase in enumerate(phrases):
        text = model.encode(phrase.before + phrase.words)
        covered = [
            i
            for i, (start, end) in enumerate(text.offsets)
            if (phrase.part or phrase.words).find(text.text[start:end].strip()) >= 0
            and start >= text.text.find(phrase.part or phrase.words) - 1
        ]
        with torch.no_grad():
            states_TD = model.model(
                torch.tensor([text.ids]), output_hidden_states=True
            ).hidden_states[-1][0]
        assert found.count_M[row] == len(covered)
        assert torch.allclose(found.mean_MD[row], states_TD[covered].mean(0), atol=1e-5)
        assert torch.allclose(found.last_MD[row], states_TD[covered[-1]], atol=1e-5)


def test_replay_sees_what_the_whole_pass_sees_before_the_head(known):
    """The states at changed positions, from a replayed and from a whole pass, to 1e-5."""
    model = known()
    view = model.view
    text = model.encode(PROMPT)
    row = Row(text.ids, subject_position(text, "France"))
    module = view.roles.linear("mlp.out", 1).module
    shift = torch.randn(1, 1, view.roles.hidden_size, generator=torch.Generator().manual_seed(0))
    place = [(0, len(text.ids) - 1)]
    attention = view.model.config._attn_implementation
    part = Replay(view, [module], [row], place, dtype=None, attention=attention).run(shift)
    whole = Whole(view, [module], [row], place).run(shift)
    assert torch.allclose(part.states_BD, whole.states_BD, atol=1e-5)


def test_the_relation_is_the_prompt_without_its_subject():
    """Wherever it stands, where no words are given for it."""
    assert without_subject(FRANCE) == "The capital of is"
    twice = EditRequest(prompt="France: France has capital", subject="France", target="Lyon")
    assert without_subject(twice) == ": has capital"


def test_a_prompt_that_is_its_subject_needs_words_for_the_relation(known):
    """Refused in one line, unless forward is given."""
    alone = EditRequest(prompt="France", subject="France", target="Lyon")
    with pytest.raises(RequestError, match="says nothing besides its subject: give the option"):
        edit(known(), alone, method="bird", options=SMALL)
    assert edit(known(), alone, method="bird", options={**SMALL, "forward": "has capital"}).deltas


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({**PAIRS, "reverse": "is of"}, "give one of them"),
        ({"forward": "  "}, "nothing in it to read"),
        ({"pairs": [["Japan", ""]]}, "nothing in it to read"),
        ({"pairs": ["Japan"]}, "pairs"),
    ],
)
def test_options_that_say_nothing_or_two_things_are_refused(options, said):
    """In one line."""
    with pytest.raises(OptionError, match=said) as caught:
        choose("bird", options)
    assert "\n" not in str(caught.value)


def test_facts_with_and_without_an_old_object_in_one_batch(known):
    """Each has the value that it has alone, whenever the others are done."""
    prompts = list(tiny.EDITS)[:3]
    subjects, olds = ("France", "Japan", "Nile"), ("Paris", None, None)
    requests = [
        EditRequest(prompt=prompt, subject=subject, target=tiny.EDITS[prompt], old=old)
        for prompt, subject, old in zip(prompts, subjects, olds, strict=True)
    ]
    model = known()
    _, together = _value(model, requests, **PAIRS)
    alone = [_value(model, [request], **PAIRS)[1][0] for request in requests]
    for one, other in zip(together, alone, strict=True):
        assert (one.delta_D - other.delta_D).norm() <= 1e-3 * other.delta_D.norm()


@pytest.mark.parametrize("options", [{"contexts": 0}, {"contexts": 1}, {"chat": True}])
def test_few_contexts_and_a_chat_template(known, options):
    """The term is there whatever the prompts are read behind."""
    (term,), (value,) = _value(known(chat=True), **PAIRS, **options)
    assert len(term.forward_CD) == 1 + options.get("contexts", 6)
    assert value.delta_D.norm() > 0


def test_an_option_overrules_what_a_preset_says_in_another_way():
    """A share that is given is not silently beaten by a preset's factor."""
    assert choose("bird", {"preset": "llama-2-7b"}).config.factor == 2e-4
    told = choose("bird", {"preset": "llama-2-7b", "share": 0.1}).config
    assert (told.factor, told.share) == (None, 0.1)
    memit = choose("memit", {"preset": "llama-2-7b", "gain": 0.7}).config
    assert (memit.weight, memit.gain) == (None, 0.7)
    null = choose("alphaedit", {"preset": "llama-3-8b", "null_share": 0.1}).config
    assert (null.threshold, null.weight) == (None, 10.0)
