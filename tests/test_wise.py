"""WISE's side memories: merging, routing, shards that follow every undo, and how one is trained."""

from __future__ import annotations

import pytest
import tiny
import torch
from made import provenance

from knowpatch.editing import choose, edit
from knowpatch.errors import PatchError
from knowpatch.models.sites import listening
from knowpatch.parts.kinds.side import (
    SIDE,
    Sharing,
    Side,
    distances,
    memories,
    next_shard,
    shard_of,
    side,
)
from knowpatch.parts.ties import ties
from knowpatch.parts.wraps import Tokens
from knowpatch.patch import Patch, Wrap
from knowpatch.request import EditRequest

OPTIONS = {"layer": 1, "rate": 0.25, "steps": 60, "share": 0.5}
FRANCE, JAPAN, NILE = (EditRequest(prompt=p, target=t) for p, t in tiny.EDITS.items())


def _wrap(shard, values, key=(0.0, 0), *, threshold=1.0, full=1, merged=2, density=1.0):
    """An edit of all four entries of a copy of a map from 2 to 2."""
    sharing = Sharing(shard, full, merged, density, threshold)
    return side(
        "m", torch.arange(4), torch.tensor(values), torch.tensor([key]), width=2, sharing=sharing
    )


def _tokens(rows):
    """Rows of text tokens behind a first one, padded on the right."""
    longest = max(map(len, rows)) + 2
    inputs_BTI = torch.full((len(rows), longest, 2), 7.0)
    real_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
    first_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
    first_BT[:, 0] = True
    for number, row in enumerate(rows):
        inputs_BTI[number, 1 : len(row) + 1] = torch.tensor(row)
        real_BT[number, : len(row) + 1] = True
    return Tokens(inputs_BTI, torch.zeros(len(rows), longest).long(), real_BT, first_BT)


def test_the_published_merge():
    """Self-check: signs by the weighted sum, then the mean of what agrees."""
    first, second = torch.tensor([1.0, -2, 0, 3]), torch.tensor([2.0, 1, 0, -1])
    assert ties([first, second], 1.0).tolist() == [1.5, -2.0, 0.0, 3.0]
    assert ties([first, second], 0.5).tolist() == [2.0, -2.0, 0.0, 3.0]
    assert torch.equal(ties([first], 1.0), first)


def test_the_published_routing():
    """Self-check: eps = .88 * 10; 8.7 goes to the map, 8.9 to the copy."""
    kind = Side.join([_wrap(0, [1.0, 0, 0, 1], threshold=8.8)])
    tokens = _tokens([[[8.7, 0]], [[0, 8.9]]])
    decision = kind.decide(tokens)
    assert decision.entries.tolist() == [-1, 0]
    assert decision.scores.tolist() == pytest.approx([8.7, 8.9])
    outputs = torch.randn(2, tokens.inputs_BTI.shape[1], 2)
    acted = kind.act(tokens, outputs, decision)
    assert torch.equal(acted[0], outputs[0])
    assert torch.allclose(acted[1], outputs[1] + tokens.inputs_BTI[1])


def test_a_copy_like_the_map_is_never_used():
    kind = Side.join([_wrap(0, [0.0] * 4, threshold=0.0)])
    tokens, outputs = _tokens([[[3.0, 4]]]), torch.randn(1, 3, 2)
    assert torch.equal(kind.act(tokens, outputs, kind.decide(tokens)), outputs)


def test_distances_are_means_over_each_prompts_own_tokens():
    prompts = [torch.tensor([[3.0, 4]]), torch.tensor([[0.0, 1], [0, 3], [0, 5]])]
    assert distances(prompts, torch.eye(2)).tolist() == [5.0, 3.0]
    rows = [[[3.0, 4]], [[0.0, 1], [0, 3], [0, 5]]]
    kind = Side.join([_wrap(0, [1.0, 0, 0, 1])])
    assert kind.decide(_tokens(rows)).scores.tolist() == [5.0, 3.0]
    alone = [kind.decide(_tokens([row])).scores.item() for row in rows]
    assert alone == [5.0, 3.0]


