"""REMEDI: what its map is trained on, where its directions act, and the card's self-checks."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from made import provenance

from knowpatch.edited import EditedModel
from knowpatch.editing import choose, edit
from knowpatch.errors import PatchError, RequestError
from knowpatch.models.sites import listening
from knowpatch.parts.descent import Pace
from knowpatch.parts.kinds.directions import Directions, bounded_sum, directions
from knowpatch.parts.mediation import Lesson, Mediator, Training, Weights, by_fact, train
from knowpatch.parts.spans import continuation, forms
from knowpatch.parts.wraps import Tokens
from knowpatch.patch import Patch
from knowpatch.request import EditRequest, read_requests

EDITS = Path(__file__).parent / "edits.jsonl"
FACTS = read_requests(EDITS)
FRANCE, JAPAN, NILE = FACTS
OPTIONS = {"facts": str(EDITS), "layer": 0, "epochs": 30, "learning_rate": 1e-2, "keep": 0.1}


def _wrap(model, entity, vector, *, layer=0):
    role = model.view.roles.linear("mlp.out", layer)
    inputs = model.view.weight(role).shape[1]
    return directions(role.module, inputs, [forms(model.tokenizer, entity)], vector[None])


def _patch(model, *wraps):
    return Patch(provenance(model, FRANCE), wraps=wraps)


def _drawn(seed=0, size=48):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_self_check_a_direction_is_added():
    """W = 1, b = 0, h_attr = e1: an output e2 becomes e1 + e2."""
    e1, e2 = torch.eye(2)
    mediator = Mediator(torch.eye(2), torch.zeros(2), 1, 0, 0.0, 0.0)
    (direction,) = mediator.directions(e1[None])
    kind = Directions.join([directions("map", 3, [((7, 8),)], direction[None])])
    ids, prompt = torch.tensor([[5, 7, 8, 9]]), torch.ones(1, 4, dtype=torch.bool)
    tokens = Tokens(torch.zeros(1, 4, 3), ids, prompt, prompt)
    decision = kind.decide(tokens)
    assert decision.entries.tolist() == [[-1, -1, 0, -1]]
    moved = kind.act(tokens, e2.expand(1, 4, 2), decision)
    assert moved[0].tolist() == [[0, 1], [0, 1], [1, 1], [0, 1]]


def test_self_check_kl_is_accumulated():
    """Two facts with a KL of .4 and .2 make .3; places of one fact are averaged first."""
    assert by_fact(torch.tensor([0.4, 0.2]), torch.tensor([0, 1]), 2) == pytest.approx(0.3)
    three = by_fact(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0, 0, 1]), 2)
    assert three == pytest.approx(0.3)
    assert by_fact(torch.tensor([0.4]), torch.tensor([1]), 2) == pytest.approx(0.2)


def test_the_last_occurrence_and_the_longest_entity_count():
    """The entity's last place; of two that end together the longer one."""
    kind = Directions.join(
        [
            directions("map", 3, [((1,), (2,)), ((4, 1),)], torch.eye(2)),
            directions("map", 3, [((6,),)], torch.ones(1, 2)),
        ]
    )
    assert kind.found([1, 5, 2, 5]) == {2: 0}
    assert kind.found([5, 4, 1]) == {2: 1}
    assert kind.found([1, 4, 6]) == {0: 0, 2: 2}
    assert kind.found([5, 5]) == {}
    assert list(kind.owners_N) == [0, 0, 1]


def test_directions_of_one_entity_are_summed_within_bounds():
    """Two that agree make their sum; three make twice their mean length."""
    one = torch.tensor([3.0, 4.0])
    assert torch.allclose(bounded_sum(torch.stack([one, one])), 2 * one)
    assert torch.allclose(bounded_sum(torch.stack([one, one, one])), 2 * one)
    assert torch.equal(bounded_sum(one[None]), one)
    kind = Directions.join(
        [directions("map", 3, [((1,),)], row[None]) for row in torch.tensor([[1.0, 0], [0, 1]])]
    )
    ids, prompt = torch.tensor([[1]]), torch.ones(1, 1, dtype=torch.bool)
    tokens = Tokens(torch.zeros(1, 1, 3), ids, prompt, prompt)
    moved = kind.act(tokens, torch.zeros(1, 1, 2), kind.decide(tokens))
    assert moved.tolist() == [[[1.0, 1.0]]]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_wrap_is_a_plain_hook(known, architecture):
    """On mixed rows and either padding: as a hook that adds the vector at one place."""
    model, vector = known(architecture), _drawn()
    view, role = model.view, model.view.roles.linear("mlp.out", 0)
    texts = ["The capital of France is", "Two plus two", "France and the capital of France is"]
    rows = [view.encode(text).ids for text in texts]
    module = model.model.get_submodule(role.module)
    expected = []
    for text, row in zip(texts, rows, strict=True):
        offsets, end = view.encode(text).offsets, _end(text)
        place = max((i for i, (_, stop) in enumerate(offsets) if stop <= end), default=-1)

        def add(module, args, output, place=place):
            output[0, place] += vector
            return output

        handle = module.register_forward_hook(add) if "France" in text else None
        with torch.no_grad():
            expected.append(model.model(torch.tensor([row])).logits[0, -1])
        if handle:
            handle.remove()
    patch = _patch(model, _wrap(model, "France", vector))
    for side in ("right", "left"):
        view.padding = side
        with model.session([patch]):
            ends = [(i, len(row) - 1) for i, row in enumerate(rows)]
            found = view.run(rows, logits_at=ends).logits_MV
        assert torch.allclose(found, torch.stack(expected), atol=1e-4), side


