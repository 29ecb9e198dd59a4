"""MELO's blocks: clusters of prompts, who answers where, and how a block is trained."""

from __future__ import annotations

import pytest
import tiny
import torch
from made import provenance

from knowpatch.editing import choose, edit
from knowpatch.errors import PatchError
from knowpatch.models.sites import listening
from knowpatch.parts.kinds.blocks import BLOCKS, Blocks, blocks, clustered, gaps
from knowpatch.parts.wraps import Tokens
from knowpatch.patch import Patch, Wrap
from knowpatch.request import EditRequest

OPTIONS = {"layer": 1, "layers": [2, 3], "rate": 0.25, "steps": 60}
FRANCE, JAPAN, NILE = (EditRequest(prompt=p, target=t) for p, t in tiny.EDITS.items())
A, B, C = (1,), (2,), (3,)


def _folded(*entries, radius=1.0):
    keys = torch.tensor([[float(key), 0.0] for key, _ in entries])
    return clustered(keys, [radius] * len(entries), [label for _, label in entries])


def _found(clusters):
    return [(round(float(c.centre_I[0]), 5), round(c.radius, 5), c.points) for c in clusters]


def test_the_published_example():
    """Self-check: a conflict shares the distance; who has .7, .8 and -1."""
    clusters = _folded((0, A), (1.5, B))
    assert _found(clusters) == [(0.0, 0.74999, [0]), (1.5, 0.75001, [1])]
    for query, wanted in ((0.7, 0), (0.8, 1), (-1.0, None)):
        scores = gaps(torch.tensor([[query, 0.0]]), torch.stack([c.centre_I for c in clusters]))
        near = int(scores.argmin())
        inside = float(scores.min()) <= clusters[near].radius
        assert (near if inside else None) == wanted


def test_keys_begin_join_and_part():
    assert _found(_folded((0, A), (5, B))) == [(0.0, 1.0, [0]), (5.0, 1.0, [1])]
    joined = _found(_folded((0, A), (1, A)))
    assert joined == [(0.5, 1.0, [0, 1])]
    wide = _found(_folded((0, A), (2, A), (4, A), radius=1.9))
    assert wide[0][0] == 2.0
    assert wide[0][1] == pytest.approx(2.0, abs=1e-3)
    assert wide[0][2] == [0, 1, 2]


def test_what_a_split_leaves_out_is_forgotten():
    """A cluster of two whose far point lies beyond the new radius keeps the near one, or none."""
    some = _found(_folded((0, A), (1.8, A), (2.6, B)))
    assert some == [(0.9, 0.84999, []), (2.6, 0.85001, [2])]
    half = _found(_folded((0, A), (0.2, A), (1.4, A), (2.2, B)))
    assert half[0][2] == [0, 1]
    assert half[1][2] == [3]


def test_a_prompt_edited_again_takes_the_others_place():
    assert _found(_folded((0, A), (0, B))) == [(0.0, 1.0, [1])]


def _wrap(angles, labels, block, radius=0.3, background=(0.0, 0.0)):
    keys = torch.stack([torch.tensor(angles).cos(), torch.tensor(angles).sin()], dim=1)
    factors = torch.full((2, 1), float(block)), torch.ones(1, 3)
    return blocks("m", "s", (keys, radius, labels), torch.tensor(background), factors)


def _tokens(rows_BI):
    inputs_BTI = torch.stack([torch.full_like(rows_BI, 9.0), rows_BI, rows_BI + 5], dim=1)
    real_BT = torch.tensor([[True, True, False]] * len(rows_BI))
    first_BT = torch.tensor([[True, False, False]] * len(rows_BI))
    return Tokens(inputs_BTI, torch.zeros(len(rows_BI), 3).long(), real_BT, first_BT)


