"""KN: attributions against plain integrated gradients, and what becomes of the slots."""

from __future__ import annotations

import pytest
import torch

from knowpatch.deltas import LowRank
from knowpatch.editing import choose, edit
from knowpatch.errors import EditError, ModelError, OptionError
from knowpatch.models.passes import Tap
from knowpatch.parts import attribution
from knowpatch.parts.attribution import attribute, coarse, highest, refined
from knowpatch.parts.spans import continuation
from knowpatch.request import EditRequest

PROMPT = "The capital of France is"
FACT = EditRequest(prompt=PROMPT, target="Rome", old="Paris")
OTHER = EditRequest(prompt="The capital of Japan is", target="Cairo", old="Tokyo")
ERASE = EditRequest(prompt=PROMPT, old="Paris", kind="erase")


def _forward(model, layer, ids, token, leaf=None):
    """Plain: (p(token) behind `ids`, the layer's neurons), in a full forward.

    With a leaf, a hook puts it in the place of the neurons at the last token.
    """
    seen = []

    def swap(_module, args):
        given = args[0].clone()
        seen.append(given[0, -1].detach().clone())
        if leaf is not None:
            given[0, -1] = leaf
        return (given, *args[1:])

    module = model.model.get_submodule(model.view.roles.linear("mlp.out", layer).module)
    with module.register_forward_pre_hook(swap), torch.enable_grad():
        logits = model.model(torch.tensor([ids])).logits
    return logits[0, -1].softmax(-1)[token], seen[0]


def _asked(model, request=FACT, answer=None):
    encoded = model.encode(request.prompt)
    return encoded.ids, continuation(model.tokenizer, encoded, answer or request.old)


def _probability(model, request=FACT, answer=None, patch=None):
    with model.session([patch]):
        (scored,) = model.view.score([_asked(model, request, answer)])
    return scored.probability


def _neurons(model, patch):
    """Changed slots by block, and each changed slot's change (D)."""
    found = {}
    for layer in range(len(model.view.roles.blocks)):
        role = model.view.roles.linear("mlp.out", layer)
        for delta in patch.deltas:
            if delta.address == role.address:
                change = role.oriented(delta.change.left @ delta.change.right)
                for index in change.abs().sum(0).nonzero()[:, 0].tolist():
                    found[layer, index] = change[:, index]
    return found


# -- finding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_attributions_are_plain_integrated_gradients(known, architecture):
    """Full forwards with scaled neurons give the same numbers, the first and the last block's."""
    model, points = known(architecture), 6
    ids, (token,) = _asked(model)
    layers = range(4)
    found = attribute(model.view, layers, ids, (token,), points=points)
    for layer in layers:
        _, neurons = _forward(model, layer, ids, token)
        total = torch.zeros_like(neurons)
        for step in range(points):
            leaf = ((step + 0.5) / points * neurons).requires_grad_()
            total += torch.autograd.grad(_forward(model, layer, ids, token, leaf)[0], leaf)[0]
        plain = neurons * total / points
        assert torch.allclose(found.neurons[layer], neurons, atol=1e-5)
        assert (found.scores[layer] - plain).norm() < 1e-3 * plain.norm()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_attributions_are_complete(known, architecture):
    """Over a layer they sum to what the layer's neurons add to the probability, to 5 %."""
    model = known(architecture)
    ids, (token,) = _asked(model)
    layers = range(4)
    found = attribute(model.view, layers, ids, (token,), points=50)
    for layer in layers:
        whole, neurons = _forward(model, layer, ids, token)
        nothing, _ = _forward(model, layer, ids, token, torch.zeros_like(neurons))
        total = float(found.scores[layer].sum())
        assert total == pytest.approx(float((whole - nothing).detach()), rel=0.05, abs=1e-3)


def test_groups_of_layers_and_blocks_chosen_make_no_difference(known, monkeypatch):
    """One layer at a time gives what several together give."""
    model = known("llama")
    ids, answer = _asked(model)
    together = attribute(model.view, range(4), ids, answer, points=5)
    monkeypatch.setattr(attribution, "ROWS", 5)
    alone = attribute(model.view, (1, 3), ids, answer, points=5)
    assert list(alone.scores) == [1, 3]
    for layer, scores in alone.scores.items():
        assert torch.allclose(scores, together.scores[layer], atol=1e-6)