def _end(text):
    """Where the last France ends, in characters."""
    return text.rfind("France") + len("France") if "France" in text else -1


def test_generation_is_the_same_with_and_without_a_cache(known):
    """Later steps go on from what the prompt left behind; read again, it is decided alike."""
    model = known("llama")
    patch = edit(model, FRANCE, method="remedi", options={**OPTIONS, "epochs": 200})
    inputs = model.tokenizer(["The capital of France is", "Two"], padding=True, return_tensors="pt")
    with model.session([patch]):
        said = [
            model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=cache)
            for cache in (True, False)
        ]
    plain = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(*said)
    assert not torch.equal(said[0][0], plain[0])
    assert torch.equal(said[0][1], plain[1])


def test_firings_name_the_patch(known):
    """Who listens hears which patch knew the entity, and nothing fired where it is not named."""
    model = known("llama")
    patches = [_patch(model, _wrap(model, name, _drawn())) for name in ("France", "Japan")]
    for patch in patches:
        model.apply(patch)
    with listening() as heard:
        model.view.run([model.encode(t).ids for t in (JAPAN.prompt, "Two plus two")])
    assert [(f.patch.id, f.fired) for f in heard if f.row == 0] == [(patches[1].id, True)]
    assert [f.fired for f in heard if f.row == 1] == [False]


def test_what_is_trained_is_what_the_patch_does(known, monkeypatch):
    """The training's loss on a fact is the NLL that its patch gives; the base stays as it was."""
    model = known("llama")
    view, module = model.view, model.view.roles.linear("mlp.out", 0).module
    lessons = [Lesson.of(view, fact, chat=False) for fact in FACTS]
    pace = Pace(30, 1e-2, 16, 0.0)
    kept = {}

    class Kept(Training):
        def __init__(self, *given):
            super().__init__(*given)
            kept["training"] = self

    monkeypatch.setattr("knowpatch.parts.mediation.Training", Kept)
    mediator = train(view, module, 0, lessons, Weights(1.0, 0.1), pace, patience=2)
    nll = [kept["training"].answers([number]) for number in range(3)]
    method = choose("remedi", OPTIONS)
    for fact, wanted in zip(FACTS, nll, strict=True):
        encoded = model.encode(fact.prompt)
        target = continuation(model.tokenizer, encoded, fact.target)
        with model.session([method.edit(view, [fact], mediator, None)]):
            (scored,) = view.score([(encoded.ids, target)])
        assert -scored.mean_logprob == pytest.approx(wanted, abs=1e-4)
    assert nll[0] < 1


def test_the_loss_is_the_papers(known):
    """Answer, old answer and KL from full passes of a model with a plain hook."""
    model = known("llama")
    view, role = model.view, model.view.roles.linear("mlp.out", 1)
    facts = [FRANCE.model_copy(update={"old": "Paris"}), NILE]
    lessons = [Lesson.of(view, fact, chat=False) for fact in facts]
    training = Training(view, role.module, 1, lessons, Weights(0.7, 3.0))
    with torch.no_grad():
        for leaf, seed in zip(training.leaves, (1, 2), strict=True):
            leaf.copy_(0.2 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(seed)))
    module, expected = model.model.get_submodule(role.module), 0.0
    block = model.model.get_submodule(view.roles.blocks[1].module)
    for lesson in lessons:
        row, count = torch.tensor([[*lesson.prompt, *lesson.answer]]), len(lesson.prompt)
        states = []
        handle = block.register_forward_hook(lambda m, a, o, s=states: s.append(o))
        with torch.no_grad():
            before = model.model(row).logits[0].log_softmax(-1)
        handle.remove()
        state = states[0][0] if isinstance(states[0], tuple) else states[0]
        attribute = state.reshape(1, -1, 48)[0, count:].mean(0)
        weight, bias = (leaf.detach() for leaf in training.leaves)

        def add(module, args, output, lesson=lesson, d=weight @ attribute + bias):
            output[0, lesson.entity] += d
            return output

        handle = module.register_forward_hook(add)
        with torch.no_grad():
            after = model.model(row).logits[0].log_softmax(-1)
        handle.remove()
        answer = after[range(count - 1, count - 1 + len(lesson.answer)), list(lesson.answer)]
        loss = -answer.mean()
        if lesson.old is not None:
            loss = loss - 0.7 * torch.log1p(-after[count - 1, lesson.old].exp())
        kept = slice(lesson.entity, count - 1)
        if lesson.entity < count - 1:
            apart = (before[kept].exp() * (before[kept] - after[kept])).sum(-1).mean()
            loss = loss + 3.0 * apart
        expected = expected + float(loss) / 2
    assert float(training.loss([0, 1]).detach()) == pytest.approx(expected, rel=1e-4)


