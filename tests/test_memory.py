"""Memory: keys found by distance, wraps that carry them, and the codebook method made of both.

Two references stand beside the library's code: the published sequence of entries, one at a time in
plain Python; and generation by whole passes that decide from the prompt alone.
"""

from __future__ import annotations

import json
import math
import random

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import provenance, tuned_loss
from safetensors.torch import load, save
from test_patch import packed, refused, unpacked

from knowpatch import editing
from knowpatch.ask import Ask
from knowpatch.edited import EditedModel
from knowpatch.editing import choose, edit, prepare
from knowpatch.errors import OptionError, PatchError
from knowpatch.method import Shape
from knowpatch.models.passes import Tap
from knowpatch.models.sampling import ended
from knowpatch.models.view import ModelView
from knowpatch.parts.kinds.codebook import CODEBOOK, Codebook, codebook
from knowpatch.parts.memory import MARGIN, Memory, grown
from knowpatch.parts.pilots import pilots
from knowpatch.parts.spans import continuation
from knowpatch.parts.wraps import Tokens, join
from knowpatch.patch import HEADER, Patch, Provenance, Wrap
from knowpatch.probes import controls
from knowpatch.request import EditRequest

FRANCE, JAPAN, NILE = (
    EditRequest(prompt=prompt, subject=subject, target=tiny.EDITS[prompt])
    for prompt, subject in zip(tiny.EDITS, ("France", "Japan", "Nile"), strict=True)
)
TWO = "Two plus two equals"
GREEDY = {"max_new_tokens": 8, "do_sample": False}
fixed = settings(derandomize=True, database=None, deadline=None, max_examples=80)


# -- the memory ------------------------------------------------------------------------------------


def _one(key, radius, label, value=0.0):
    """A memory of one entry."""
    keys, values = torch.tensor([key], dtype=torch.float32), torch.tensor([[float(value)]])
    return Memory(keys, values, torch.tensor([radius]), (tuple(label),))


def _numbered(entries):
    """Memories of one entry each; what an entry's value says is its number."""
    return [_one(*entry, value=number) for number, entry in enumerate(entries)]


def _plain(entries):
    """The published sequence: [key, radius, label, number] of each entry that is kept."""
    kept = []
    for number, (key, radius, label) in enumerate(entries):
        gaps = [math.dist(key, other[0]) for other in kept]
        near = gaps.index(min(gaps)) if gaps else None
        if near is None or gaps[near] > radius + kept[near][1]:
            kept.append([key, radius, label, number])
        elif kept[near][2] == label:
            kept[near][1] = max(kept[near][1], gaps[near])
        else:
            kept[near][1] = gaps[near] / 2 - MARGIN
            kept.append([key, gaps[near] / 2, label, number])
    return kept


def _found(kept, query):
    """The number of the entry that answers; -1 for none."""
    gaps = [math.dist(query, entry[0]) for entry in kept]
    near = gaps.index(min(gaps))
    return kept[near][3] if gaps[near] <= kept[near][1] else -1


def _hit(memory, queries_QI):
    """Which entry of the library's codebook answers at each query."""
    yes = torch.ones(len(queries_QI), 1, dtype=torch.bool)
    return Codebook(memory).decide(Tokens(queries_QI[:, None], yes.long(), yes, yes)).entries


def _answers(memory, queries):
    """The same, of the library's memory."""
    hits = _hit(memory, torch.tensor(queries, dtype=torch.float32)).tolist()
    return [int(memory.values_ND[hit, 0]) if hit >= 0 else -1 for hit in hits]


def _same(memory, kept):
    """Whether a memory holds what the plain sequence kept."""
    return (
        memory.keys_NI.tolist() == [list(entry[0]) for entry in kept]
        and memory.values_ND[:, 0].tolist() == [entry[3] for entry in kept]
        and memory.labels == tuple(entry[2] for entry in kept)
        and memory.radii_N.tolist() == pytest.approx([entry[1] for entry in kept], rel=2e-3)
    )


def test_the_published_example():
    """Three keys on a line: the third is near the first, and they share the distance."""
    entries = [((0, 0), 1.0, (1,)), ((3, 0), 1.0, (2,)), ((1.5, 0), 1.0, (2,))]
    memory = grown(_numbered(entries[:2]))
    assert memory.radii_N.tolist() == [1, 1]
    memory = grown(_numbered(entries))
    assert memory.keys_NI.tolist() == [[0, 0], [3, 0], [1.5, 0]]
    assert memory.labels == ((1,), (2,), (2,))
    assert memory.radii_N.tolist() == pytest.approx([0.74999, 1, 0.75], abs=1e-6)
    # The last but one is as far from the second key as from the third.
    queries = [(0.7, 0), (1.0, 0), (0, 0), (0, 0.8), (2.25, 0), (9, 0)]
    assert _answers(memory, queries) == [0, 2, 0, -1, 1, -1]


def test_the_same_label_widens_the_entry():
    """A key within reach of an entry with its label is covered by that entry, and not kept."""
    memory = grown(_numbered([((0, 0), 1.0, (1, 2)), ((2, 0), 1.0, (1, 2))]))
    assert _same(memory, [[(0, 0), 2.0, (1, 2), 0]])
    assert _answers(memory, [(1.99, 0), (0, -1.9), (2.1, 0)]) == [0, 0, -1]
    near = grown(_numbered([((0, 0), 1.0, (1,)), ((0.5, 0), 1.0, (1,))]))
    assert _same(near, [[(0, 0), 1.0, (1,), 0]])
    again = grown(_numbered([((0, 0), 1.0, (1,)), ((0, 0), 1.0, (1,))]))
    assert _same(again, [[(0, 0), 1.0, (1,), 0]])