def test_several_tokens_are_attributed_each_behind_those_before(known):
    """An answer's scores are the mean over its tokens, the answer itself in front."""
    model = known("llama")
    ids, _ = _asked(model)
    answer = continuation(model.tokenizer, model.encode(PROMPT), "Paris Sudan")
    assert len(answer) > 1
    found = attribute(model.view, (2,), ids, answer, points=4)
    each = [
        attribute(model.view, (2,), (*ids, *answer[:i]), (token,), points=4)
        for i, token in enumerate(answer)
    ]
    mean = sum(one.scores[2] for one in each) / len(answer)
    assert torch.allclose(found.scores[2], mean, atol=1e-6)
    assert torch.equal(found.neurons[2], each[0].neurons[2])


def test_the_coarse_set_is_above_a_share_of_the_largest():
    """The largest of all layers counts; where nothing speaks for the answer none is found."""
    scores = {0: torch.tensor([0.1, 0.3, -2.0]), 3: torch.tensor([1.0, 0.2, 0.0])}
    assert coarse(scores, 0.2) == {(0, 1), (3, 0)}
    assert coarse({0: torch.tensor([-1.0, 0.0])}, 0.2) == frozenset()


def test_refinement_keeps_what_is_shared():
    """More than the share of the sets: two of four are not more than a half."""
    a, b, c = (0, 1), (0, 2), (5, 1)
    sets = [{a, b}, {a, b}, {a, c}, {a}]
    assert refined(sets, 0.5) == {a}
    assert refined(sets, 0.4) == {a, b}
    assert refined(sets, 0.0) == {a, b, c}
    assert refined(sets[:1], 0.9) == {a, b}


def test_the_adapted_share_leaves_two_to_five():
    """It rises from .7 until five at most are left, and falls until there are two."""
    few, many = [(0, 0)], [(1, i) for i in range(8)]
    sets = [{*few, *many}] * 8 + [{*few}] * 2
    assert refined(sets, 0.7) == {*few, *many}
    assert refined(sets, None) == {*few}
    sets = [{(0, 0), (1, 0)}] * 3 + [{(0, 0)}] * 7
    assert refined(sets, 0.7) == {(0, 0)}
    assert refined(sets, None) == {(0, 0), (1, 0)}
    assert refined([{(0, 0)}], None) == {(0, 0)}
    assert refined([set()], None) == frozenset()


def test_the_highest_are_by_the_mean_over_prompts():
    """Of the found ones the highest stay, whatever one prompt says."""
    one, other = {0: torch.tensor([3.0, 2.0, 9.0])}, {0: torch.tensor([0.0, 2.0, 0.0])}
    assert highest({(0, 0), (0, 1)}, [one, other], 1) == {(0, 1)}


# -- writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_write_is_of_rank_one_and_touches_the_slots_alone(known, architecture):
    """Neurons times D entries change, all of a layer along one direction, in both orders."""
    model = known(architecture)
    options = {"scale_new": 4.0, "scale_old": 0.5}
    patch = edit(model, FACT, method="kn", options=options)
    ids, (old,) = _asked(model)
    _, (new,) = _asked(model, answer=FACT.target)
    read = attribute(model.view, range(4), ids, (old,), points=20)
    found = _neurons(model, patch)
    assert set(found) == coarse(read.scores, 0.2)
    entries = sum(int((d.change.left @ d.change.right).count_nonzero()) for d in patch.deltas)
    assert entries == len(found) * model.view.roles.hidden_size
    assert all(isinstance(d.change, LowRank) and d.change.rank == 1 for d in patch.deltas)
    head = model.view.values(f"{model.view.roles.head}.weight")
    direction = 4.0 * head[new] / head[new].norm() - 0.5 * head[old] / head[old].norm()
    for (layer, index), change in found.items():
        slot = model.view.weight(model.view.roles.linear("mlp.out", layer))[:, index]
        sign = read.neurons[layer][index].sign()
        assert torch.allclose(change, sign * slot.norm() * direction, atol=1e-5)


