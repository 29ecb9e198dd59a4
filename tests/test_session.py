"""Sessions: each row of a batch carries patches of its own, beside weights that stay as they are.

What a row says in a session is held against what it says alone on a model whose weights were
rewritten, in every way of asking: passes, scores, greedy and sampled text, beams.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import tiny
import torch
from made import provenance, state
from transformers import DynamicCache

from knowpatch import edited
from knowpatch.deltas import Address, Dense, LowRank, Rows, WeightDelta
from knowpatch.edited import EditedModel
from knowpatch.editing import edit, load
from knowpatch.errors import ForeignModelError, OptionError, PatchError
from knowpatch.models.fingerprint import tensor_digest
from knowpatch.models.passes import Tap
from knowpatch.parts.kinds.codebook import codebook
from knowpatch.parts.memory import Memory
from knowpatch.parts.spans import continuation
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

FRANCE, JAPAN, NILE = (
    EditRequest(prompt=prompt, subject=subject, target=tiny.EDITS[prompt])
    for prompt, subject in zip(tiny.EDITS, ("France", "Japan", "Nile"), strict=True)
)
TWO = "Two plus two equals"
TEXTS = (FRANCE.prompt, NILE.prompt, TWO, "The")
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def _random(*shape, seed=0, size=0.1):
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _change(form, rows, columns, seed=0, size=0.1):
    if form == "low-rank":
        left = _random(rows, 2, seed=seed, size=size)
        return LowRank(left, _random(2, columns, seed=seed + 1, size=1))
    if form == "rows":
        return Rows(torch.tensor([rows - 1, 0, 2]), _random(3, columns, seed=seed, size=size))
    return Dense(_random(rows, columns, seed=seed, size=size))


def _at(model, role, layer, form, *, seed=0, size=0.1, **cut):
    """A random change of the weight of one map, or of the part of it that `cut` says."""
    address = model.view.roles.linear(role, layer).address
    address = Address(parameter=address.parameter, **cut) if cut else address
    part = address.narrow(model.view.parameter(address.parameter))
    return WeightDelta(address, _change(form, *part.shape, seed=seed, size=size))


def _patch(model, *deltas, wraps=(), seed=0, fingerprint=None):
    origin = provenance(model, FRANCE, seed=seed, fingerprint=fingerprint)
    return Patch(origin, deltas, None, tuple(wraps))


def _of(model, name, form="dense", *, seed=0):
    """A patch of one parameter by its name, whatever that is."""
    shape = model.view.parameter(name).shape
    change = Dense(_random(*shape, seed=seed)) if form == "dense" else _change(form, *shape)
    return _patch(model, WeightDelta(Address(parameter=name), change), seed=seed)


def _answering(model, prompt, layer=2):
    """A patch with a codebook that puts a random value at the end of `prompt`."""
    module = model.view.roles.linear("mlp.out", layer).module
    row, tap = model.view.encode(prompt).ids, Tap(module, "input")
    key = model.view.run([row], taps=[tap]).at(tap, [(0, len(row) - 1)])
    value = _random(1, model.view.roles.hidden_size, seed=5, size=3)
    entry = Memory(key, value, torch.tensor([1e-2]), ((7,),))
    return _patch(model, wraps=[codebook(module, [entry])])


def _logits(model, texts=TEXTS):
    """At every place of every text, one after the other."""
    rows = [model.view.encode(text).ids for text in texts]
    places = [(i, place) for i, row in enumerate(rows) for place in range(len(row))]
    return model.view.run(rows, logits_at=places).logits_MV


def _near(one, other):
    return torch.allclose(one, other, atol=1e-4, rtol=0)


def _one_line(caught):
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# -- beside is merged ------------------------------------------------------------------------------

CUTS = {
    "whole": {},
    "first-dimension": {"dim": 0, "start": 5, "stop": 17},
    "second-dimension": {"dim": 1, "start": 7, "stop": 31},
    "to-the-end": {"dim": 0, "start": 9},
    "second-to-the-end": {"dim": 1, "start": 4},
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("form", ["low-rank", "rows", "dense"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "opt"])
def test_beside_equals_merged(known, architecture, form, cut):
    """Every form of change, of whole maps and of slices, gives the logits of rewritten weights."""
    model = known(architecture)
    base = _logits(model)
    deltas = [
        _at(model, "mlp.out", 1, form, seed=1, **CUTS[cut]),
        _at(model, "mlp.up", 2, form, seed=3),
        _at(model, "attn.out", 0, form, seed=5, **CUTS[cut]),
    ]
    for changed in (*([delta] for delta in deltas), deltas):
        patch = _patch(model, *changed)
        with model.session([patch]):
            beside = _logits(model)
        with model.applied(patch):
            merged = _logits(model)
        assert (merged - base).abs().max() > 1e-2
        assert _near(beside, merged)
    assert torch.equal(_logits(model), base)


def test_both_halves_of_a_fused_map_are_changed_apart(known):
    """Phi-3's gate and up sit in one matrix: a row changes its own half, another the other."""
    model = known("phi3")
    gate, up = (
        _patch(model, _at(model, role, 2, "dense", seed=4)) for role in ("mlp.gate", "mlp.up")
    )
    rows = [gate, up, [gate, up], None]
    alone = []
    for row in rows:
        with model.applied(*([row] if isinstance(row, Patch) else row or [])):
            alone.append(_logits(model, [TWO]))
    with model.session(rows):
        together = _logits(model, [TWO] * 4).split(len(alone[0]))
    assert all(map(_near, alone, together))
    assert not any(_near(alone[3], other) for other in alone[:3])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "opt"])