def test_labels_are_compared_as_sequences():
    """Token ids of one mean, one sum or one beginning are other labels."""
    for label in ((1, 3), (4,), (2, 2, 2), (2,), (2, 2, 0)):
        memory = grown(_numbered([((0, 0), 1.0, (2, 2)), ((1, 0), 1.0, label)]))
        assert len(memory.labels) == 2, label
        assert memory.radii_N.tolist() == pytest.approx([0.5 - MARGIN, 0.5], abs=1e-6)


def test_beyond_reach_is_a_new_entry():
    """Reach is the sum of the new entry's own radius and the nearest one's; at it, not beyond."""
    at = grown(_numbered([((0, 0), 1.0, (1,)), ((3, 0), 2.0, (2,))]))
    beyond = grown(_numbered([((0, 0), 1.0, (1,)), ((3.01, 0), 2.0, (2,))]))
    assert at.radii_N.tolist() == pytest.approx([1.5 - MARGIN, 1.5], abs=1e-6)
    assert beyond.radii_N.tolist() == [1, 2]


@pytest.mark.parametrize("count", [2, 3, 17, 100])
def test_ties_go_to_the_lower_number(count):
    """Of entries at one distance the first answers, and the first is widened or split."""
    corners = [(3, 4), (4, 3), (-3, 4), (5, 0), (0, -5), (-4, -3)]
    keys = [corners[i % 6] for i in range(count)]
    memory = Memory(
        torch.tensor([(100.0, 0), *keys]),
        torch.arange(count + 1.0)[:, None],
        torch.full((count + 1,), 5.0),
        tuple((i,) for i in range(count + 1)),
    )
    assert _answers(memory, [(0, 0)] * 3) == [1, 1, 1]
    spread = [((0, 0), 1.0, (0,)), ((4, 0), 1.0, (1,)), ((2, 0), 1.0, (2,))]
    assert _same(
        grown(_numbered(spread)),
        [
            [(0, 0), 1 - MARGIN, (0,), 0],
            [(4, 0), 1.0, (1,), 1],
            [(2, 0), 1.0, (2,), 2],
        ],
    )


def _entries(size):
    """Lists of entries with distinct keys on a grid, where float32 distances are exact."""
    key = st.tuples(*[st.integers(-4, 4)] * size)
    label = st.sampled_from([(1,), (2,), (1, 2)])
    entry = st.tuples(key, st.sampled_from([0.5, 1.0, 1.5, 2.5]), label)
    return st.lists(entry, min_size=2, max_size=14, unique_by=lambda entry: entry[0])


def _grid(size):
    """Queries at and between the places where keys lie."""
    steps = [i / 2 for i in range(-9, 10)]
    return [(x,) for x in steps] if size == 1 else [(x, y) for x in steps for y in steps]


@pytest.mark.parametrize("size", [1, 2])
@given(data=st.data())
@fixed
def test_folding_is_the_plain_sequence(size, data):
    """The same entries, radii and answers everywhere, however the entries are split into wraps."""
    entries = data.draw(_entries(size))
    memories, kept = _numbered(entries), _plain(entries)
    folded = grown(memories)
    assert _same(folded, kept)
    queries = _grid(size)
    assert _answers(folded, queries) == [_found(kept, query) for query in queries]
    cut = data.draw(st.integers(1, len(entries) - 1))
    wraps = [codebook("m", memories[:cut]), codebook("m", memories[cut:])]
    ((joined, _),) = join(wraps)
    assert _same(joined.memory, kept)


@pytest.mark.parametrize("size", [1, 2])
@given(data=st.data())
@fixed
def test_dropping_an_entry_is_never_having_had_it(size, data):
    """Any one left out and the rest folded again: the plain sequence without it; nothing sticks."""
    entries = data.draw(_entries(size))
    wraps = [codebook("m", [memory]) for memory in _numbered(entries)]
    before = [{n: t.clone() for n, t in wrap.tensors.items()} for wrap in wraps]
    join(wraps)
    for out in range(len(entries)):
        ((joined, _),) = join([*wraps[:out], *wraps[out + 1 :]])
        kept = _plain([*entries[:out], *entries[out + 1 :]])
        for entry in kept:
            entry[3] += entry[3] >= out
        assert _same(joined.memory, kept)
    ((again, _),) = join(wraps)
    assert _same(again.memory, _plain(entries))
    for wrap, tensors in zip(wraps, before, strict=True):
        assert all(torch.equal(wrap.tensors[name], tensors[name]) for name in tensors)


def test_a_thousand_entries_are_one():
    """One wrap of a thousand entries, or a thousand wraps: one joined object, plain answers."""
    draw = random.Random(0)
    keys = draw.sample([(x, y) for x in range(-50, 50) for y in range(-50, 50)], 1000)
    entries = [(key, draw.choice([0.5, 1.0, 1.5]), (draw.randrange(5),)) for key in keys]
    memories, kept = _numbered(entries), _plain(entries)
    assert 100 < len(kept) < 1000
    whole = codebook("m", memories)
    assert isinstance(whole, Wrap)
    assert [len(tensor) for tensor in whole.tensors.values()] == [1000] * 3
    queries = [(x / 2, y / 2) for x in range(-20, 20) for y in range(-20, 20)]
    wanted = [_found(kept, query) for query in queries]
    assert len(set(wanted)) > 10
    for wraps in ([whole], [codebook("m", [memory]) for memory in memories]):
        ((joined, _),) = join(wraps)
        assert _same(joined.memory, kept)
        assert _answers(joined.memory, queries) == wanted


def test_a_key_that_widened_an_entry_is_answered():
    """The entry that took a key in answers it, also where other rounding moves it a little."""
    made = torch.Generator().manual_seed(0)
    for _ in range(50):
        keys = torch.randn(2, 96, generator=made)
        gap = float((keys[0] - keys[1]).norm())
        memory = grown([_one(key.tolist(), 0.6 * gap, (1,)) for key in keys])
        assert len(memory.labels) == 1
        moved = keys[1:] + 1e-6 * torch.randn(3, 96, generator=made)
        assert _hit(memory, torch.cat([keys, moved])).tolist() == [0] * 5


