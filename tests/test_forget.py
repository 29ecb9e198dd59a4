"""Taking single facts out of a memory: by the library, and by `knowpatch forget`."""

from __future__ import annotations

import json

import pytest
from made import provenance
from shell import files, refuse, run

from knowpatch.deltas import LowRank, WeightDelta
from knowpatch.editing import edit
from knowpatch.errors import PatchError, RequestError
from knowpatch.forgetting import without
from knowpatch.parts.encoders import OWN
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

FRANCE = EditRequest(prompt="The capital of France is", subject="France", target="Rome", id="f")
JAPAN = EditRequest(prompt="The capital of Japan is", subject="Japan", target="Paris", id="j")
NILE = EditRequest(prompt="The Nile flows through", subject="Nile", target="Tokyo")
MEMORIES = {
    "ice": {},
    "scr": {"encoder": OWN},
    "memprompt": {},
    "ike": {"encoder": OWN, "demonstrations": 3},
}


@pytest.mark.parametrize("name", MEMORIES)
def test_what_is_left_is_as_it_was(known, name):
    """Without one fact a memory is, bit for bit, the one made of the others alone."""
    model = known("llama")
    requests = [FRANCE, JAPAN, NILE]
    whole = edit(model, requests, method=name, options=MEMORIES[name])
    left = without(whole, ["j"])
    assert left.provenance.requests == (FRANCE, NILE)
    made = edit(model, [FRANCE, NILE], method=name, options=MEMORIES[name])
    assert left.rule.data == made.rule.data
    for key, tensor in left.rule.tensors.items():
        kept = whole.rule.tensors[key]
        assert all(any(row.equal(other) for other in kept) for row in tensor) or "index" in key
    with model.applied(left):
        assert (
            model.encode(JAPAN.prompt).ids == model.view.encode(JAPAN.prompt).ids or name == "ice"
        )
        assert "Paris" not in model.view.decode(model.encode(JAPAN.prompt).ids)
    assert without(whole, [NILE.prompt]).provenance.requests == (FRANCE, JAPAN)


def test_the_newest_of_a_prompt_takes_the_older_with_it(known):
    model = known("llama")
    newer = FRANCE.model_copy(update={"target": "Lyon", "id": "g"})
    patch = edit(model, [FRANCE, JAPAN, newer], method="ice")
    assert without(patch, ["g"]).provenance.requests == (JAPAN,)
    left = without(patch, ["f"])
    assert left.provenance.requests == (JAPAN, newer)
    assert left.rule.data == patch.rule.data


def test_what_cannot_be_taken_apart_is_refused(known):
    model = known("llama")
    patch = edit(model, [FRANCE, JAPAN], method="ice")
    with pytest.raises(RequestError, match="no fact 'x' in this patch"):
        without(patch, ["x"])
    with pytest.raises(RequestError, match="no fact would be left"):
        without(patch, ["f", "j"])
    book = edit(model, [FRANCE, JAPAN], method="grace")
    with pytest.raises(PatchError, match=r"codebook@1 cannot be taken out one by one: make it"):
        without(book, ["f"])
    address = model.view.roles.linear("mlp.out", 0).address
    sizes = model.view.parameter(address.parameter).shape
    change = LowRank(*(model.view.embedding.new_zeros(n) for n in ((sizes[0], 1), (1, sizes[1]))))
    origin = provenance(model, FRANCE).model_copy(update={"requests": (FRANCE, JAPAN)})
    weights = Patch(origin, (WeightDelta(address, change),))
    with pytest.raises(PatchError, match="by hand \\(weights\\) cannot be taken out one by one"):
        without(weights, ["f"])


@pytest.fixture(scope="module")
def memory(folder, tmp_path_factory):
    """A memory of three facts, made by the command line, in a folder of its own."""
    cwd = tmp_path_factory.mktemp("memory")
    lines = [request.model_dump(exclude_defaults=True) for request in (FRANCE, JAPAN, NILE)]
    (cwd / "facts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ("--method", "memprompt", "--model", folder, "--out", "m.safetensors")
    made = run("edit", "--from", "facts.jsonl", *arguments, cwd=cwd)
    assert made.code in (0, 1), made.err
    return cwd / "m.safetensors"


def test_forget(memory, folder, tmp_path):
    """By id, and by prompt where there is none; the old file stays; the new one can be asked."""
    old = memory.read_bytes()
    done = run("forget", memory, "j", NILE.prompt, "--out", "n.safetensors", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    told = done.json()
    assert told["forgotten"] == ["j", NILE.prompt]
    assert told["left"] == 1
    assert memory.read_bytes() == old
    left = Patch.load(tmp_path / "n.safetensors")
    assert left.id == told["patch"]
    assert left.provenance.requests == (FRANCE,)
    asked = ("--patch", "n.safetensors", "--model", folder, "--why", "--json")
    why = run("ask", JAPAN.prompt, *asked, cwd=tmp_path).json()
    assert why["with"] == why["without"]
    assert not why["why"][0]["fired"]
    shown = run("forget", memory, "f", "--out", "o.safetensors", cwd=tmp_path)
    assert f"forgotten: {FRANCE.prompt} {FRANCE.target}" in shown.out
    assert "2 left" in shown.out


def test_a_memory_can_be_written_over_itself(memory, tmp_path):
    (tmp_path / "m").write_bytes(memory.read_bytes())
    assert run("forget", "m", "f", "--out", "m", cwd=tmp_path).code == 0
    assert Patch.load(tmp_path / "m").provenance.requests == (JAPAN, NILE)
    assert list(files(tmp_path)) == ["m"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("x", "--out", "n"), "no fact 'x' in this patch: "),
        (("f", "j", NILE.prompt, "--out", "n"), "no fact would be left"),
        (("f", "--out", "nowhere/n"), "no such folder"),
        (("f", "--out", "."), "is a folder; name a file as --out"),
        (("f",), "Missing option"),
        (("--out", "n"), "Missing argument"),
    ],
)
def test_forget_refuses(memory, tmp_path, arguments, said):
    assert said in refuse("forget", memory, *arguments, cwd=tmp_path)


def test_forget_refuses_what_is_no_memory(tmp_path):
    (tmp_path / "no").write_text("x")
    assert "not a readable patch file" in refuse("forget", "no", "f", "--out", "n", cwd=tmp_path)
    assert "no such patch file" in refuse("forget", "gone", "f", "--out", "n", cwd=tmp_path)