def test_a_wrap_beside_equals_a_live_one(known, architecture):
    """A codebook answers the same carried by a session as applied, and changes something."""
    model = known(architecture)
    base, patch = _logits(model), _answering(model, FRANCE.prompt)
    with model.session([patch]):
        beside = _logits(model)
    with model.applied(patch):
        merged = _logits(model)
    assert _near(beside, merged)
    assert not _near(beside, base)


def test_a_map_of_the_attention_and_several_changes_of_one(known):
    """A projection that no role names, and two changes of one matrix, are added up in order."""
    model = known("llama")
    name = "model.layers.2.self_attn.q_proj.weight"
    shape = model.view.parameter(name).shape
    deltas = [
        WeightDelta(Address(parameter=name), _change("low-rank", *shape, seed=1)),
        WeightDelta(Address(parameter=name, start=3, stop=9), Dense(_random(6, shape[1]))),
    ]
    patch = _patch(model, *deltas)
    with model.session([patch]):
        beside = _logits(model)
    with model.applied(patch):
        assert _near(beside, _logits(model))
    assert not _near(beside, _logits(model))


@pytest.mark.parametrize("architecture", sorted(tiny.MIXTURES))
def test_a_mixture_of_experts_carries_what_is_plain(architecture):
    """Its attention and a shared expert are maps like any other; experts are refused."""
    model = EditedModel.of(*tiny.fresh(architecture))
    names = {name for name, _ in model.model.named_parameters()}
    shared = "model.layers.2.mlp.shared_expert.down_proj.weight"
    deltas = [_at(model, "attn.out", 1, "dense", size=0.5)]
    deltas += _of(model, shared, "low-rank").deltas if shared in names else ()
    patch = _patch(model, *deltas)
    with model.session([patch, None, None, None]):
        beside = _logits(model)
    base, (mine, *_) = _logits(model), [len(model.view.encode(text).ids) for text in TEXTS]
    with model.applied(patch):
        assert _near(beside[:mine], _logits(model)[:mine])
    assert _near(beside[mine:], base[mine:])
    assert not _near(beside[:mine], base[:mine])
    experts = min(name for name in names if "experts" in name)
    with pytest.raises(PatchError, match="apply it instead") as caught:
        model.hold(
            _patch(
                model,
                WeightDelta(
                    Address(parameter=experts),
                    Dense(torch.zeros(model.view.parameter(experts).shape)),
                ),
            )
        )
    _one_line(caught)


def test_live_patches_act_on_every_row_of_a_session(known):
    """On top of a live patch a row is what both give, whichever of them is merged."""
    model = known("llama")
    live = _patch(model, _at(model, "mlp.out", 1, "dense"))
    wrap, other = _answering(model, FRANCE.prompt), _patch(model, _at(model, "mlp.up", 2, "rows"))
    with model.applied(live, wrap, other):
        both = _logits(model, [FRANCE.prompt])
    with model.applied(live, wrap):
        first = _logits(model, [FRANCE.prompt])
        with model.session([other, None]):
            rows = _logits(model, [FRANCE.prompt] * 2)
    assert _near(rows, torch.cat([both, first]))
    assert not _near(both, first)


# -- rows of a batch -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kinds():
    """A model, and one patch of each kind: deltas by hand, a codebook, a rule, real edits."""
    model = EditedModel.of(*tiny.trained("llama"))
    ft = {"learning_rate": 1e-2, "steps": 80}
    rome = {"layer": 0, "clamp": 4.0, "ridge": 0.01, "kl_factor": 0.0, "tokens": 1000}
    return model, {
        "low-rank": _patch(model, _at(model, "mlp.out", 1, "low-rank", seed=1, size=0.3)),
        "rows": _patch(model, _at(model, "mlp.up", 2, "rows", seed=2, size=0.5)),
        "dense": _patch(model, _at(model, "attn.out", 1, "dense", seed=3, size=0.5)),
        "slice": _patch(model, _at(model, "mlp.gate", 2, "dense", dim=1, start=3, stop=30, size=1)),
        "by-hand": _answering(model, NILE.prompt),
        "fine-tuned": edit(model, FRANCE, method="ft", options=ft),
        "located": edit(model, FRANCE, method="rome", options=rome),
        "codebook": edit(model, JAPAN, method="grace"),
        "rule": edit(model, NILE, method="ice"),
    }