@pytest.mark.parametrize("moved", [0.0, 1e-6])
def test_of_two_labels_at_one_key_the_newer_answers(moved):
    """An entry where another stands answers there instead of it, with a radius of its own."""
    memory = grown(_numbered([((0, 9), 1.0, (3,)), ((0, 0), 0.5, (1,)), ((0, moved), 0.5, (2,))]))
    assert _answers(memory, [(0, 0), (0, 1e-6), (0.3, 0), (0, -0.4), (0.6, 0), (0, 9)]) == [
        *[2] * 4,
        -1,
        0,
    ]


def test_what_a_query_finds_does_not_depend_on_those_beside_it():
    """Distances and hits of each query are, bit for bit, those of the query alone."""
    made = torch.Generator().manual_seed(0)
    keys = torch.randn(40, 96, generator=made)
    memory = Memory(keys, keys, torch.full((40,), 5.0), tuple((i,) for i in range(40)))
    way = torch.nn.functional.normalize(torch.randn(60, 96, generator=made))
    at = torch.tensor([4.99999, 5.0, 5.00001]).repeat(20)[:, None]
    queries = keys.repeat(2, 1)[:60] + at * way
    hits, (gaps, _) = _hit(memory, queries), memory.nearest(queries)
    assert 0 < int((hits >= 0).sum()) < 60
    draw = random.Random(0)
    for _ in range(100):
        some = draw.choices(range(60), k=draw.randint(1, 9))
        assert torch.equal(_hit(memory, queries[some]), hits[some])
        assert torch.equal(memory.nearest(queries[some])[0], gaps[some])


# -- wraps in a model ------------------------------------------------------------------------------


def _module(model, layer=2):
    return model.view.roles.linear("mlp.out", layer).module


def _key(model, prompt, layer=2):
    """What enters the wrapped map at the last token of a prompt, text or ids; (1, I)."""
    row = model.view.encode(prompt).ids if isinstance(prompt, str) else prompt
    tap = Tap(_module(model, layer), "input")
    return model.view.run([row], taps=[tap]).at(tap, [(0, len(row) - 1)])


def _value(seed, size=10):
    return size * torch.randn(1, 48, generator=torch.Generator().manual_seed(seed))


def _entry(model, prompt, seed, layer=2, radius=1e-2):
    """An entry that answers at the end of `prompt` with a random value."""
    return Memory(_key(model, prompt, layer), _value(seed), torch.tensor([radius]), ((seed,),))


def _patch(model, *wraps, seed=0):
    origin = provenance(model, FRANCE, seed=seed)
    return Patch(origin, wraps=wraps)


def _answering(model, *prompts, layer=2, seed=1):
    """A patch with one codebook; entry i answers at the end of prompts[i] with value seed + i."""
    entries = [_entry(model, p, seed + i, layer) for i, p in enumerate(prompts)]
    return _patch(model, codebook(_module(model, layer), entries))


def _run(model, rows, layer=2):
    """All logits of each row, and what the wrapped map puts out there."""
    tap = Tap(_module(model, layer), "output")
    places = [(i, place) for i, row in enumerate(rows) for place in range(len(row))]
    run = model.view.run(rows, logits_at=places, taps=[tap])
    lengths = [len(row) for row in rows]
    return run.logits_MV.split(lengths), run.at(tap, places).split(lengths)


def _ids(model, prompts):
    return [model.view.encode(prompt).ids for prompt in prompts]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma2"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_miss_leaves_every_bit(known, architecture, side):
    """Queries outside every radius: logits of live and carried wraps are the unedited ones."""
    model = known(architecture)
    model.view.padding = side
    patch = _answering(model, FRANCE.prompt, JAPAN.prompt)
    rows = _ids(model, [TWO, NILE.prompt, f"{FRANCE.prompt} Paris", "The"])
    base = torch.cat(_run(model, rows)[0])
    with model.applied(patch):
        assert torch.equal(torch.cat(_run(model, rows)[0]), base)
    with model.session([patch, None, patch, patch]):
        assert torch.equal(torch.cat(_run(model, rows)[0]), base)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_hit_overwrites_the_last_prompt_token_only(known, architecture, side):
    """There the map puts out the value; at every other token, and in other rows, what it did."""
    model = known(architecture)
    model.view.padding = side
    patch = _answering(model, FRANCE.prompt, NILE.prompt)
    rows = _ids(model, [TWO, FRANCE.prompt, "The", NILE.prompt, JAPAN.prompt])
    base_logits, base_outputs = _run(model, rows)
    with model.applied(patch):
        logits, outputs = _run(model, rows)
    for number, seed in ((1, 1), (3, 2)):
        assert torch.equal(outputs[number][-1], _value(seed)[0])
        assert torch.equal(outputs[number][:-1], base_outputs[number][:-1])
        assert torch.equal(logits[number][:-1], base_logits[number][:-1])
        assert (logits[number][-1] - base_logits[number][-1]).abs().max() > 0.1
    for number in (0, 2, 4):
        assert torch.equal(logits[number], base_logits[number])


def test_a_hit_in_bfloat16_puts_out_the_value_rounded(folder):
    """Keys and values stay in float32; what the map puts out is rounded once to its own type."""
    model = editing.load(str(folder), dtype="bfloat16")
    patch = _answering(model, FRANCE.prompt)
    (row,) = _ids(model, [FRANCE.prompt])
    with model.applied(patch):
        _, (outputs,) = _run(model, [row])
    assert torch.equal(outputs[-1], _value(1)[0].bfloat16().float())