def test_the_published_write_is_an_option(known):
    """Absolute factors, the embedding, no sign: -2 e(old) + 2 e(new) in each slot."""
    model = known("llama")
    found = _neurons(model, edit(model, FACT, method="kn", options={"preset": "gpt2-xl"}))
    (old,), (new,) = _asked(model)[1], _asked(model, answer="Rome")[1]
    table = model.view.values(f"{model.view.roles.embedding}.weight")
    for change in found.values():
        assert torch.allclose(change, 2 * (table[new] - table[old]), atol=1e-6)


def test_of_several_tokens_the_first_is_written_or_all(known):
    """tokens=first is the first one's vector; sum is all of them, as published with factor one."""
    model = known("llama")
    request = FACT.model_copy(update={"target": "Sudan Lyon"})
    _, ids = _asked(model, answer=request.target)
    assert len(ids) > 1
    (old,) = _asked(model)[1]
    table = model.view.values(f"{model.view.roles.embedding}.weight")
    options = {"preset": "gpt2-xl", "scale_old": 2}
    for tokens, new in (("first", 2 * table[ids[0]]), ("sum", table[list(ids)].sum(0))):
        patch = edit(model, request, method="kn", options={**options, "tokens": tokens})
        for change in _neurons(model, patch).values():
            assert torch.allclose(change, new - 2 * table[old], atol=1e-5)


def test_what_is_written_takes_the_neurons_sign(known):
    """Every slot pushes towards the new answer; unsigned, negative neurons push away."""
    model = known("llama")
    ids, _ = _asked(model)
    signed, unsigned = (
        _neurons(model, edit(model, FACT, method="kn", options={"signed": signed}))
        for signed in (True, False)
    )
    signs = set()
    for (layer, index), change in signed.items():
        tap = Tap(model.view.roles.linear("mlp.out", layer).module, "input")
        neuron = model.view.run([ids], taps=[tap]).at(tap, [(0, len(ids) - 1)])[0, index]
        assert torch.allclose(change, unsigned[layer, index] * neuron.sign())
        signs.add(float(neuron.sign()))
    assert signs == {-1.0, 1.0}


def test_the_old_answer_is_what_the_model_says(known):
    """Without an old answer the likeliest next token stands for it."""
    model = known("llama")
    bare = EditRequest(prompt=PROMPT, target="Rome")
    told, untold = (_neurons(model, edit(model, r, method="kn")) for r in (FACT, bare))
    assert set(told) == set(untold)
    assert all(torch.equal(told[n], untold[n]) for n in told)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_erased_slots_are_zero(known, architecture):
    """Merged, each found column is zero, and all others are what they were."""
    model = known(architecture)
    patch = edit(model, ERASE, method="kn")
    found = _neurons(model, patch)
    roles = [model.view.roles.linear("mlp.out", layer) for layer in range(4)]
    before = [model.view.weight(role).clone() for role in roles]
    with model.applied(patch):
        for layer, role in enumerate(roles):
            mine = [index for block, index in found if block == layer]
            after = model.view.weight(role)
            assert mine == [] or float(after[:, mine].abs().max()) <= 1e-6
            others = [i for i in range(after.shape[1]) if i not in mine]
            assert torch.equal(after[:, others], before[layer][:, others])
    assert all(torch.equal(model.view.weight(r), b) for r, b in zip(roles, before, strict=True))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_suppressed_neurons_take_the_answer_down_and_enhanced_ones_up(known, architecture):
    """p(old) falls when its neurons are halved, further when erased; doubled, p(wanted) rises."""
    model = known(architecture)
    half, gone = (
        edit(model, ERASE, method="kn", options={"action": action})
        for action in ("suppress", "erase")
    )
    assert _probability(model, patch=half) < _probability(model)
    assert _probability(model, patch=gone) < _probability(model, patch=half)
    unsure = EditRequest(prompt="The capital of Egypt is", target="Rome")
    more = edit(model, unsure, method="kn", options={"action": "enhance"})
    plain = _probability(model, unsure, "Rome")
    assert _probability(model, unsure, "Rome", patch=more) > plain