MIXED = (
    ("fine-tuned", FRANCE.prompt),
    ("", FRANCE.prompt),
    ("codebook", JAPAN.prompt),
    ("low-rank rows", TWO),
    ("rule", NILE.prompt),
    ("dense", JAPAN.prompt),
    ("located rows", FRANCE.prompt),
    ("slice codebook", JAPAN.prompt),
    ("by-hand", NILE.prompt),
)
"""The patches of each row, and what it is asked."""


def _rows(kinds, mixed=MIXED):
    return [[kinds[1][name] for name in names.split()] for names, _ in mixed]


def _padded(model, prompts, side):
    batch = model.view.batch([model.view.encode(prompt).ids for prompt in prompts], side=side)
    return batch.ids_BT, batch.mask_BT


def _without_end(model, ids):
    """Generated ids without the padding behind them."""
    ids = ids.tolist()
    while ids and ids[-1] == model.tokenizer.pad_token_id:
        ids.pop()
    return ids


def _said(model, out, width):
    """What was generated behind each row."""
    return [_without_end(model, row) for row in out[:, width:]]


def _alone(model, patches, prompt, **options):
    """What one row says on a model whose weights were rewritten; with beams, each sequence."""
    ids = torch.tensor([model.view.encode(prompt).ids])
    with model.applied(*patches):
        return _said(model, model.generate(ids, **options), ids.shape[1])


def test_each_row_is_as_it_is_alone(kinds):
    """Logits of nine rows with different patches are those of each alone, merged."""
    model = kinds[0]
    prompts, rows = [prompt for _, prompt in MIXED], _rows(kinds)
    ends = [len(model.view.encode(prompt).ids) for prompt in prompts]
    with model.session(rows):
        together = _logits(model, prompts).split(ends)
    for row, prompt, mine in zip(rows, prompts, together, strict=True):
        with model.applied(*row):
            assert _near(mine, _logits(model, [prompt]))
    assert len({tuple(mine[-1].round(decimals=2).tolist()) for mine in together}) == len(MIXED)


def test_no_row_depends_on_its_neighbours(kinds):
    """Neighbours with huge changes, other texts and other places in the batch change nothing."""
    model, made = kinds
    huge = _patch(model, _at(model, "mlp.out", 1, "dense", size=1e4))
    mine = [made["low-rank"], made["codebook"]]
    with model.session([mine]):
        alone = _logits(model, [JAPAN.prompt])[-1]
    for rows, texts in (
        ([mine, huge], [JAPAN.prompt, FRANCE.prompt]),
        ([huge, mine], [JAPAN.prompt, JAPAN.prompt]),
        ([None, huge, mine, made["dense"]], [TWO, FRANCE.prompt * 4, JAPAN.prompt, "The"]),
    ):
        row = rows.index(mine)
        places = [(row, len(model.view.encode(JAPAN.prompt).ids) - 1)]
        with model.session(rows):
            ids = [model.view.encode(text).ids for text in texts]
            assert _near(model.view.run(ids, logits_at=places).logits_MV[0], alone)


def test_a_session_of_one_row_is_for_every_row(kinds):
    """Batches of one, three and four rows all carry it."""
    model, made = kinds
    with model.applied(made["low-rank"]):
        merged = _logits(model, [TWO])
    with model.session([made["low-rank"]]):
        for count in (1, 3, 4):
            assert _near(_logits(model, [TWO] * count), merged.repeat(count, 1))


def test_a_row_stands_for_adjacent_rows_of_a_longer_batch(kinds):
    """Two rows and a batch of six: the first three carry the first, the last three the second."""
    model, made = kinds
    with model.session([made["low-rank"], made["dense"]]):
        long = _logits(model, [TWO] * 6)
        short = _logits(model, [TWO] * 2)
    first, second = short.chunk(2)
    assert not _near(first, second)
    assert _near(long, torch.cat([first.repeat(3, 1), second.repeat(3, 1)]))


def test_a_batch_that_is_no_multiple_is_refused(kinds):
    """Every way of running three rows, or one, in a session of two says what to do; in one line."""
    model, made = kinds
    row = model.view.encode(TWO).ids
    ids = torch.tensor([row])
    ways = [
        lambda n: model.view.run([row] * n, logits_at=[(0, 0)]),
        lambda n: model.view.score([(row, (5,))] * n),
        lambda n: model.view.generate([row] * n, max_new_tokens=1),
        lambda n: model.generate(ids.repeat(n, 1), max_new_tokens=1),
        lambda n: model(ids.repeat(n, 1)),
    ]
    with model.session([made["rule"], None]):
        for way in ways:
            for count in (1, 3):
                with pytest.raises(OptionError) as caught:
                    way(count)
                said = _one_line(caught)
                assert f"a session of 2 rows cannot run a batch of {count}" in said
                assert "give a batch of as many rows, or a session of one row for all" in said
        with pytest.raises(OptionError, match="ask single questions in a session of one row"):
            model.ask(TWO)


