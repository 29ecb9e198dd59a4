"""What wraps of every way of reading and acting do, against plain hooks on single rows."""

from __future__ import annotations

import contextlib
import textwrap

import pytest
import tiny
import torch
from made import provenance

from knowpatch.ask import Ask
from knowpatch.edited import EditedModel
from knowpatch.errors import OptionError, PatchError
from knowpatch.models.above import Above
from knowpatch.models.passes import Act
from knowpatch.models.sampling import ended
from knowpatch.models.sites import listening, muted
from knowpatch.parts.wraps import Tokens, kind_of
from knowpatch.patch import Patch, Wrap
from knowpatch.request import EditRequest

FRANCE = EditRequest(prompt="The capital of France is", target="Rome")
KIND = '''
    """A kind for tests: adds a vector where a key's product with what it reads is above 0."""
    import torch
    from knowpatch.parts.wraps import Decision, Kind, expect, register

    @register("{name}")
    class Tried(Kind):
        kind, reads, acts, measure = "{name}@1", "{reads}", "{acts}", "similarity"

        def __init__(self, wraps):
            self.keys = torch.stack([wrap.tensors["key"] for wrap in wraps])
            self.vectors = torch.stack([wrap.tensors["vector"] for wrap in wraps])

        @classmethod
        def check(cls, wrap):
            expect(wrap, {{"key": 1, "vector": 1}}, {{"source": lambda value: True}})
            return len(wrap.tensors["key"]), len(wrap.tensors["vector"])

        @classmethod
        def join(cls, wraps):
            return cls(wraps)

        @classmethod
        def source(cls, wrap):
            return wrap.data["source"] or wrap.module

        @property
        def owners_N(self):
            return range(len(self.keys))

        def decide(self, tokens):
            read = {{"token": lambda: tokens.inputs_BTI, "last": lambda: tokens.last_BI}}
            scores = read.get("{reads}", tokens.mean_BI)() @ self.keys.T
            best = scores.max(-1)
            return Decision.above(best.values, best.indices, 0.0)

        def act(self, tokens, outputs, decision):
            chosen = decision.entries
            added = self.vectors[chosen.clamp(min=0)] * (chosen >= 0)[..., None]
            return outputs + (added if chosen.ndim == 2 else added[:, None])
'''
WAYS = {
    "ends": ("last", "last"),
    "meant": ("prompt", "last"),
    "through": ("prompt", "all"),
    "front": ("prompt", "prompt"),
    "each": ("token", "all"),
    "onward": ("last", "all"),
}


@pytest.fixture(autouse=True)
def kinds(tmp_path, monkeypatch):
    """One file for each way of reading and acting."""
    for name, (reads, acts) in WAYS.items():
        text = textwrap.dedent(KIND).format(name=name, reads=reads, acts=acts)
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("KNOWPATCH_WRAPS", str(tmp_path))


def _patch(model, name, layer=2, source=None, size=20.0, seed=0):
    """A patch that wraps an MLP's output map; some prompts are inside its scope, some are not."""
    draw = torch.Generator().manual_seed(seed)
    roles = model.view.roles
    module = roles.linear("mlp.out", layer).module
    path = None if source is None else roles.linear("mlp.out", source).module
    out, into = model.view.weight(roles.linear("mlp.out", layer)).shape
    tensors = {
        "key": torch.randn(into, generator=draw),
        "vector": size * torch.randn(out, generator=draw),
    }
    origin = provenance(model, FRANCE, seed=seed)
    return Patch(origin, wraps=(Wrap(module, f"{name}@1", {"source": path}, tensors),))


def _plain(model, patch, row, prompt, name):
    """All logits of one row, by plain hooks that know only where the prompt ends."""
    (wrap,) = patch.wraps
    reads, acts = WAYS[name]
    key, vector = wrap.tensors["key"], wrap.tensors["vector"]
    part, seen = model.model.get_submodule, {}

    def look(module, args, output):
        seen["inputs"] = args[0].reshape(len(row), -1)

    def act(module, args, output):
        inputs = seen["inputs"]
        score = {
            "token": lambda: inputs @ key,
            "last": lambda: inputs[prompt - 1] @ key,
            "prompt": lambda: inputs[:prompt].mean(0) @ key,
        }[reads]()
        added = torch.zeros_like(output.reshape(len(row), -1))
        where = {
            "last": slice(prompt - 1, prompt),
            "prompt": slice(0, prompt),
            "all": slice(None),
        }[acts]
        added[where] = (score > 0).float()[..., None] * vector if reads != "token" else 0
        if reads == "token":
            added[where] = ((score > 0).float()[:, None] * vector)[where]
        return output + added.reshape(output.shape)

    source = wrap.data["source"] or wrap.module
    handles = [
        part(source).register_forward_hook(look),
        part(wrap.module).register_forward_hook(act),
    ]
    try:
        with torch.no_grad():
            return model.model(torch.tensor([row])).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def _written(model, patch, row, name, steps):
    """A greedy text of one row, each token by a whole pass."""
    ids, prompt = list(row), len(row)
    for _ in range(steps):
        ids.append(int(_plain(model, patch, ids, prompt, name)[-1].argmax()))
        if ids[-1] in model.view.stop_ids:
            break
    return ids[prompt:]


