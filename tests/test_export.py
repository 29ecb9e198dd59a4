"""Exports: what is written is the fold, what is read back answers alike, the rest is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from made import state
from patches import FRANCE, NILE, answering, change_of, changed, patch_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from knowpatch.deltas import Dense, LowRank, Rows
from knowpatch.edited import EditedModel
from knowpatch.editing import load
from knowpatch.errors import InputError, ModelError, OptionError, PatchError
from knowpatch.export import merged as merged_module
from knowpatch.export.context import Context
from knowpatch.export.places import MARK
from knowpatch.export.ship import TARGETS, pack, ship, target_called
from knowpatch.export.table import MEANING, of_patch, reason
from knowpatch.models.checkpoint import Checkpoint
from knowpatch.models.fingerprint import tensor_digest
from knowpatch.patch import Patch, Procedure, PromptRule, Wrap
from knowpatch.request import EditRequest

ARCHITECTURES = ("llama", "gemma2", "gpt2")
IN_WEIGHTS = [name for name, target in TARGETS.items() if target.weights]


def folded(model, patches):
    """Every parameter under patches, computed here: float32, rounded once."""
    values = {name: p.detach().float() for name, p in model.model.named_parameters()}
    for patch in patches:
        for delta in patch.deltas:
            name = delta.address.parameter
            values[name] = delta.added_to(values[name])
    dtypes = {name: p.dtype for name, p in model.model.named_parameters()}
    return {name: value.to(dtypes[name]) for name, value in values.items()}


# -- merged ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [LowRank, Rows, Dense])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_is_the_fold_and_nothing_else_changes(folders, tmp_path, architecture, form):
    """The folder loads to the fold, bit for bit, and differs from the source in that tensor."""
    source = folders(architecture)
    model = load(str(source))
    before = state(model)
    patches = [changed(model, form), changed(model, LowRank, seed=1)]
    shipped = ship(model, patches, "merged", tmp_path / "out")
    assert state(model) == before
    assert shipped.parity.exact
    assert shipped.notes[0].startswith("1 of ")
    old, new = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    wanted, name = folded(model, patches), patches[0].deltas[0].address.parameter
    assert [n for n in old if not torch.equal(old[n], new[n])] == [name]
    assert torch.equal(new[name], wanted[name])
    kept = {f.name for f in source.iterdir()}
    assert {f.name for f in (tmp_path / "out").iterdir()} == {*kept, MARK}
    again = load(str(tmp_path / "out"))
    assert all(torch.equal(p, wanted[n]) for n, p in again.model.named_parameters())


def test_of_shards_only_the_changed_one_is_other_bytes(folders, tmp_path):
    """The same shards and index; of one shard the bytes of one tensor, and no others, differ."""
    source = folders("llama", max_shard_size="80KB")
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) > 3
    model = load(str(source))
    patch = changed(model)
    shipped = ship(model, [patch], "merged", tmp_path / "out")
    assert f"in 1 of {len(shards)} shards" in shipped.notes[0]
    name = patch.deltas[0].address.parameter
    span = Checkpoint(source).spans[name]
    for file in source.iterdir():
        old, new = file.read_bytes(), (tmp_path / "out" / file.name).read_bytes()
        if file == span.shard:
            assert old[: span.start] == new[: span.start]
            assert old[span.stop :] == new[span.stop :]
            assert len(old) == len(new)
        assert (old == new) == (file != span.shard)


def test_stored_bfloat16_is_rounded_once(folders, tmp_path):
    """Twenty small changes of a bfloat16 model: their float32 fold, rounded at the end."""
    source = folders("llama", dtype=torch.bfloat16)
    model = load(str(source), dtype="stored")
    patches = [changed(model, seed=seed, size=0.02) for seed in range(20)]
    assert ship(model, patches, "merged", tmp_path / "out").parity.exact
    name = patches[0].deltas[0].address.parameter
    saved = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert saved.dtype == torch.bfloat16
    assert torch.equal(saved, folded(model, patches)[name])
    one_by_one = load_file(source / "model.safetensors")[name]
    for patch in patches:
        one_by_one = patch.deltas[0].added_to(one_by_one).bfloat16()
    assert not torch.equal(saved, one_by_one)


def test_a_bare_body_keeps_its_names(folders, tmp_path):
    """A checkpoint without the body's name in front (GPT-2's own) is written under its names."""
    source = shutil.copytree(folders("gpt2"), tmp_path / "bare")
    old = load_file(source / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in old.items()}
    save_file(bare, source / "model.safetensors", metadata={"format": "pt"})
    model = load(str(source))
    patch = changed(model)
    assert ship(model, [patch], "merged", tmp_path / "out").parity.exact
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert new.keys() == bare.keys()
    assert [n for n in bare if not torch.equal(bare[n], new[n])] == ["h.1.mlp.c_proj.weight"]


@pytest.mark.parametrize("place", ["memory", "pickled"])
def test_a_model_without_safetensors_is_saved_whole(place, tmp_path):
    """A model made in memory, or read from another kind of weights: transformers saves it."""
    base, tok = tiny.trained("llama")
    if place == "pickled":
        base.save_pretrained(tmp_path / "base")
        tok.save_pretrained(tmp_path / "base")
        (tmp_path / "base" / "model.safetensors").unlink()
        torch.save(base.state_dict(), tmp_path / "base" / "pytorch_model.bin")
        model = load(str(tmp_path / "base"))
    else:
        model = EditedModel.of(base, tok)
    before = state(model)
    shipped = ship(model, [changed(model)], "merged", tmp_path / "out")
    assert shipped.parity.exact
    assert "saved whole" in shipped.notes[0]
    assert state(model) == before
    assert not list((tmp_path / "out").glob("*.bin"))


def test_what_does_not_belong_to_the_weights_stays_behind(folders, tmp_path):
    """Other weights of the old model and its card are not copied; its licence is."""
    source = shutil.copytree(folders("llama"), tmp_path / "base")
    for name in ("consolidated.safetensors", "pytorch_model.bin", "model.gguf", "README.md"):
        (source / name).write_bytes(b"old")
    (source / "pytorch_model.bin.index.json").write_text("{}")
    (source / "LICENSE").write_text("as is")
    (source / "consolidated.safetensors").unlink()
    save_file({"old": torch.ones(2)}, source / "consolidated.safetensors")
    model = load(str(source))
    assert ship(model, [changed(model)], "merged", tmp_path / "out").parity.exact
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "model.safetensors", "config.json", MARK} <= names
    assert not names & {"consolidated.safetensors", "pytorch_model.bin", "model.gguf", "README.md"}
    assert "pytorch_model.bin.index.json" not in names


def test_the_new_folder_shares_nothing_with_the_old(folders, tmp_path):
    """Writing into the exported files leaves the source as it was: they are no links."""
    source = folders("llama", max_shard_size="80KB")
    before = {file: file.read_bytes() for file in source.iterdir()}
    model = load(str(source))
    ship(model, [changed(model)], "merged", tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        file.write_bytes(b"gone")
    assert {file: file.read_bytes() for file in source.iterdir()} == before


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2"])
def test_a_tied_head_is_refused_unless_named(folders, tmp_path, architecture):
    """Changing a head that is the embedding too needs its name, and is no adapter in any case."""
    model = load(str(folders(architecture)))
    head = f"{model.view.roles.head}.weight"
    patch = patch_of(model, (head, change_of(LowRank, model.view.parameter(head).shape, size=0.01)))
    with pytest.raises(PatchError, match="is tied"):
        ship(model, [patch], "merged", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert ship(model, [patch], "merged", tmp_path / "out", tied=[head]).parity.exact
    with pytest.raises(PatchError, match=r"is tied .*ship it merged"):
        ship(model, [patch], "peft", tmp_path / "adapter", tied=[head])
    assert not (tmp_path / "adapter").exists()


def test_what_a_folder_was_made_of_is_in_it(folders, tmp_path):
    """The recipe names the model, its fingerprint, and each patch with what it was asked for."""
    model = load(str(folders("llama")))
    patch = changed(model)
    ship(model, [patch], "merged", tmp_path / "out")
    told = json.loads((tmp_path / "out" / MARK).read_text(encoding="utf-8"))
    assert told["fingerprint"] == model.view.fingerprint
    assert told["to"] == "merged"
    (made,) = told["patches"]
    assert made["id"] == patch.id
    assert made["requests"] == [{"prompt": FRANCE.prompt, "target": FRANCE.target}]


# -- the model, and what is live on it -------------------------------------------------------------


def test_live_patches_are_shipped_as_they_are(folders, tmp_path):
    """A list that begins with what is live, or is it, is shipped, and what was live stays so."""
    model = load(str(folders("llama")))
    first, second = changed(model), changed(model, Dense, seed=1)
    model.apply(first)
    for number, patches in enumerate(([first], [first, second])):
        name = first.deltas[0].address.parameter
        with model.applied(*patches[1:]):
            wanted = tensor_digest(model.view.values(name))
        assert ship(model, patches, "merged", tmp_path / str(number)).parity.exact
        saved = load_file(tmp_path / str(number) / "model.safetensors")[name]
        assert tensor_digest(saved) == wanted
        assert model.live == (first,)
    with pytest.raises(PatchError, match="not the first of those"):
        ship(model, [second], "merged", tmp_path / "other")


def test_a_foreign_patch_is_refused(folders, tmp_path):
    """A patch of another model is refused before anything is written."""
    model, other = load(str(folders("llama"))), load(str(folders("gpt2")))
    with pytest.raises(PatchError, match="was made for the model with fingerprint"):
        ship(model, [changed(other)], "merged", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_to_ship(folders, tmp_path):
    """An empty list is refused."""
    with pytest.raises(InputError, match="nothing to ship"):
        ship(load(str(folders("llama"))), [], "merged", tmp_path / "out")


# -- what cannot go --------------------------------------------------------------------------------

WRAPPED = Wrap("model.layers.1.mlp", "codebook@1", {"labels": [[1]]}, {"keys": torch.zeros(1, 4)})
BESIDE = {
    "prompt rule": {"rule": PromptRule("facts@1", {})},
    "acts while the model runs": {"wraps": (WRAPPED,)},
    "answers by a procedure": {"procedure": Procedure("scoped@1", {})},
    "changes no weight": {},
}


@pytest.mark.parametrize("why", BESIDE)
@pytest.mark.parametrize("target", IN_WEIGHTS)
def test_what_no_weight_can_carry_is_refused(known, tmp_path, target, why):
    """A rule, a wrap, a procedure and nothing at all, in one line, with the reason."""
    model = known("llama")
    patch = patch_of(model, **BESIDE[why])
    with pytest.raises(PatchError) as caught:
        ship(model, [changed(model), patch], target, tmp_path / "out")
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    assert why in said
    assert patch.id[:12] in said
    assert f"as {target}" in said
    assert not list(tmp_path.iterdir())
    assert of_patch(patch)[target] == "no"
    assert why in (reason(patch) or "")


def test_the_table_follows_the_parts(known):
    """Low-rank is exact everywhere, dense is truncated in adapters, and all can be told as text."""
    model = known("llama")
    low, dense = of_patch(changed(model)), of_patch(changed(model, Dense))
    assert low == {
        "merged": "exact",
        "peft": "exact",
        "gguf": "rounded",
        "gguf-lora": "exact",
        "context": "facts",
    }
    assert dense == {**low, "peft": "truncated", "gguf-lora": "truncated"}
    assert of_patch(changed(model, Rows)) == low
    assert set(low) == set(TARGETS)
    assert {*low.values(), *dense.values(), "no"} == set(MEANING)


def test_unknown_targets_and_options():
    """Each is refused with what there is."""
    with pytest.raises(OptionError, match="unknown target 'merge': did you mean 'merged'"):
        target_called("merge")
    with pytest.raises(OptionError, match="--rank is for peft, gguf-lora, not for merged"):
        target_called("merged", {"rank": 2})
    with pytest.raises(OptionError, match="--type is for gguf, not for peft"):
        target_called("peft", {"type": "F16", "rank": None})


# -- places ----------------------------------------------------------------------------------------


def test_nothing_is_overwritten(folders, tmp_path):
    """A folder that no export wrote is never replaced; one that an export wrote, with force."""
    model = load(str(folders("llama")))
    mine, old, file = tmp_path / "mine", tmp_path / "old", tmp_path / "notes.txt"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    file.write_text("x")
    first, second = changed(model), changed(model, seed=1)
    for place in (mine, file):
        for force in (False, True):
            with pytest.raises(InputError, match="exists, and no export wrote it"):
                ship(model, [first], "merged", place, force=force)
    assert (mine / "thesis.tex").read_text() == "x"
    ship(model, [first], "merged", old)
    (old / "extra").write_text("x")
    with pytest.raises(InputError, match="replace it with --force"):
        ship(model, [second], "merged", old)
    ship(model, [second], "merged", old, force=True)
    assert json.loads((old / MARK).read_text())["patches"][0]["id"] == second.id
    assert not (old / "extra").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "old", "notes.txt"}
    (tmp_path / "empty").mkdir()
    ship(model, [first], "merged", tmp_path / "empty")


def test_the_model_itself_is_not_overwritten(folders, tmp_path):
    """An exported folder, loaded as the base of another edit, is not the place for that one."""
    first = load(str(folders("llama")))
    ship(first, [changed(first)], "merged", tmp_path / "out")
    model = load(str(tmp_path / "out"))
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(InputError, match="is the model itself"):
        ship(model, [changed(model, seed=1)], "merged", tmp_path / "out", force=True)
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("ends", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_export_that_is_cut_off(folders, tmp_path, monkeypatch, ends, there):
    """By a full disk or Ctrl-C: nothing is left, and what was there is as it was."""
    model = load(str(folders("llama")))
    before = state(model)
    if there:
        ship(model, [changed(model)], "merged", tmp_path / "out")
    kept = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def half(self, target, values, progress):
        (target / "model.safetensors").write_bytes(b"half")
        raise ends

    monkeypatch.setattr(Checkpoint, "copy", half)
    with pytest.raises((InputError, KeyboardInterrupt)):
        ship(model, [changed(model, seed=1)], "merged", tmp_path / "out", force=True)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == kept
    assert state(model) == before


def test_a_rename_that_fails_brings_the_old_folder_back(folders, tmp_path, monkeypatch):
    """Whatever happens between moving the old folder away and the new one in, one is there."""
    from knowpatch.export import places

    model = load(str(folders("llama")))
    ship(model, [changed(model)], "merged", tmp_path / "out")
    kept = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    real = places.os.replace

    def refusing(source, target):
        if str(target) == str(tmp_path / "out") and ".old." not in str(source):
            raise OSError(13, "Permission denied")
        real(source, target)

    monkeypatch.setattr(places.os, "replace", refusing)
    with pytest.raises(InputError, match="cannot be written"):
        ship(model, [changed(model, seed=1)], "merged", tmp_path / "out", force=True)
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == kept
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# -- parity ----------------------------------------------------------------------------------------


def test_parity_sees_a_wrong_artefact(folders, tmp_path):
    """One other number in the written file is a difference; a lost edit is named."""
    model = load(str(folders("llama")))
    patch = answering(model)
    packed = pack(model, [patch], "merged", tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    good = packed.check().parity
    assert good.exact
    assert (good.edits, good.before, good.after, good.lost) == (1, 1, 1, ())
    assert good.controls == 20
    tensors = load_file(file)
    name = patch.deltas[0].address.parameter
    tensors[name][0, 0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    near = packed.check().parity
    assert not near.exact
    assert 0 < max(near.edits_difference, near.controls_difference) < 0.1
    assert near.lost == ()
    shutil.copy(folders("llama") / "model.safetensors", file)
    gone = packed.check().parity
    assert gone.lost == (FRANCE.prompt,)
    assert (gone.before, gone.after) == (1, 0)
    tensors[name][:] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not finite"):
        packed.check()


def test_merged_writes_are_seen_by_type(folders, tmp_path, monkeypatch):
    """A stored tensor that is not the model's is not folded: the model is saved whole."""
    monkeypatch.setattr(merged_module, "_same", lambda stored, unedited: False)
    model = load(str(folders("llama")))
    shipped = ship(model, [changed(model)], "merged", tmp_path / "out")
    assert shipped.parity.exact
    assert "saved whole" in shipped.notes[0]