# -- generate and call -----------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_gives_each_row_its_own_continuation(kinds, side, use_cache):
    """Padded on either side, a batch says what each row says alone on rewritten weights.

    What comes back starts with the ids that were given, the prompt rule's row included.
    """
    model, rows = kinds[0], _rows(kinds)
    options = {**GREEDY, "use_cache": use_cache}
    ids, mask = _padded(model, [prompt for _, prompt in MIXED], side)
    with model.session(rows):
        out = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(out[:, : ids.shape[1]], ids)
    alone = [_alone(model, row, p, **options)[0] for row, (_, p) in zip(rows, MIXED, strict=True)]
    assert _said(model, out, ids.shape[1]) == alone
    assert model.view.decode(alone[4]).startswith(f" {NILE.target}")
    plain = [_alone(model, [], prompt, **options)[0] for _, prompt in MIXED]
    assert [one == other for one, other in zip(alone, plain, strict=True)] == [
        not names for names, _ in MIXED
    ]


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "phi3"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_on_other_architectures(known, architecture, use_cache):
    """Conv1D, flattened rows and fused maps: a mixed batch says what each row says alone."""
    model = known(architecture)
    rows = [
        [_patch(model, _at(model, "mlp.out", 1, "low-rank", size=0.5))],
        [_answering(model, FRANCE.prompt)],
        [],
        [_patch(model, _at(model, "mlp.up", 2, "dense", size=0.5))],
    ]
    prompts = [JAPAN.prompt, FRANCE.prompt, TWO, NILE.prompt]
    options = {**GREEDY, "use_cache": use_cache}
    ids, mask = _padded(model, prompts, "right")
    with model.session(rows):
        out = model.generate(ids, attention_mask=mask, **options)
    alone = [_alone(model, row, p, **options)[0] for row, p in zip(rows, prompts, strict=True)]
    assert _said(model, out, ids.shape[1]) == alone
    assert alone[1] != _alone(model, [], FRANCE.prompt, **options)[0]


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_belong_to_their_row(kinds, use_cache):
    """Three beams, two sequences a row: those that each row alone gives, in its order."""
    model, rows = kinds[0], _rows(kinds)
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "use_cache": use_cache}
    ids, mask = _padded(model, [prompt for _, prompt in MIXED], "right")
    with model.session(rows):
        out = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(out[:, : ids.shape[1]], ids.repeat_interleave(2, 0))
    found = _said(model, out, ids.shape[1])
    for number, (row, (_, prompt)) in enumerate(zip(rows, MIXED, strict=True)):
        assert found[2 * number : 2 * number + 2] == _alone(model, row, prompt, **options)


def test_sampling_follows_the_seed(kinds):
    """With one seed a row draws what it draws in the same batch where all rows are as it is."""
    model = kinds[0]
    mixed = [pair for pair in MIXED if pair[0] != "rule"]
    rows = _rows(kinds, mixed)
    ids, mask = _padded(model, [prompt for _, prompt in mixed], "left")

    def drawn(seed=0):
        torch.manual_seed(seed)
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=True, num_return_sequences=2
        )

    with model.session(rows):
        mine, again, other = drawn(), drawn(), drawn(seed=1)
    assert torch.equal(mine, again)
    assert mine.shape != other.shape or not torch.equal(mine, other)
    mine = _said(model, mine, ids.shape[1])
    for number, row in enumerate(rows):
        with model.applied(*row):
            merged = _said(model, drawn(), ids.shape[1])
        assert mine[2 * number : 2 * number + 2] == merged[2 * number : 2 * number + 2]


def test_rules_act_row_by_row(kinds):
    """Each row's own rule stands in front of it: two rules, both, and none."""
    model, made = kinds
    other = edit(model, FRANCE, method="ice")
    rows = [[made["rule"]], [other], [other, made["rule"]], []]
    ids, mask = _padded(model, [NILE.prompt, FRANCE.prompt, NILE.prompt, NILE.prompt], "left")
    with model.session(rows):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
    said = [model.view.decode(row) for row in out[:, ids.shape[1] :]]
    assert torch.equal(out[:, : ids.shape[1]], ids)
    assert [text.split(".")[0].strip() for text in said] == ["Tokyo", "Rome", "Tokyo", "Egypt"]