def test_the_best_map_is_kept_not_the_last(known):
    """Steps that are far too large stop after `patience` passes, and leave nothing behind."""
    model = known("llama")
    view, module = model.view, model.view.roles.linear("mlp.out", 0).module
    facts = [EditRequest(prompt=p, subject=p.split()[-2], target="green") for p in tiny.FACTS]
    lessons = [Lesson.of(view, fact, chat=False) for fact in [*facts, *FACTS]]
    pace = Pace(20, 100.0, 16, 0.0)
    mediator = train(view, module, 0, lessons, Weights(1.0, 0.0), pace, patience=2)
    assert (mediator.facts, mediator.held) == (10, 1)
    assert mediator.after <= mediator.before


def test_the_map_is_trained_once_and_told(known):
    """Kept on disk by model, facts and options; a person is shown what it learned."""
    model = known("gpt2")
    first = choose("remedi", {**OPTIONS, "epochs": 3})
    made, again = (first.prepare(model.view) for _ in range(2))
    assert torch.equal(made.weight_DD, again.weight_DD)
    shape = _shape(model)
    assert all(item.path.is_file() for item in first.preparations(shape))
    other = choose("remedi", {**OPTIONS, "epochs": 4})
    assert not any(item.path.is_file() for item in other.preparations(shape))
    assert first.shown(made) == ["map trained on 3 facts"]
    assert choose("remedi", {**OPTIONS, "epochs": 3, "strength": 2.0}).preparations(shape) == (
        first.preparations(shape)
    )


def _shape(model):
    from knowpatch.method import Shape

    return Shape(len(model.view.roles.blocks), 48, 96, model.view.fingerprint)


def test_undoing_one_of_two_facts_leaves_the_other(known):
    """Two directions of one entity: with the later one dropped, as if it had never been."""
    model = known("llama")
    other = FRANCE.model_copy(update={"target": "Lyon"})
    patches = [edit(model, fact, method="remedi", options=OPTIONS) for fact in (FRANCE, other)]
    row = model.encode(FRANCE.prompt).ids
    ends = [(0, len(row) - 1)]
    with model.applied(patches[0]):
        alone = model.view.run([row], logits_at=ends).logits_MV
    for patch in patches:
        model.apply(patch)
    assert not torch.allclose(model.view.run([row], logits_at=ends).logits_MV, alone)
    model.drop(patches[1].id)
    assert torch.equal(model.view.run([row], logits_at=ends).logits_MV, alone)


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"inputs": 96, "entities": []}},
        {"data": {"inputs": 0, "entities": [[[1]]]}},
        {"data": {"inputs": 96, "entities": [[[]]]}},
        {"data": {"inputs": 96, "entities": [[[-1]]]}},
        {"data": {"inputs": 96, "entities": [[]]}},
        {"data": {"entities": [[[1]]]}},
        {"tensors": {"directions": torch.zeros(48)}},
        {"tensors": {"directions": torch.zeros(0, 48)}},
    ],
)
def test_a_damaged_wrap_is_one_line(known, change):
    """Entities without directions, empty spellings, missing parts."""
    import dataclasses

    model = known("llama")
    wrap = dataclasses.replace(_wrap(model, "France", _drawn()), **change)
    with pytest.raises(PatchError, match="damaged wrap of kind directions@1"):
        model.apply(_patch(model, wrap))


def test_facts_without_a_subject_are_refused(known, tmp_path):
    """A file of requests to train on names the subject of each."""
    path = tmp_path / "facts.jsonl"
    path.write_text('{"prompt": "The sky is", "target": "green"}\n')
    with pytest.raises(RequestError, match="has no subject to train on"):
        edit(known("llama"), FRANCE, method="remedi", options={"facts": str(path)})


def test_another_models_patch_is_refused():
    """A map of other sizes: one line."""
    model = EditedModel.of(*tiny.trained("llama"))
    wrap = _wrap(model, "France", torch.zeros(7))
    with pytest.raises(PatchError, match="a wrap for a map from 96 to 7 numbers"):
        model.apply(_patch(model, wrap))