def test_shards_are_sums_and_full_ones_are_merged():
    """Two edits a copy, two copies a memory; what is not yet full stands for itself."""
    changes = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    wraps = [_wrap(n // 2, row.tolist(), full=2, density=0.5) for n, row in enumerate(changes)]
    assert [next_shard(wraps[:n], 2) for n in range(6)] == [0, 0, 1, 1, 2, 2]
    first, second = changes[:2].sum(0), changes[2:4].sum(0)
    assert torch.allclose(shard_of(wraps, 1).flatten(), second)
    (begun, _), (next_, _) = memories(wraps[:3])
    assert torch.allclose(begun.flatten(), first)
    assert torch.allclose(next_.flatten(), changes[2])
    (merged, shards), (last, _) = memories(wraps)
    assert shards == [0, 1]
    assert torch.allclose(merged.flatten(), ties([first, second], 0.5))
    assert torch.allclose(last.flatten(), changes[4])


def test_an_edit_taken_back_leaves_its_shard_to_the_others():
    """Undo is folding: what is left is what it would be without it, shard by shard."""
    wraps = [_wrap(n // 2, [float(n)] * 4, full=2, merged=1) for n in range(4)]
    left = [wraps[0], wraps[2], wraps[3]]
    assert [change.flatten()[0].item() for change, _ in memories(left)] == [0.0, 5.0]
    assert [change.flatten()[0].item() for change, _ in memories(wraps)] == [1.0, 5.0]


def test_the_memory_that_exceeds_its_threshold_most_answers():
    """In proportion, not by size; the least threshold of a copy's edits is the copy's."""
    wraps = [
        _wrap(0, [10.0, 0, 0, 10], threshold=100.0, merged=1),
        _wrap(1, [1.0, 0, 0, 1], key=(0.0, 9.0), threshold=3.0, full=2, merged=1),
        _wrap(1, [1.0, 0, 0, 1], key=(5.0, 0.0), threshold=2.0, full=2, merged=1),
    ]
    kind = Side.join(wraps)
    assert kind.thresholds_M.tolist() == [100.0, 2.0]
    decision = kind.decide(_tokens([[[5.0, 0]], [[0, 5.0]], [[0, 0.5]]]))
    assert decision.entries.tolist() == [2, 1, -1]  # the nearest edit is told, of the same copy
    assert decision.scores.tolist() == [10.0, 10.0, 1.0]
    assert decision.thresholds.tolist() == [2.0, 2.0, 2.0]


def test_damaged_wraps_are_refused(known):
    model = known("llama")
    good = _wrap(0, [0.0] * 4)
    assert Side.check(good) == (2, 2)
    for name, tensor in {
        "entries.index": torch.tensor([0, 1, 2, 4]),
        "values": torch.zeros(3),
        "keys": torch.zeros(0, 2),
    }.items():
        bad = Wrap("m", SIDE, good.data, {**good.tensors, name: tensor})
        with pytest.raises(PatchError, match=r"damaged wrap of kind side@1"):
            model.apply(Patch(provenance(model, FRANCE), wraps=(bad,)))
    for data in ({"shard": -1}, {"full": 0}, {"merged": 1.0}, {"density": "x"}):
        with pytest.raises(PatchError, match="damaged"):
            Side.check(Wrap("m", SIDE, {**good.data, **data}, good.tensors))


def test_edits_of_a_shard_stand_on_each_other(known):
    """One copy for two edits, the second on top of the first; routing is heard by whose prompt."""
    model = known("llama")
    method = choose("wise", OPTIONS)
    patches = []
    for request in (FRANCE, NILE):
        patches.append(edit(model, request, method=method))
        model.apply(patches[-1])
    data = [patch.wraps[0].data for patch in patches]
    assert [each["shard"] for each in data] == [0, 0]
    index = [patch.wraps[0].tensors["entries.index"] for patch in patches]
    assert torch.equal(*index)  # a shard has one mask
    rows = [model.view.encode(request.prompt).ids for request in (FRANCE, NILE)]
    with listening() as heard:
        said = model.view.generate(rows, max_new_tokens=1)
    assert model.view.decode(said[1]).strip() == NILE.target
    assert [firing.patch for firing in heard] == patches
    assert (heard[1].fired, heard[1].measure) == (True, "activation")
    fresh = edit(known("llama"), FRANCE, method=choose("wise", OPTIONS))
    assert fresh.to_bytes() == patches[0].to_bytes()


def test_each_shard_draws_a_mask_of_its_own(known):
    model = known("llama")
    method = choose("wise", {**OPTIONS, "full": 1, "merged": 1})
    first = edit(model, FRANCE, method=method)
    model.apply(first)
    second = edit(model, NILE, method=method)
    index = [patch.wraps[0].tensors["entries.index"] for patch in (first, second)]
    assert second.wraps[0].data["shard"] == 1
    assert not torch.equal(index[0], index[1][: len(index[0])])
    (line,) = method.shown(model.ready.prepared)
    assert "out of scope" in line


def test_prompts_about_others_are_told_from_it(known):
    """With its subject known, the same sentence about another one is further than the threshold."""
    model = known("llama")
    about = EditRequest(prompt=FRANCE.prompt, subject="France", target=FRANCE.target)
    with model.applied(edit(model, about, method=choose("wise", OPTIONS))), listening() as heard:
        rows = [model.view.encode(text).ids for text in (about.prompt, "The colour of the sky is")]
        model.view.run(rows, logits_at=[(0, 0)])
    assert [firing.fired for firing in heard] == [True, False]