def _rows(model, count=6):
    return [model.view.encode(prompt).ids for prompt in [*list(tiny.FACTS)[: count - 1], "The"]]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("name", WAYS)
def test_a_pass_is_that_of_plain_hooks(known, name, architecture):
    """Every way, in a batch with mixed rows, on either padding, live and carried."""
    model = known(architecture)
    patch = _patch(model, name)
    rows = _rows(model)
    base = [_plain(model, _patch(model, name, size=0.0), row, len(row), name) for row in rows]
    wanted = [_plain(model, patch, row, len(row), name) for row in rows]
    moved = [
        not torch.allclose(one, other, atol=1e-4) for one, other in zip(base, wanted, strict=True)
    ]
    assert any(moved)
    places = [(i, place) for i, row in enumerate(rows) for place in range(len(row))]
    lengths = [len(row) for row in rows]
    for side in ("right", "left"):
        model.view.padding = side
        with model.applied(patch):
            live = model.view.run(rows, logits_at=places).logits_MV.split(lengths)
        with model.session([[patch] if i % 2 else [] for i in range(len(rows))]):
            mixed = model.view.run(rows, logits_at=places).logits_MV.split(lengths)
        for i in range(len(rows)):
            assert torch.allclose(live[i], wanted[i], atol=2e-3)
            assert torch.allclose(mixed[i], wanted[i] if i % 2 else base[i], atol=2e-3)


@pytest.mark.parametrize("name", WAYS)
def test_texts_are_those_of_whole_passes(known, name):
    """With a cache or without, in a batch, by a loop of one's own, and through the planner."""
    model = known("llama")
    patch = _patch(model, name, size=6.0)
    rows, steps = _rows(model), 8
    wanted = [_written(model, patch, row, name, steps) for row in rows]
    batch = model.view.batch(rows, side="left")
    for use_cache in (True, False):
        with model.session([patch]):
            out = model.generate(
                batch.ids_BT,
                attention_mask=batch.mask_BT,
                max_new_tokens=steps,
                do_sample=False,
                use_cache=use_cache,
            )
        said = out[:, batch.ids_BT.shape[1] :].tolist()
        view = model.view
        assert [list(ended(row, view.stop_ids, (), view.decode)) for row in said] == wanted
    with model.session([patch]):
        ids = list(rows[0])
        out = model(torch.tensor([ids]), use_cache=True)
        for _ in range(len(wanted[0])):
            ids.append(int(out.logits[0, -1].argmax()))
            out = model(torch.tensor([ids[-1:]]), past_key_values=out.past_key_values)
    assert ids[len(rows[0]) :] == wanted[0]
    head = " ".join(tiny.FACTS)
    texts = [f"{head} {prompt}" for prompt in tiny.FACTS]
    ask = Ask(model)
    futures = [ask.generate(text, max_new_tokens=4, patches=[patch]) for text in texts]
    for text, future in zip(texts, futures, strict=True):
        row = model.view.encode(text).ids
        assert list(future.result().ids) == _written(model, patch, row, name, 4)


@pytest.mark.parametrize("name", WAYS)
def test_forced_answers_go_by_the_prompt(known, name):
    """What is decided by, and where it acts, ends with the prompt; trained passes agree."""
    model = known("llama")
    patch = _patch(model, name)
    rows = [(*row, 5, 6, 7) for row in _rows(model)]
    prompts = [len(row) - 3 for row in rows]
    places = [(i, prompts[i] + j - 1) for i in range(len(rows)) for j in range(4)]
    wanted = torch.cat(
        [
            _plain(model, patch, row, prompt, name)[prompt - 1 :]
            for row, prompt in zip(rows, prompts, strict=True)
        ]
    )
    with model.applied(patch):
        found = model.view.run(rows, logits_at=places, prompts=prompts).logits_MV
        above = Above(model.view, 1, rows, prompts=prompts)
        part = above.run(range(len(rows)), logits_at=places).logits_MV
    assert torch.allclose(found, wanted, atol=2e-3)
    assert torch.allclose(part, wanted, atol=2e-3)