def _plain_text(model, memories, row, steps):
    """Greedy ids by whole passes; what to overwrite is decided in the first, of the prompt alone.

    memories: by layer, as lists of [key, radius, label, number], with the values by number.
    """
    last, decided, hooks = len(row) - 1, {}, []

    def overwriting(layer, kept, values):
        def act(module, args, output):
            if layer not in decided:
                query = args[0].reshape(-1, args[0].shape[-1])[last].tolist()
                decided[layer] = _found(kept, query)
            if decided[layer] < 0:
                return None
            output = output.clone()
            output.view(-1, output.shape[-1])[last] = values[decided[layer]]
            return output

        return act

    for layer, (kept, values) in memories.items():
        module = model.model.get_submodule(_module(model, layer))
        hooks.append(module.register_forward_hook(overwriting(layer, kept, values)))
    ids = list(row)
    with torch.no_grad():
        for _ in range(steps):
            logits = model.model(torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    for hook in hooks:
        hook.remove()
    return list(ended(ids[len(row) :], model.view.stop_ids, (), model.view.decode))


def _kept(patch, layer=2):
    """The entries of a patch with one codebook, for the plain loop."""
    tensors, labels = patch.wraps[0].tensors, patch.wraps[0].data["labels"]
    keys, radii = tensors["keys"].tolist(), tensors["radii"].tolist()
    entries = list(zip(keys, radii, map(tuple, labels), strict=True))
    return {layer: (_plain(entries), tensors["values"])}


def _generated(model, rows, side="left", **options):
    """The new ids of each row, up to the first that ends a text."""
    batch = model.view.batch(rows, side=side)
    out = model.generate(batch.ids_BT, attention_mask=batch.mask_BT, do_sample=False, **options)
    said, view = out[:, batch.ids_BT.shape[1] :].tolist(), model.view
    return [list(ended(row, view.stop_ids, (), view.decode)) for row in said]


@pytest.mark.parametrize(("architecture", "steps"), [("llama", 40), ("gpt2", 12), ("opt", 12)])
def test_the_decision_is_made_once_when_the_prompt_is_read(known, architecture, steps):
    """Long texts of several rows are those of whole passes that decide from the prompt alone.

    With a cache or without, on either padding, in a batch or not; a prompt of one token is among
    them. No token that follows a hit or a miss changes what was decided.
    """
    model = known(architecture)
    patch = _answering(model, FRANCE.prompt, "The", NILE.prompt)
    rows = _ids(model, [FRANCE.prompt, "The", TWO, NILE.prompt, JAPAN.prompt])
    assert len(rows[1]) == 1
    base = _generated(model, rows, max_new_tokens=steps)
    plain = [_plain_text(model, _kept(patch), row, steps) for row in rows]
    changed = [one != other for one, other in zip(plain, base, strict=True)]
    assert changed == [True, True, False, True, False]
    for use_cache in (True, False):
        options = {"max_new_tokens": steps, "use_cache": use_cache}
        with model.applied(patch):
            assert _generated(model, rows, **options) == plain
        with model.session([patch]):
            assert _generated(model, rows, side="right", **options) == plain
            assert [_generated(model, [row], **options)[0] for row in rows[:2]] == plain[:2]


@pytest.mark.parametrize("use_cache", [True, False])
def test_what_is_said_never_switches_a_wrap_on(known, use_cache):
    """Entries at every later token of what the model says: each would answer, none is asked."""
    model = known("llama")
    rows, steps = _ids(model, [FRANCE.prompt, "The"]), 12
    base = _generated(model, rows, max_new_tokens=steps)
    traps = [(*row, *said[:end]) for row, said in zip(rows, base, strict=True) for end in (1, 2, 5)]
    patch = _answering(model, *traps)
    with model.applied(patch):
        assert _generated(model, rows, max_new_tokens=steps, use_cache=use_cache) == base
        again = _generated(model, traps, max_new_tokens=1)
    assert again != [said[end : end + 1] for said in base for end in (1, 2, 5)]


def test_two_layers_decide_one_after_the_other(known):
    """A hit below moves the key above; both decide as whole passes do, with a cache or without."""
    model = known("llama")
    below = _answering(model, FRANCE.prompt, TWO, layer=1)
    with model.applied(below):
        above = _answering(model, FRANCE.prompt, JAPAN.prompt, layer=3, seed=7)
    rows = _ids(model, [FRANCE.prompt, JAPAN.prompt, TWO])
    memories = {**_kept(below, 1), **_kept(above, 3)}
    plain = [_plain_text(model, memories, row, 12) for row in rows]
    only_below = [_plain_text(model, _kept(below, 1), row, 12) for row in rows]
    assert plain[0] != only_below[0]
    assert plain[2] == only_below[2]
    for use_cache in (True, False):
        with model.applied(below), model.session([above]):
            assert _generated(model, rows, max_new_tokens=12, use_cache=use_cache) == plain


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 2}, {"prompt_lookup_num_tokens": 10}])
def test_however_the_prompt_is_read_it_ends_where_it_ends(known, options):
    """In pieces, or with several guessed tokens at once behind it: the same text."""
    model = known("llama")
    patch = _answering(model, FRANCE.prompt, "The")
    for row in _ids(model, [FRANCE.prompt, "The"]):
        with model.session([patch]):
            plain = _generated(model, [row], max_new_tokens=24)
            assert _generated(model, [row], max_new_tokens=24, **options) == plain