def test_a_neighbours_rule_leaves_a_rows_ids_alone(kinds):
    """A row without a rule is read as it was given, with a rule beside it or without."""
    model, made = kinds
    row = [*model.view.encode(TWO).ids, *model.tokenizer(" ")["input_ids"]]
    batch = model.view.batch([row, model.view.encode(NILE.prompt).ids], side="left")
    said = []
    for neighbour in (None, made["rule"]):
        with model.session([None, neighbour]):
            out = model.generate(batch.ids_BT, attention_mask=batch.mask_BT, **GREEDY)
        said.append(_said(model, out, batch.ids_BT.shape[1])[0])
    assert said[0] == said[1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_call_in_a_session(kinds, side):
    """`model(ids, attention_mask=...)`: each row's logits are those of the row alone, merged."""
    model, rows = kinds[0], _rows(kinds)
    ids, mask = _padded(model, [prompt for _, prompt in MIXED], side)
    with torch.no_grad(), model.session(rows):
        together = model(ids, attention_mask=mask).logits
        named = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(together, named)
    for number, (row, (names, prompt)) in enumerate(zip(rows, MIXED, strict=True)):
        with torch.no_grad(), model.applied(*row):
            alone = model(torch.tensor([model.view.encode(prompt).ids])).logits[0]
        mine = together[number, mask[number].bool()]
        assert _near(mine, alone), names


def test_a_call_on_top_of_a_past_goes_on_in_the_session(kinds):
    """A loop of one's own, token by token on the model's cache, says what `generate` says."""
    model, rows = kinds[0], _rows(kinds)[:4]
    ids, mask = _padded(model, [prompt for _, prompt in MIXED[:4]], "left")
    with torch.no_grad(), model.session(rows):
        wanted = model.generate(ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
        out, said = model(ids, attention_mask=mask, use_cache=True), []
        for _ in range(GREEDY["max_new_tokens"]):
            said.append(out.logits[:, -1].argmax(-1))
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], 1)
            out = model(said[-1][:, None], attention_mask=mask, past_key_values=out.past_key_values)
    said = torch.stack(said, 1)
    assert [_without_end(model, row) for row in said] == [
        _without_end(model, row) for row in wanted
    ]


def test_an_empty_past_is_no_past(kinds):
    """A prompt read into a cache that was given is the prompt, wraps included."""
    model, made = kinds
    ids = torch.tensor([model.view.encode(JAPAN.prompt).ids])
    with torch.no_grad(), model.session([made["codebook"]]):
        plain = model(ids).logits
        kept = model(ids, past_key_values=DynamicCache(config=model.config)).logits
    assert _near(plain, kept)


def test_what_a_prompt_end_is_must_be_seen(kinds):
    """A call without ids is refused where something is carried, and the model's own elsewhere."""
    model, made = kinds
    ids = torch.tensor([model.view.encode(TWO).ids])
    given = {"inputs_embeds": model.model.get_input_embeddings()(ids)}
    assert _near(model(**given).logits, model(ids).logits)
    with model.session([made["dense"]]), pytest.raises(OptionError, match="give input_ids"):
        model(**given)


# -- contexts --------------------------------------------------------------------------------------


def _at_once(*jobs):
    """What each job returns; all begin together, each in a thread of its own."""
    start = threading.Barrier(len(jobs))

    def run(job):
        start.wait(30)
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(60) for future in [pool.submit(run, job) for job in jobs]]


def test_four_threads_at_once(kinds):
    """Each with another session (one with none), asking again and again: each as if alone."""
    model, made = kinds
    rows = [[made["low-rank"]], [made["fine-tuned"], made["codebook"]], [made["dense"]], None]
    ids, mask = _padded(model, [FRANCE.prompt, JAPAN.prompt], "left")

    def ask():
        scored = model.view.score([(ids[1].tolist(), (5, 6))] * 2)
        return (
            model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False).tolist(),
            [round(x, 4) for x in scored[0].logprobs],
        )

    def job(row):
        def run():
            if row is None:
                return [ask() for _ in range(6)]
            with model.session([row]):
                return [ask() for _ in range(6)]

        return run

    alone = [job(row)()[0] for row in rows]
    assert len({str(answer) for answer in alone}) == 4
    assert _at_once(*map(job, rows)) == [[answer] * 6 for answer in alone]


def test_a_new_thread_sees_no_session_and_no_trial(kinds):
    """What a thread carries or tries out stays its own, with threads that it starts left out."""
    model, made = kinds
    role = model.view.roles.linear("attn.out", 1)
    base, weight = _logits(model), model.view.weight(role)
    with model.session([made["dense"]]), model.trying(made["low-rank"].deltas):
        mine = _logits(model)
        (other,) = _at_once(lambda: _logits(model))
    assert torch.equal(other, base)
    with model.applied(made["dense"], made["low-rank"]):
        assert _near(mine, _logits(model))
    with model.trying(made["dense"].deltas):
        (other,) = _at_once(lambda: model.view.weight(role))
        assert not torch.equal(model.view.weight(role), weight)
    assert torch.equal(other, weight)


def test_a_weight_read_during_another_threads_trial_is_the_models_own(kinds):
    """Whoever reads a weight, or holds a patch, while a trial runs sees the model's own weight."""
    model, made = kinds
    role = model.view.roles.linear("attn.out", 1)
    other = _patch(model, _at(model, "attn.out", 1, "dense", seed=99))
    weight, found = model.view.weight(role), []
    with ThreadPoolExecutor(1) as pool:

        def read_meanwhile(module, args):
            if not found:
                found.append(pool.submit(lambda: (model.view.weight(role), model.hold(other))))
                wait(found, timeout=0.5)

        hook = model.model.get_submodule(role.module).register_forward_pre_hook(read_meanwhile)
        try:
            with model.trying(made["dense"].deltas):
                _logits(model)
        finally:
            hook.remove()
        assert torch.equal(found[0].result(30)[0], weight)