def test_strength_scales_the_slots(known):
    """suppress takes that share of each slot away; of strength one it is to erase."""
    model = known("llama")
    changes = {}
    for name, options in {
        "default": {"action": "suppress"},
        "most": {"action": "suppress", "strength": 1},
        "gone": {"action": "erase"},
        "double": {"action": "enhance"},
    }.items():
        request = FACT.model_copy(update={"target": "Paris"}) if name == "double" else ERASE
        changes[name] = _neurons(model, edit(model, request, method="kn", options=options))
    assert all(list(changes["gone"]) == list(c) for c in changes.values())
    for neuron, gone in changes["gone"].items():
        assert torch.equal(changes["most"][neuron], gone)
        assert torch.allclose(changes["default"][neuron], gone / 2)
        assert torch.allclose(changes["double"][neuron], -gone)


def test_several_requests_are_joined_by_layer(known):
    """One delta a layer holds the sum; a slot that two requests erase is erased once."""
    model = known("llama")
    one, other = (_neurons(model, edit(model, r, method="kn")) for r in (FACT, OTHER))
    patch = edit(model, [FACT, OTHER], method="kn")
    both = _neurons(model, patch)
    assert len({d.address for d in patch.deltas}) == len(patch.deltas)
    assert set(both) == set(one) | set(other)
    for neuron, change in both.items():
        total = sum(part[neuron] for part in (one, other) if neuron in part)
        assert torch.allclose(change, total, atol=1e-5)
    twice = edit(model, [ERASE, ERASE], method="kn")
    assert [d.change.rank for d in twice.deltas] == [
        d.change.rank for d in edit(model, ERASE, method="kn").deltas
    ]


def test_most_and_rephrases_narrow_what_is_found(known):
    """most keeps the highest; with rephrases a neuron has to be found for enough prompts."""
    model = known("llama")
    whole = set(_neurons(model, edit(model, FACT, method="kn")))
    three = set(_neurons(model, edit(model, FACT, method="kn", options={"most": 3})))
    assert len(whole) > len(three) == 3
    assert three < whole
    reworded = FACT.model_copy(update={"rephrases": ("It is well known that France is",)})
    agreed = _neurons(model, edit(model, reworded, method="kn", options={"share": 0.5}))
    assert set(agreed) <= whole


# -- what it promises and refuses ------------------------------------------------------------------


def test_what_is_expected():
    """A write and an enhancement promise the target; an erasure that the old answer is gone."""
    assert choose("kn").expected(FACT) == "Rome"
    assert choose("kn").expected(ERASE) is None
    assert choose("kn", {"action": "write"}).expected(ERASE) == ERASE.target
    assert choose("kn", {"action": "enhance"}).expected(FACT) == "Rome"
    assert choose("kn", {"action": "suppress"}).expected(ERASE) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"action": "forget"}, "option action of kn cannot be 'forget'"),
        ({"points": 0}, "option points of kn cannot be 0"),
        ({"threshold": 1.0}, "option threshold of kn"),
        ({"layers": [2, 1]}, "low to high"),
        ({"action": "suppress", "strength": 2}, "would turn slots around"),
        ({"preset": "gpt5"}, "unknown preset 'gpt5' of kn"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options, said):
    """Each wrong option is named, with what is wrong."""
    with pytest.raises(OptionError, match=said) as error:
        choose("kn", options)
    assert "\n" not in str(error.value)


def test_what_cannot_be_done_is_refused_in_one_line(known):
    """A layer that is not there; forgetting what is to be learned; no neuron at all."""
    model = known("llama")
    with pytest.raises(ModelError, match="layer 9 does not exist"):
        edit(model, FACT, method="kn", options={"layers": 9})
    with pytest.raises(OptionError, match="action=suppress only forgets"):
        edit(model, FACT, method="kn", options={"action": "suppress"})
    apart = FACT.model_copy(update={"rephrases": ("Two plus two equals", "The Nile flows through")})
    with pytest.raises(EditError, match=r"no neuron is found that ' ?Paris' behind") as error:
        edit(model, apart, method="kn", options={"share": 0.99, "threshold": 0.9})
    assert "\n" not in str(error.value)