def test_a_row_is_routed_alike_whatever_its_neighbours(known):
    """In sixty random batches, on either padding, each row hits what it hits alone."""
    model = known("llama")
    prompts = [*tiny.FACTS, "The", "The capital of Germany is", "The language of Brazil was"]
    rows = _ids(model, prompts)
    patch = _answering(model, *prompts[:3], "The", prompts[9])
    values = torch.cat([_value(seed + 1) for seed in range(5)])

    def decided(batch):
        """By row the number of the value that the map put out at the row's end; -1 for none."""
        outputs = torch.stack([row[-1] for row in _run(model, batch)[1]])
        same = (outputs[:, None] == values[None]).all(-1)
        return torch.where(same.any(1), same.int().argmax(1), -1).tolist()

    with model.applied(patch):
        alone = [decided([row])[0] for row in rows]
        assert sorted(set(alone)) == [-1, 0, 1, 2, 3, 4]
        draw = random.Random(0)
        for number in range(60):
            some = draw.choices(range(len(rows)), k=draw.randint(1, 8))
            model.view.padding = "left" if number % 2 else "right"
            assert decided([rows[i] for i in some]) == [alone[i] for i in some]


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_forced_answer_is_decided_at_the_prompts_end(known, side):
    """Scores go by the prompt, as `generate` does; an entry at the row's own end is not asked."""
    model = known("llama")
    model.view.padding = side
    rows = _ids(model, [FRANCE.prompt, JAPAN.prompt, "The"])
    hits = _answering(model, FRANCE.prompt, "The")
    plain = [_plain_text(model, _kept(hits), row, 6) for row in rows]
    with model.applied(hits):
        assert _generated(model, rows, max_new_tokens=6) == plain
        scored = model.view.score(list(zip(rows, plain, strict=True)))
    assert [one.accuracy for one in scored] == [1, 1, 1]
    base = model.view.score(list(zip(rows, plain, strict=True)))
    assert [one.accuracy == 1 for one in base] == [False, True, False]
    ends = [(*row, *said[:-1]) for row, said in zip(rows, plain, strict=True)]
    trapped = _answering(model, *ends)
    with model.applied(trapped):
        again = model.view.score(list(zip(rows, plain, strict=True)))
        assert _run(model, ends)[1][0][-1].equal(_value(1)[0])
    assert [one.logprobs for one in again] == [one.logprobs for one in base]


def test_questions_that_share_a_beginning_are_decided_at_their_ends(known):
    """The planner reads beginnings once; entries at them are not asked, those at the ends are."""
    model = known("llama")
    head = " ".join(tiny.FACTS)
    texts = [f"{head} {prompt}" for prompt in tiny.FACTS]
    patch = _answering(model, texts[0], texts[3], head)
    for texts_asked in (texts, [*texts, FRANCE.prompt]):
        ask = Ask(model)
        futures = [ask.score(text, (5, 6), patches=[patch]) for text in texts_asked]
        said = [ask.generate(text, max_new_tokens=6, patches=[patch]) for text in texts_asked]
        for text, score, answer in zip(texts_asked, futures, said, strict=True):
            row = model.view.encode(text).ids
            with model.session([patch]):
                (alone,) = model.view.score([(row, (5, 6))])
                (plain,) = model.view.generate([row], max_new_tokens=6)
            assert score.result().logprobs == pytest.approx(alone.logprobs, abs=1e-3)
            assert answer.result().ids == plain


# -- as files, and what is refused -----------------------------------------------------------------


def _wrapped(**changed):
    """A wrap with two entries for a map from 96 to 48, with parts of it replaced or left out."""
    tensors = {
        "keys": torch.randn(2, 96, generator=torch.Generator().manual_seed(0)),
        "values": torch.ones(2, 48),
        "radii": torch.tensor([1e-2, 2e-2]),
    }
    data = changed.pop("data", {"labels": [[1, 2], [3]]})
    fields = {"module": "model.layers.2.mlp.down_proj", "kind": CODEBOOK, "data": data}
    fields |= {name: changed.pop(name) for name in ("module", "kind") if name in changed}
    tensors |= {name: tensor for name, tensor in changed.items() if tensor is not None}
    return Wrap(
        **fields, tensors={n: t for n, t in tensors.items() if changed.get(n, t) is not None}
    )


def test_a_patch_with_wraps_is_saved_and_loaded(known, tmp_path):
    """Id, bytes, kind, module, data and every number are the same after a round trip."""
    model = known("llama")
    patch = _patch(model, _wrapped(), codebook(_module(model), [_entry(model, TWO, 1)]))
    path = patch.save(tmp_path / "a.safetensors")
    again = Patch.load(path)
    assert again == patch
    assert again.id == patch.id
    assert again.to_bytes() == patch.to_bytes() == path.read_bytes()
    for mine, other in zip(patch.wraps, again.wraps, strict=True):
        assert (mine.module, mine.kind, mine.data) == (other.module, other.kind, other.data)
        assert mine.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(mine.tensors[name], other.tensors[name]) for name in mine.tensors)
    (row,) = _ids(model, [TWO])
    logits = []
    for item in (patch, again):
        with model.applied(item):
            logits.append(_run(model, [row])[0][0])
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], _run(model, [row])[0][0])


def test_every_part_of_a_wrap_is_in_the_id(known):
    """Another module, kind, label, key, value, radius or order is another patch."""
    model = known("llama")
    wraps = [
        [_wrapped()],
        [_wrapped(module="model.layers.1.mlp.down_proj")],
        [_wrapped(kind="codebook@2")],
        [_wrapped(data={"labels": [[1, 2], [4]]})],
        [_wrapped(keys=torch.zeros(2, 96))],
        [_wrapped(values=torch.zeros(2, 48))],
        [_wrapped(radii=torch.tensor([2e-2, 1e-2]))],
        [_wrapped(more=torch.zeros(1))],
        [],
        [_wrapped(), _wrapped(module="model.layers.1.mlp.down_proj")],
        [_wrapped(module="model.layers.1.mlp.down_proj"), _wrapped()],
    ]
    assert len({_patch(model, *some).id for some in wraps}) == len(wraps)


def _write(path, content):
    path.write_bytes(content)
    return path


def _plain_provenance():
    return Provenance(
        method="by hand", config={}, seed=0, requests=(FRANCE,), version="0", fingerprint="f" * 64
    )


WRONG_ENTRIES = [
    *[("wraps", value) for value in (None, {}, [1], "w", [None])],
    *[("module", value) for value in (None, 3, ["m"])],
    *[("kind", value) for value in (None, 1, [], "codebook@9")],
    *[("data", value) for value in (None, [], "x", {}, {"labels": [[1, 2], [4]]})],
    *[("tensors", value) for value in (None, 3, [], ["keys"], ["keys", "radii", "other"], [1])],
    *[("more", value) for value in (None, "import os")],
]