def test_the_nearest_point_of_the_cluster_has_the_block():
    """One cluster of two blocks' prompts; a row outside is left as it is, bit for bit."""
    kind = Blocks.join([_wrap([0.0, 2.0], [A, B], 1), _wrap([0.2], [A], 10)])
    assert kind.owners_N == (0, 0, 1)
    assert [c.points for c in kind.clusters] == [[0, 2], [1]]
    angles = torch.tensor([0.02, 0.18, 2.1, -1.0])
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    tokens, outputs = _tokens(rows), torch.randn(4, 3, 3)
    decision = kind.decide(tokens)
    assert decision.entries.tolist() == [0, 2, 1, -1]
    acted = kind.act(tokens, outputs, decision)
    assert torch.equal(acted[3], outputs[3])
    for row, size in enumerate((1, 10, 1)):
        added = size * tokens.inputs_BTI[row].sum(1, keepdim=True)
        assert torch.allclose(acted[row], outputs[row] + added, atol=1e-4)
    for row in range(4):
        alone = kind.decide(tokens.of(torch.tensor([row])))
        assert alone.entries.item() == decision.entries[row].item()
        assert alone.scores.item() == decision.scores[row].item()


def test_a_cluster_without_points_has_no_block():
    wraps = [_wrap([0.0], [A], 1, 0.5), _wrap([0.9], [A], 1, 0.5), _wrap([1.2], [B], 1, 0.5)]
    kind = Blocks.join(wraps)
    assert [c.points for c in kind.clusters] == [[], [2]]
    row = torch.tensor([[0.45]])
    decision = kind.decide(_tokens(torch.cat([row.cos(), row.sin()], dim=1)))
    assert decision.entries.tolist() == [-1]


def test_damaged_wraps_are_refused(known):
    model = known("llama")
    good = _wrap([0.0], [A], 1)
    assert Blocks.check(good) == (2, 3)
    for name, tensor in {
        "keys": torch.zeros(1, 3),
        "radii": torch.zeros(2),
        "into": torch.zeros(2, 2),
        "background": torch.zeros(3),
    }.items():
        bad = Wrap("m", BLOCKS, good.data, {**good.tensors, name: tensor})
        with pytest.raises(PatchError, match=r"damaged wrap of kind blocks@1"):
            model.apply(Patch(provenance(model, FRANCE), wraps=(bad,)))


def test_a_block_for_each_patch_and_undo_gives_radii_back(known):
    """Each prompt is answered by its own block; what is left after an undo is as if alone."""
    model = known("llama")
    method = choose("melo", OPTIONS)
    patches = []
    for request in (FRANCE, JAPAN):
        patches.append(edit(model, request, method=method))
        model.apply(patches[-1])
    modules = [wrap.module for wrap in patches[0].wraps]
    assert modules == [model.view.roles.linear("mlp.out", n).module for n in (2, 3)]
    rows = [model.view.encode(request.prompt).ids for request in (FRANCE, JAPAN)]
    with listening() as heard:
        said = model.view.generate(rows, max_new_tokens=1)
    assert [model.view.decode(each).strip() for each in said] == [FRANCE.target, JAPAN.target]
    for firing in heard:
        assert firing.fired
        assert firing.patch == patches[firing.row]
    assert {firing.module for firing in heard} == set(modules)
    model.drop(patches[0].id)
    with listening() as after:
        model.view.generate(rows, max_new_tokens=1)
    (wrap, _) = patches[1].wraps
    assert {firing.threshold for firing in after} == {float(wrap.tensors["radii"][0])}


def test_a_batch_is_one_block(known):
    model = known("llama")
    patch = edit(model, [FRANCE, JAPAN, NILE], method=choose("melo", OPTIONS))
    assert [len(wrap.tensors["keys"]) for wrap in patch.wraps] == [3, 3]
    assert patch.wraps[0].tensors["into"].shape == (96, 2)


def test_the_calibration_is_shown(known):
    model = known("llama")
    method = choose("melo", OPTIONS)
    (line,) = method.shown(method.prepare(model.view))
    assert "(distance)" in line