def test_other_threads_see_a_patch_whole_or_not_at_all(known, monkeypatch):
    """A pass that another thread asks for while a patch is applied, or dropped, waits for it."""
    model = known("llama")
    patch = _patch(model, _at(model, "mlp.out", 1, "dense"), _at(model, "attn.out", 2, "dense"))
    base = _logits(model)
    with model.applied(patch):
        whole = _logits(model)
    store, asked = EditedModel._store, []
    with ThreadPoolExecutor(1) as pool:

        def ask_meanwhile(self, name, value):
            store(self, name, value)
            asked.append(pool.submit(_logits, model))
            wait(asked, timeout=0.3)

        monkeypatch.setattr(EditedModel, "_store", ask_meanwhile)
        model.apply(patch)
        model.drop(patch.id)
        seen = [future.result(30) for future in asked]
    assert len(seen) == 4
    assert all(_near(logits, base) or _near(logits, whole) for logits in seen)


def test_two_threads_hold_the_same_patch_once(kinds, monkeypatch):
    """However late a check ends, a patch that two threads hold is found by its id."""
    model = kinds[0]
    patch = _patch(model, _at(model, "mlp.out", 1, "rows", seed=77))
    check, both = edited.check_fits, threading.Barrier(2)

    def slow(*args):
        check(*args)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)

    monkeypatch.setattr(edited, "check_fits", slow)
    assert _at_once(*[lambda: model.hold(patch)] * 2) == [patch.id] * 2
    with model.session([patch.id]):
        pass
    model.release(patch.id)


def test_tasks_do_not_mix(kinds):
    """asyncio tasks that take turns between questions keep their own sessions."""
    model, made = kinds
    rows = [made["low-rank"], made["dense"], None, made["by-hand"]]

    async def ask(row):
        found = []
        with model.session([row]):
            for _ in range(4):
                found.append(_logits(model, [NILE.prompt]))
                await asyncio.sleep(0)
        found.append(_logits(model, [NILE.prompt]))
        return found

    async def all_of_them():
        return await asyncio.gather(*map(ask, rows))

    base = _logits(model, [NILE.prompt])
    for row, found in zip(rows, asyncio.run(all_of_them()), strict=True):
        with model.session([row]):
            mine = _logits(model, [NILE.prompt])
        assert [torch.equal(one, mine) for one in found[:-1]] == [True] * 4
        assert torch.equal(found[-1], base)
        assert torch.equal(mine, base) == (row is None)


def test_an_exception_leaves_no_session_behind(kinds):
    """An error inside, and a session that is refused, leave the model as it was."""
    model, made = kinds
    base = _logits(model)
    with pytest.raises(ZeroDivisionError), model.session([made["dense"]]):
        raise ZeroDivisionError
    assert torch.equal(_logits(model), base)
    with pytest.raises(OptionError), model.session([made["dense"], "unknown"]):
        pass
    assert model.carried() == ()
    assert torch.equal(_logits(model), base)


def test_the_inner_session_counts(kinds):
    """A session inside another replaces it, row count included; the outer one is back after it."""
    model, made = kinds
    base = _logits(model)
    with model.session([made["low-rank"]]):
        outer = _logits(model)
        with model.session([made["dense"]] * 4):
            inner = _logits(model)
        with model.session([None]):
            assert torch.equal(_logits(model), base)
        assert torch.equal(_logits(model), outer)
    with model.session([made["dense"]]):
        assert _near(_logits(model), inner)
    assert not _near(inner, outer)


def test_two_models_have_sessions_of_their_own(known):
    """A session is for one model, also where another is of the same weights."""
    one, twin, other = known("llama"), known("llama"), known("gpt2")
    patches = [_patch(model, _at(model, "mlp.out", 1, "dense")) for model in (one, other)]
    base = [_logits(model) for model in (one, twin, other)]
    with one.session([patches[0]]), other.session([patches[1]]):
        inside = [_logits(model) for model in (one, twin, other)]
        assert one.carried() == (patches[0],)
        assert other.carried() == (patches[1],)
        assert twin.carried() == ()
    assert [torch.equal(*pair) for pair in zip(base, inside, strict=True)] == [False, True, False]


# -- what is held, and what is refused -------------------------------------------------------------