@pytest.mark.parametrize("name", ["through", "onward", "each"])
def test_another_module_may_decide(known, name):
    """What enters one map switches what another puts out, also where blocks below are known."""
    model = known("llama")
    patch = _patch(model, name, layer=3, source=1)
    rows = _rows(model)
    wanted = [_plain(model, patch, row, len(row), name)[-1] for row in rows]
    ends = [(i, len(row) - 1) for i, row in enumerate(rows)]
    with model.applied(patch):
        found = model.view.run(rows, logits_at=ends).logits_MV
        for block in (1, 2, 3):
            above = Above(model.view, block, rows)
            assert above.skips == (block == 1)
            part = above.run(range(len(rows)), logits_at=ends).logits_MV
            assert torch.allclose(part, found, atol=1e-4)
    assert torch.allclose(found, torch.stack(wanted), atol=2e-3)


@pytest.mark.parametrize("name", ["meant", "through", "onward"])
def test_a_prompt_in_pieces_is_refused(known, name):
    model = known("llama")
    patch = _patch(model, name)
    (row, *_) = _rows(model)
    with model.session([patch]), pytest.raises(OptionError, match="decides by the whole prompt"):
        model.generate(torch.tensor([row]), max_new_tokens=2, prefill_chunk_size=2)


def test_acts_stand_in_for_wraps_of_their_kind(known):
    """A muted kind does nothing; an act in a trained pass is heard in its place, with a graph."""
    model = known("llama")
    patch = _patch(model, "each")
    rows = _rows(model)
    ends = [(i, len(row) - 1) for i, row in enumerate(rows)]
    base = model.view.run(rows, logits_at=ends).logits_MV
    (wrap,) = patch.wraps
    leaf = wrap.tensors["vector"].clone().requires_grad_()
    seen = []

    def function(inputs, outputs, numbers):
        seen.append(list(numbers))
        return outputs + ((inputs @ wrap.tensors["key"]) > 0)[..., None] * leaf

    with model.applied(patch):
        wanted = model.view.run(rows, logits_at=ends).logits_MV
        with muted("each@1"):
            assert torch.equal(model.view.run(rows, logits_at=ends).logits_MV, base)
            above = Above(model.view, 2, rows)
            acts = [Act(wrap.module, function)]
            found = above.run([0, 1, 2, 3, 4, 5], logits_at=ends, acts=acts).logits_MV
    assert torch.allclose(found, wanted, atol=1e-4)
    assert seen == [[0, 1, 2, 3, 4, 5]]
    (grad,) = torch.autograd.grad(found.sum(), leaf)
    assert float(grad.norm()) > 0


@pytest.mark.parametrize("name", WAYS)
def test_what_is_decided_can_be_heard(known, name):
    """One line for each row: which patch, by what score; of two entries the one that counts."""
    model = known("llama")
    first, second = _patch(model, name), _patch(model, name, seed=1)
    rows = _rows(model)
    with model.applied(first, second), listening() as heard:
        model.view.generate(rows, max_new_tokens=1)
    assert {firing.row for firing in heard} == set(range(len(rows)))
    assert {firing.patch for firing in heard} <= {first, second}
    for firing in heard:
        assert firing.fired == (firing.score > firing.threshold)
        assert firing.measure == "similarity"
    with model.applied(first), contextlib.suppress(KeyError):
        model.view.generate(rows, max_new_tokens=1)
    assert len(heard) == len({(f.row, f.patch) for f in heard})


def test_means_are_of_the_prompt_alone():
    """Padding and answers do not count; a share is taken from the prompt's end, rounded up."""
    inputs = torch.arange(12.0).reshape(2, 6, 1)
    prompt = torch.tensor(
        [[False, True, True, True, True, True], [True, True, True, False] + [False] * 2]
    )
    tokens = Tokens(inputs, torch.zeros(2, 6).long(), prompt, prompt)
    assert tokens.mean_BI()[:, 0].tolist() == [3.0, 7.0]
    assert tokens.mean_BI(0.6)[:, 0].tolist() == [4.0, 7.5]
    assert tokens.last_BI[:, 0].tolist() == [5.0, 8.0]


def test_a_kind_of_another_version_is_refused(known):
    model = known("llama")
    (wrap,) = _patch(model, "each").wraps
    assert kind_of(wrap).kind == "each@1"
    other = Wrap(wrap.module, "each@2", wrap.data, wrap.tensors)
    patch = Patch(provenance(model, FRANCE), wraps=(other,))
    with pytest.raises(PatchError, match="unknown wrap 'each@2'"):
        EditedModel.apply(model, patch)