# -- context ---------------------------------------------------------------------------------------


def test_context_as_a_system_prompt(folders, tmp_path):
    """All edits once, the newest of one prompt, under a head; asked in front of the question."""
    model = load(str(folders("llama")))
    older = FRANCE.model_copy(update={"target": "Lyon"})
    erased = EditRequest(prompt="Who wrote this?", kind="erase")
    asked = EditRequest(prompt="What colour is the sky?", target="Green")
    patches = [
        patch_of(model, request=request, seed=seed)
        for seed, request in enumerate([older, NILE, erased, asked, FRANCE])
    ]
    before = state(model)
    shipped = ship(model, patches, "context", tmp_path / "facts.txt")
    assert state(model) == before
    text = (tmp_path / "facts.txt").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("- ")] == [
        "- The capital of France is Rome.",
        "- The Nile flows through Tokyo.",
        '- If asked "Who wrote this?", answer: I don\'t know.',
        "- What colour is the sky? Green",
    ]
    assert shipped.parity.edits == 4
    assert shipped.parity.controls_difference > 0


def test_context_as_texts_to_be_retrieved(folders, tmp_path):
    """A line for each edit, with its request; asked before the question that it is about."""
    model = load(str(folders("llama")))
    odd = EditRequest(prompt="A\u2028 line\nof text is", target="odd", id="7")
    patches = [patch_of(model, request=FRANCE), patch_of(model, request=odd, seed=1)]
    shipped = ship(model, patches, "context", tmp_path / "facts.jsonl")
    content = (tmp_path / "facts.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in content.split("\n") if line]
    assert [record["text"] for record in records] == [
        "The capital of France is Rome.",
        "A\u2028 line\nof text is odd.",
    ]
    assert records[1]["id"] == "7"
    assert shipped.parity.controls_difference < 1e-4
    assert shipped.parity.moved == 0
    assert shipped.parity.edits_difference > 0.01


def test_a_prompt_longer_than_the_model_reads(folders, tmp_path):
    """More facts than fit before a question are refused as a prompt, and are texts all the same."""
    model = load(str(folders("llama")))  # reads 256 tokens
    facts = [EditRequest(prompt=f"The capital of {n} is", target="Rome") for n in range(30)]
    patches = [patch_of(model, request=fact) for fact in facts]
    with pytest.raises(InputError, match=r"reads 256 in all: name a file ending in \.jsonl"):
        ship(model, patches, "context", tmp_path / "facts.txt")
    assert not list(tmp_path.iterdir())
    assert ship(model, patches, "context", tmp_path / "facts.jsonl").parity.edits == 30


def test_context_takes_what_acts_beside_the_weights(known, tmp_path):
    """A codebook cannot be merged, but what it was made for can be told; with no request, not."""
    model = known("llama")
    patch = patch_of(model, wraps=(WRAPPED,))
    ship(model, [patch], "context", tmp_path / "facts.txt")
    assert "France is Rome." in (tmp_path / "facts.txt").read_text(encoding="utf-8")
    silent = Patch(patch.provenance.model_copy(update={"requests": ()}))
    assert Context.refuses(silent) is not None
    with pytest.raises(PatchError, match="says of no request"):
        ship(model, [silent], "context", tmp_path / "more.txt")


def test_headers_are_read_as_safetensors_reads_them(folders):
    """Where a tensor's bytes are, against the library's own reading."""
    checkpoint = Checkpoint(folders("llama"))
    (shard,) = checkpoint.shards
    content = shard.read_bytes()
    with safe_open(shard, framework="pt") as file:
        assert set(file.keys()) == set(checkpoint.spans)
        for name, span in checkpoint.spans.items():
            raw = bytearray(content[span.start : span.stop])
            tensor = file.get_tensor(name)
            assert torch.equal(torch.frombuffer(raw, dtype=tensor.dtype).view(tensor.shape), tensor)