def test_held_patches_are_found_by_their_ids(known):
    """`hold` gives the id; a whole one or a beginning that only one has is enough; `release`."""
    model = known("llama")
    patches = [_patch(model, _at(model, "mlp.out", 1, "rows"), seed=i) for i in range(17)]
    assert [model.hold(patch) for patch in patches] == [patch.id for patch in patches]
    assert model.hold(patches[0]) == patches[0].id
    firsts = [patch.id[0] for patch in patches]
    shared = next(first for first in firsts if firsts.count(first) > 1)
    for unclear in (shared, "", "x", f"{patches[0].id}0"):
        with pytest.raises(OptionError) as caught, model.session([[unclear]]):
            pass
        assert f"no single held patch has id {unclear!r}; held: " in _one_line(caught)
        with pytest.raises(OptionError, match="no single held patch"):
            model.release(unclear)
    with model.session([[patches[3].id[:12], patches[4]]]):
        assert model.carried() == (patches[3], patches[4])
    model.release(patches[3].id[:12])
    with pytest.raises(OptionError, match="no single held patch"), model.session([patches[3].id]):
        pass
    assert not model.live


def test_a_session_keeps_its_patches_at_hand(known):
    """A patch that a session was given is known by its id afterwards; released, it still acts."""
    model = known("llama")
    patch = _patch(model, _at(model, "mlp.out", 1, "dense"))
    with model.session([patch]):
        mine = _logits(model)
        model.release(patch.id)
        assert torch.equal(_logits(model), mine)
    model.hold(patch)
    with model.session([patch.id[:12]]):
        assert torch.equal(_logits(model), mine)


def _live(model):
    patch = _patch(model, _at(model, "mlp.out", 1, "rows", seed=3))
    model.apply(patch)
    return [patch, None]


def _twice(model):
    patch = _patch(model, _at(model, "mlp.out", 1, "rows"))
    return [None, [patch, model.hold(patch)]]