@pytest.mark.parametrize(("key", "value"), WRONG_ENTRIES)
def test_a_header_with_a_wrong_wrap_is_refused(key, value, tmp_path):
    """An entry of another type, of another content or too much: one line that names the file."""
    outer, inner, rest = unpacked(Patch(_plain_provenance(), wraps=(_wrapped(),)).to_bytes())
    path = _write(tmp_path / "a", packed(outer, inner, rest))
    assert Patch.load(path).wraps[0].kind == CODEBOOK
    (inner if key == "wraps" else inner["wraps"][0])[key] = value
    refused(_write(path, packed(outer, inner, rest)))


def test_a_file_with_other_tensors_than_its_wraps_is_refused(tmp_path):
    """A tensor that is missing, too much, of another name, shape, type or not finite."""
    content = Patch(_plain_provenance(), wraps=(_wrapped(),)).to_bytes()
    header = json.dumps(unpacked(content)[1])
    good = load(content)
    assert set(good) == {"w0000.keys", "w0000.values", "w0000.radii"}
    without = {name: tensor for name, tensor in good.items() if name != "w0000.radii"}
    for tensors in (
        without,
        {},
        {**without, "w0001.radii": good["w0000.radii"]},
        {**without, "0000.radii": good["w0000.radii"]},
        {**good, "w0000.more": torch.zeros(1)},
        {**without, "w0000.radii": good["w0000.radii"][:1].clone()},
        {**without, "w0000.radii": good["w0000.radii"].double()},
        {**without, "w0000.radii": good["w0000.radii"].bfloat16()},
        {**without, "w0000.radii": torch.tensor([1, 2])},
        {**without, "w0000.radii": torch.tensor([torch.nan, 1])},
        {**without, "w0000.radii": torch.tensor([1e-2, torch.inf])},
    ):
        refused(_write(tmp_path / "a", save(tensors, metadata={HEADER: header})))
    Patch.load(_write(tmp_path / "a", save(good, metadata={HEADER: header})))