NORM = "model.layers.1.input_layernorm.weight"
REFUSED = {
    "an-unknown-id": (lambda m: ["abc"], OptionError, "no single held patch has id 'abc'; held: "),
    "a-live-patch": (_live, PatchError, "is already applied: it would act twice"),
    "a-patch-twice-in-a-row": (_twice, PatchError, "is twice in one row: it would act twice"),
    "of-another-model": (
        lambda m: [_patch(m, _at(m, "mlp.out", 1, "rows"), fingerprint="f" * 64)],
        ForeignModelError,
        "was made for the model with fingerprint f{16}, .* load the model it was made for",
    ),
    "no-rows": (lambda m: [], OptionError, r"give at least one, \[None\] for none"),
    "a-norm": (lambda m: [_of(m, NORM)], PatchError, f"{NORM} of a .*Norm.*; apply it instead"),
    "the-embedding": (
        lambda m: [None, _of(m, "model.embed_tokens.weight", "rows")],
        PatchError,
        "model.embed_tokens.weight of a Embedding.*; apply it instead",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_carried_is_refused(known, name):
    """In one line that says what is wrong or what to do; the model answers as before."""
    make, error, said = REFUSED[name]
    model = known("llama")
    rows = make(model)
    before = _logits(model)
    with pytest.raises(error, match=said) as caught, model.session(rows):
        pass
    assert type(caught.value) is error
    _one_line(caught)
    assert torch.equal(_logits(model), before)


def test_a_bias_is_applied_but_not_carried(known):
    """What a session refuses to compute beside a map can be applied, as the message says."""
    model = known("gpt2")
    patch = _of(model, "transformer.h.1.mlp.c_proj.bias")
    with pytest.raises(PatchError, match="apply it instead") as caught:
        model.hold(patch)
    _one_line(caught)
    base = _logits(model)
    with model.applied(patch):
        assert not _near(_logits(model), base)


def test_a_change_of_the_head_is_refused(known):
    """The head runs at asked places only, where rows cannot be told apart; it can be applied."""
    model = known("llama")
    patch = _of(model, "lm_head.weight")
    base = _logits(model)
    with pytest.raises(PatchError, match="apply it instead"), model.session([patch]):
        pass
    with model.applied(patch):
        assert not _near(_logits(model), base)


@pytest.mark.parametrize("others", [[], [None]], ids=["one-row", "two-rows"])
def test_no_edit_is_made_in_a_session(kinds, others):
    """Editing inside a session is refused in one line, and works after it and in an empty one."""
    model, made = kinds
    options = {"steps": 2}
    with model.session([made["dense"], *others]), pytest.raises(OptionError) as caught:
        edit(model, FRANCE, method="ft", options=options)
    assert "session" in _one_line(caught)
    assert others or "leave the session first" in str(caught.value)
    outside = edit(model, FRANCE, method="ft", options=options)
    with model.session([None]):
        assert edit(model, FRANCE, method="ft", options=options) == outside


# -- what a session leaves -------------------------------------------------------------------------


def _state(model):
    """Everything that a session must leave as it found it."""
    return {**state(model), "padding": model.view.padding}


def test_a_session_leaves_everything_as_found(kinds):
    """Weights, buffers, gradients, modes, hooks, random state: the same inside, and after it."""
    made = kinds[1]
    model = EditedModel.of(*tiny.trained("llama"))
    model.model.train()
    next(model.model.parameters()).requires_grad_(requires_grad=False)
    before = _state(model)
    ids, mask = _padded(model, [JAPAN.prompt, NILE.prompt], "right")
    target = continuation(model.tokenizer, model.view.encode(JAPAN.prompt), JAPAN.target)
    with model.session([[made[name] for name in made], made["codebook"]]):
        model.generate(ids, attention_mask=mask, **GREEDY)
        model.generate(ids, attention_mask=mask, num_beams=2, **GREEDY)
        model.view.score([(ids[0].tolist(), target)] * 2)
        model(ids, attention_mask=mask)
        assert _state(model) == before
        with pytest.raises(OptionError):
            model(ids[:1])
        assert _state(model) == before
    assert _state(model) == before
    assert not model._base


def test_gradients_flow_through_a_session(kinds):
    """What is carried beside takes part in a graph as rewritten weights do."""
    model, patch = kinds[0], kinds[1]["low-rank"]
    embedding = model.model.get_input_embeddings()
    row = model.view.encode(JAPAN.prompt).ids

    def gradient():
        """Of one logit, with respect to what the embedding puts out."""
        seen = []
        hook = embedding.register_forward_hook(
            lambda module, args, output: seen.append(output.requires_grad_())
        )
        run = model.view.run([row], logits_at=[(0, len(row) - 1)], grad=True)
        hook.remove()
        return torch.autograd.grad(run.logits_MV[0, 5], seen[0])[0]

    with model.session([patch]):
        beside = gradient()
    with model.applied(patch):
        assert _near(beside, gradient())
    assert not _near(beside, gradient())
    assert all(parameter.grad is None for parameter in model.model.parameters())


# -- 8 bits ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight(folder):
    """The model of the fixture `folder`, with weights in 8 bits."""
    pytest.importorskip("torchao", reason="8-bit weights need torchao: knowpatch[quant]")
    return load(str(folder), dtype="8bit")


def _stored(model):
    """The numbers of every weight of a model in 8 bits."""
    return {n: tensor_digest(model.view.values(n)) for n, _ in model.model.named_parameters()}


def test_8_bit_weights_are_not_rewritten(eight):
    """`apply` is refused in one line that says how else; nothing is live, no weight moves."""
    before = _stored(eight)
    patch = _patch(eight, _at(eight, "mlp.out", 1, "low-rank", size=0.5))
    with pytest.raises(PatchError, match="carry the patch in a session, or load the model") as said:
        eight.apply(patch)
    _one_line(said)
    assert not eight.live
    assert _stored(eight) == before


def test_8_bit_weights_carry_patches_beside(eight):
    """A session and `applied` change the answer by what the change adds; weights stay."""
    assert eight.view.quantised
    before, base = _stored(eight), _logits(eight)
    patch = _patch(eight, _at(eight, "mlp.out", 1, "dense", size=0.3))
    with eight.session([patch]):
        beside = _logits(eight)
    with eight.applied(patch):
        assert torch.equal(_logits(eight), beside)
    with eight.trying(patch.deltas):
        tried = _logits(eight)
    slack = 1e-3 if eight.view.embedding.dtype == torch.float32 else 0.5
    assert (beside - tried).abs().max() < slack
    assert (beside - base).abs().max() > 2 * slack
    assert torch.equal(_logits(eight), base)
    assert _stored(eight) == before


def test_8_bit_rows_carry_their_own(eight):
    """In a mixed batch each row says what it says in a session of its own."""
    rows = [_patch(eight, _at(eight, "mlp.out", 1, "low-rank", size=0.5)), None]
    prompts = [JAPAN.prompt, JAPAN.prompt]
    ids, mask = _padded(eight, prompts, "left")
    with eight.session(rows):
        together = _said(eight, eight.generate(ids, attention_mask=mask, **GREEDY), ids.shape[1])
    alone = []
    for row in rows:
        with eight.session([row]):
            alone += _said(eight, eight.generate(ids[:1], **GREEDY), ids.shape[1])
    assert together == alone
    assert alone[0] != alone[1]


def test_an_edit_works_on_8_bit_weights(eight):
    """A codebook is made on such a model, answers in a session and live, and leaves with it."""
    before, base = _stored(eight), eight.ask(FRANCE.prompt, max_new_tokens=1)
    patch = edit(eight, FRANCE, method="grace", options={"layer": 2})
    assert _stored(eight) == before
    assert base != FRANCE.target
    with eight.session([patch]):
        assert eight.ask(FRANCE.prompt, max_new_tokens=1) == FRANCE.target
        assert eight.ask(TWO, max_new_tokens=1) == "four"
    eight.apply(patch)
    assert eight.ask(FRANCE.prompt, max_new_tokens=1) == FRANCE.target
    eight.drop(patch.id)
    assert eight.ask(FRANCE.prompt, max_new_tokens=1) == base
    assert _stored(eight) == before