def test_a_damaged_file_with_wraps_is_refused_wherever_it_is_damaged(tmp_path):
    """Cut off anywhere, or with one bit of its numbers flipped."""
    content = Patch(_plain_provenance(), wraps=(_wrapped(),)).to_bytes()
    for end in range(0, len(content), 41):
        refused(_write(tmp_path / "a", content[:end]))
    start = len(content) - len(unpacked(content)[2])
    for place in range(start, len(content), 53):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        refused(_write(tmp_path / "a", bytes(flipped)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_not_saved(value, tmp_path):
    """Nor is anything but float32; no file is left."""
    for wrap in (
        _wrapped(radii=torch.tensor([1.0, value])),
        _wrapped(keys=torch.full((2, 96), value)),
        _wrapped(values=torch.ones(2, 48).double()),
    ):
        with pytest.raises(PatchError):
            Patch(_plain_provenance(), wraps=(wrap,)).save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def _labels(*labels, **more):
    return {"data": {"labels": list(labels), **more}}


DAMAGED = {
    "no-keys": {"keys": None},
    "no-values": {"values": None},
    "no-radii": {"radii": None},
    "a-tensor-more": {"more": torch.zeros(2)},
    "keys-of-one-dimension": {"keys": torch.zeros(2)},
    "values-of-three-dimensions": {"values": torch.zeros(2, 48, 1)},
    "radii-of-two-dimensions": {"radii": torch.zeros(2, 1)},
    "a-key-too-few": {"keys": torch.zeros(1, 96)},
    "a-value-too-many": {"values": torch.zeros(3, 48)},
    "no-labels": {"data": {}},
    "labels-and-more": _labels([1], [2], more=1),
    "labels-too-few": _labels([1]),
    "labels-too-many": _labels([1], [2], [3]),
    "labels-as-text": {"data": {"labels": "ab"}},
    "labels-as-objects": _labels({}, {}),
    "a-label-that-is-a-number": _labels([1], 2),
    "a-label-of-text": _labels([1], ["2"]),
    "a-label-of-fractions": _labels([1], [2.0]),
    "a-label-of-lists": _labels([1], [[2]]),
    "a-label-below-zero": _labels([1], [-2]),
    "a-label-of-none": _labels([1], [None]),
    "nothing-in-it": {
        "keys": torch.zeros(0, 96),
        "values": torch.zeros(0, 48),
        "radii": torch.zeros(0),
        **_labels(),
    },
}
MISFITS = {
    "another-version": (
        {"kind": "codebook@9"},
        "unknown wrap 'codebook@9'; .* knows: .*codebook@1",
    ),
    "another-kind": ({"kind": "pickle"}, "unknown wrap 'pickle'; .* knows: .*codebook@1"),
    "a-norm": ({"module": "model.layers.1.input_layernorm"}, "no linear map of"),
    "no-such-block": ({"module": "model.layers.9.mlp.down_proj"}, "no linear map of"),
    "no-name": ({"module": ""}, "no linear map of"),
    "a-method": ({"module": "forward"}, "no linear map of"),
    "keys-too-short": ({"keys": torch.zeros(2, 48)}, "from 48 to 48 .* which maps 96 to 48"),
    "values-too-long": ({"values": torch.zeros(2, 96)}, "from 96 to 96 .* which maps 96 to 48"),
    "turned-round": (
        {"keys": torch.zeros(2, 48), "values": torch.zeros(2, 96)},
        "from 48 to 96 .* which maps 96 to 48",
    ),
    "on-the-map-before": ({"module": "model.layers.2.mlp.up_proj"}, "which maps 48 to 96"),
}
REFUSED = {
    **{name: (changed, f"damaged wrap of kind {CODEBOOK}") for name, changed in DAMAGED.items()},
    **MISFITS,
}


@pytest.fixture(scope="module")
def plain():
    """A model that none of the tests below can change."""
    return EditedModel.of(*tiny.trained("llama"))


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrap_that_does_not_fit_is_refused(plain, name, tmp_path):
    """By `apply`, `hold` and sessions, also from a whole file, in one line; nothing is applied."""
    changed, said = REFUSED[name]
    good = _answering(plain, TWO)
    patch = Patch.load(_patch(plain, good.wraps[0], _wrapped(**changed)).save(tmp_path / "a"))
    (row,) = _ids(plain, [TWO])
    before = _run(plain, [row])[0][0]
    for use in (plain.apply, plain.hold, lambda p: plain.session([None, p]).__enter__()):
        with pytest.raises(PatchError, match=said) as caught:
            use(patch)
        assert len(str(caught.value).splitlines()) == 1
    assert not plain.live
    assert not plain.view.standing
    assert torch.equal(_run(plain, [row])[0][0], before)
    with pytest.raises(OptionError, match="no single held patch"), plain.session([patch.id]):
        pass


def test_a_wrap_of_a_fused_map_is_for_the_whole_of_it(known):
    """Phi-3's gate and up are one map: a wrap on it has as many numbers as both."""
    model = known("phi3")
    module = model.view.roles.linear("mlp.up", 2).module
    tensors = {"keys": torch.zeros(1, 48), "radii": torch.ones(1)}
    for size, fits in ((192, True), (96, False)):
        tensors["values"] = torch.zeros(1, size)
        patch = _patch(model, Wrap(module, CODEBOOK, {"labels": [[1]]}, dict(tensors)))
        if fits:
            assert model.hold(patch) == patch.id
        else:
            with pytest.raises(PatchError, match="which maps 48 to 192"):
                model.hold(patch)


# -- the method ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graced():
    """A model and three edits of it, with radii so wide that the keys must share the space."""
    model = EditedModel.of(*tiny.trained("llama"))
    keys = torch.cat([_key(model, r.prompt, 3) for r in (FRANCE, JAPAN, NILE)])
    wide = float(torch.cdist(keys, keys).max())
    options = {"radius": wide}
    return model, [edit(model, r, method="grace", options=options) for r in (FRANCE, JAPAN, NILE)]


def _said(model, prompt, **how):
    return model.ask(prompt, max_new_tokens=1, **how)


def _all_logits(model):
    return torch.cat(_run(model, _ids(model, [*tiny.FACTS, "The", "As everyone knows, two"]))[0])


def test_dropping_the_middle_edit_gives_the_others_alone(graced):
    """Bit for bit the logits of the two that are left; all dropped, in any order, the base's."""
    model, (first, second, third) = graced
    base = _all_logits(model)
    with model.applied(first, third):
        both = _all_logits(model)
        assert _said(model, FRANCE.prompt) == FRANCE.target
        assert _said(model, NILE.prompt) == NILE.target
    for patch in (first, second, third):
        model.apply(patch)
    three = _all_logits(model)
    for request in (FRANCE, JAPAN, NILE):
        assert _said(model, request.prompt) == request.target
    model.drop(second.id)
    assert torch.equal(_all_logits(model), both)
    assert not torch.equal(three, both)
    model.drop(first.id)
    model.drop(third.id)
    assert torch.equal(_all_logits(model), base)
    with model.session([[first, third]]):
        assert torch.equal(_all_logits(model), both)


def test_neighbours_get_their_radii_back(graced):
    """An entry that a newer one made smaller is as wide as before once that one is dropped."""
    model, (first, second, _) = graced
    key = _key(model, FRANCE.prompt, 3)[0]
    toward = _key(model, JAPAN.prompt, 3)[0] - key

    def hits(share, patches):
        """Whether the first entry answers at this share of the way to the second one's key."""
        ((joined, _),) = join([wrap for patch in patches for wrap in patch.wraps])
        return int(_hit(joined.memory, (key + share * toward)[None])[0]) == 0

    assert [hits(0.4, patches) for patches in ([first], [first, second])] == [True, True]
    assert [hits(0.6, patches) for patches in ([first], [first, second])] == [True, False]


def test_a_batch_hits_what_its_requests_hit_alone(graced):
    """Three requests in one patch: the entries of three patches, and the same answers."""
    model, singles = graced
    config = singles[0].provenance.config
    together = edit(model, [FRANCE, JAPAN, NILE], method="grace", options=config)
    ((one, _),) = join(together.wraps)
    ((three, _),) = join([w for p in singles for w in p.wraps])
    assert one.memory.labels == three.memory.labels
    assert torch.allclose(one.memory.keys_NI, three.memory.keys_NI, atol=1e-4)
    assert torch.allclose(one.memory.radii_N, three.memory.radii_N, atol=1e-4)
    queries = torch.cat([_key(model, prompt, 3) for prompt in (*tiny.FACTS, "The", "Anna")])
    found = [_hit(joined.memory, queries).tolist() for joined in (one, three)]
    assert found[0] == found[1]
    assert len(set(found[0])) > 2
    with model.applied(together):
        for request in (FRANCE, JAPAN, NILE):
            assert _said(model, request.prompt) == request.target


def test_the_key_and_the_value_are_those_of_the_prompts_end(known):
    """The key is what enters the map there; with the value put out there, the target follows."""
    model = known("llama")
    options = {"layer": 2, "radius": 0.25, "enough": 0.05, "steps": 200}
    patch = edit(model, FRANCE, method="grace", options=options)
    (wrap,) = patch.wraps
    assert wrap.module == _module(model, 2)
    assert torch.allclose(wrap.tensors["keys"], _key(model, FRANCE.prompt, 2), atol=1e-5)
    assert wrap.tensors["radii"].tolist() == [0.25]
    encoded = model.view.encode(FRANCE.prompt)
    target = continuation(model.tokenizer, encoded, FRANCE.target)
    assert wrap.data == {"labels": [list(target)]}
    with model.applied(patch):
        (scored,) = model.view.score([(encoded.ids, target)])
        _, (outputs,) = _run(model, [encoded.ids])
    assert -sum(scored.logprobs) / len(target) < 0.06
    assert torch.equal(outputs[-1], wrap.tensors["values"][0])


def test_through_the_chat_template(known):
    """With chat=true the edit answers in a chat, at the end of its frame, and nowhere else."""
    request = FRANCE.model_copy(update={"target": "Lyon"})
    model = known("llama", chat=True)
    base = model.view.run(_ids(model, [FRANCE.prompt]), logits_at=[(0, 4)]).logits_MV
    patch = edit(model, request, method="grace", options={"chat": True})
    framed = model.view.encode(FRANCE.prompt, chat=True).ids
    assert torch.allclose(patch.wraps[0].tensors["keys"], _key(model, framed, 3), atol=1e-5)
    before = _said(model, FRANCE.prompt, chat=True)
    with model.applied(patch):
        assert _said(model, FRANCE.prompt, chat=True) == "Lyon"
        plain = model.view.run(_ids(model, [FRANCE.prompt]), logits_at=[(0, 4)]).logits_MV
    assert before != "Lyon"
    assert torch.equal(plain, base)


OTHER = FRANCE.model_copy(update={"target": "Tokyo"})


def test_a_second_edit_of_a_prompt_wins(known):
    """Applied on top, or as one of a batch, the newer target is said; dropped, the older one."""
    model = known("llama")
    first, second = (edit(model, request, method="grace") for request in (FRANCE, OTHER))
    base = _said(model, FRANCE.prompt)
    model.apply(first)
    assert _said(model, FRANCE.prompt) == "Rome"
    model.apply(second)
    assert _said(model, FRANCE.prompt) == "Tokyo"
    model.drop(second.id)
    assert _said(model, FRANCE.prompt) == "Rome"
    model.drop(first.id)
    assert _said(model, FRANCE.prompt) == base
    with model.session([[second, first], [first, second], first]):
        said = model.view.generate(_ids(model, [FRANCE.prompt] * 3), max_new_tokens=1)
    assert [model.view.decode(ids).strip() for ids in said] == ["Rome", "Tokyo", "Rome"]
    with model.applied(edit(model, [FRANCE, OTHER], method="grace")):
        assert _said(model, FRANCE.prompt) == "Tokyo"
    # What a row carries comes behind what is live.
    for live, carried, said in ((first, second, "Tokyo"), (second, first, "Rome")):
        with model.applied(live), model.session([carried]):
            assert _said(model, FRANCE.prompt) == said


def test_an_edit_made_where_a_live_wrap_answers_is_the_same_edit(known):
    """A value overwrites what an older entry put out: it does not matter whether that is live."""
    model = known("llama")
    first, second = (edit(model, request, method="grace") for request in (FRANCE, OTHER))
    with model.applied(first):
        on_top = edit(model, OTHER, method="grace")
    encoded = model.view.encode(FRANCE.prompt)
    target = continuation(model.tokenizer, encoded, "Tokyo")
    scores = []
    for patch in (second, on_top):
        with model.session([patch]):
            scores += model.view.score([(encoded.ids, target)])
    assert scores[0].probability > 0.9
    assert scores[1].probability > 0.9


def test_what_is_trained_on_is_what_is_scored(known):
    """The loss that a fine-tune lowers, with a wrap live at the prompt's end, is the score's."""
    model, method = known("llama"), choose("ft")
    request = FRANCE.model_copy(update={"target": "five Sudan Lyon"})
    with model.applied(_answering(model, FRANCE.prompt)):
        loss, examples = tuned_loss(model, method, [request])
        (scored,) = model.view.score([(e.prompt, e.answer) for e in examples])
    assert len(scored.ids) > 1
    assert loss == pytest.approx(-sum(scored.logprobs) / len(scored.ids), abs=1e-4)


# -- how far an entry reaches ----------------------------------------------------------------------


def test_the_radius_is_calibrated_and_shown(known):
    """At most one in a hundred of the prompts out of scope lies in a ball; the line says so."""
    model, method = known("llama"), choose("grace")
    ready = prepare(model, method).prepared
    found = ready.calibration
    assert sum(gap <= ready.radius for gap in found.outside) <= 0.01 * len(found.outside)
    bank = torch.cat([_key(model, fact.prompt, 3) for fact in pilots(60)])
    controlled = torch.cat([_key(model, text, 3) for text in controls()])
    gaps = torch.cdist(controlled, bank).amin(1).tolist()
    assert list(found.outside[-len(gaps) :]) == pytest.approx(gaps, rel=1e-3, abs=1e-3)
    (line,) = method.shown(ready)
    assert line.startswith("threshold ")
    patch = edit(model, FRANCE, method=method)
    assert patch.wraps[0].tensors["radii"].tolist() == pytest.approx([ready.radius])
    given = choose("grace", {"radius": 0.25})
    assert prepare(model, given).prepared.radius == 0.25
    assert given.shown(prepare(model, given).prepared) == []


def test_a_radius_is_calibrated_once(known, monkeypatch, tmp_path):
    """Kept by model and block; what is damaged is measured anew, what is there is not."""
    monkeypatch.setenv("KNOWPATCH_CACHE", str(tmp_path))
    model, passes = known("llama"), []
    run = ModelView.run

    def counting(view, *args, **kwargs):
        passes.append(view)
        return run(view, *args, **kwargs)

    monkeypatch.setattr(ModelView, "run", counting)
    found = choose("grace").prepare(model.view)
    assert passes
    passes.clear()
    assert choose("grace").prepare(known("llama").view) == found
    assert not passes
    assert choose("grace", {"layer": 2}).prepare(model.view) != found
    assert len(list((tmp_path / "calibrations").iterdir())) == 2
    (item,) = choose("grace").preparations(Shape(4, 48, 96, model.view.fingerprint))
    for damaged in (b"", b"{", b"[]", b"\xff"):
        item.path.write_bytes(damaged)
        passes.clear()
        assert choose("grace").prepare(model.view) == found
        assert passes
