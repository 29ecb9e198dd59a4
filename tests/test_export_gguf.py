"""GGUF exports: the source file but for the changed tensors, as llama.cpp lays them out."""

from __future__ import annotations

import gguf
import ggufs
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from made import state
from patches import FRANCE, NILE, address, answering, change_of, changed, patch_of

from knowpatch.deltas import Dense, LowRank, Rows
from knowpatch.editing import load
from knowpatch.errors import InputError, ModelError, OptionError, PatchError
from knowpatch.export.gguf import Gguf
from knowpatch.export.gguf_lora import added
from knowpatch.export.ship import pack, ship
from knowpatch.models.gguf_file import GgufFile, Layout, encoded, type_called, writable

Type = gguf.GGMLQuantizationType
ROLES = ("mlp.out", "mlp.up", "attn.out", "attn.q", "attn.k", "attn.v")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """GGUF files of tiny models: files("llama", Type.Q8_0)."""
    root, made = tmp_path_factory.mktemp("ggufs"), {}

    def file(architecture="llama", kind=Type.F32):
        if (architecture, kind) not in made:
            path = root / f"{architecture}-{kind.name}.gguf"
            made[architecture, kind] = ggufs.write(path, architecture, kind)
        return made[architecture, kind]

    return file


def tensors(path):
    """Type and raw bytes of each tensor, by name."""
    reader = gguf.GGUFReader(path)
    return {t.name: (t.tensor_type, t.data.tobytes()) for t in reader.tensors}


def metadata(path):
    """The bytes of all metadata, as they stand in the file."""
    reader = gguf.GGUFReader(path)
    return bytes(reader.data[: reader.tensors[0].field.offset])


def worst(parity):
    return max(parity.edits_difference, parity.controls_difference)


# -- how tensors lie -------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("turned", [False, True])
def test_a_layout_is_a_permutation_by_halves(turned, heads):
    """Turned or not, the outputs of each head come by turns from its first and second half."""
    stored = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    filed = ggufs.permuted(stored.T if turned else stored, heads)
    assert torch.equal(Layout(turned, heads).filed(stored), filed)
    assert torch.equal(Layout(turned, heads).rows(stored), ggufs.permuted(stored, heads))


def test_rows_that_a_permutation_does_not_divide():
    """A layout by heads fits only what has rows for each half of each head."""
    assert Layout(heads=4).fits((48, 5))
    assert not Layout(heads=5).fits((48, 5))
    assert not Layout().fits((48,))
    assert Layout(turned=True, heads=4).fits((5, 48))
    assert not Layout(turned=True, heads=4).fits((48, 5))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_lies_how(files, architecture):
    """Llama's query and key rows are permuted, GPT-2's maps are turned, all else is as it is."""
    model, file = load(str(files(architecture))), GgufFile(files(architecture))
    for role in ROLES:
        name = address(model, role=role).parameter
        layout = file.layout(file.name_of(name), model.view.values(name), model.config)
        heads = {"attn.q": 4, "attn.k": 2}.get(role, 0) if architecture == "llama" else 0
        assert layout == Layout(turned=architecture == "gpt2", heads=heads), role


# -- the file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0])
def test_all_else_is_byte_for_byte(files, tmp_path, kind):
    """Metadata and every other tensor keep their bytes; the changed one is the fold of its own."""
    source = files("llama", kind)
    model = load(str(source))
    before = state(model)
    patch = changed(model)
    shipped = ship(model, [patch], "gguf", tmp_path / "new.gguf")
    assert state(model) == before
    assert metadata(tmp_path / "new.gguf") == metadata(source)
    old, new = tensors(source), tensors(tmp_path / "new.gguf")
    name = GgufFile(source).name_of(patch.deltas[0].address.parameter)
    assert list(old) == list(new)
    assert {n for n in old if old[n] != new[n]} == {name}
    written = Type.F16 if kind == Type.Q8_0 else kind
    assert new[name][0] == written
    start = GgufFile(source).values(name)
    wanted = patch.deltas[0].added_to(start).numpy()
    assert new[name][1] == wanted.astype(np.float32 if kind == Type.F32 else np.float16).tobytes()
    assert f"as {written.name}" in shipped.notes[0]
    limit = 0.0 if kind == Type.F32 else 1e-2
    assert worst(shipped.parity) <= limit


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_map_is_written_where_its_reader_finds_it(files, tmp_path, architecture):
    """Whatever map is changed, transformers reads the patched model out of the file, exactly."""
    model = load(str(files(architecture)))
    patches = [changed(model, role=role, seed=i, size=0.3) for i, role in enumerate(ROLES)]
    patches += [changed(model, Rows, role=role, seed=i) for i, role in enumerate(ROLES)]
    shipped = ship(model, patches, "gguf", tmp_path / "new.gguf")
    assert shipped.parity.exact
    adapter = ship(model, patches, "gguf-lora", tmp_path / "adapter.gguf")
    assert worst(adapter.parity) < 1e-4


def test_an_edit_is_still_answered_at_f16(files, tmp_path):
    """Half precision moves no logit by 1e-2 and keeps the answers."""
    model = load(str(files()))
    patches = [answering(model), answering(model, NILE)]
    shipped = ship(model, patches, Gguf("f16"), tmp_path / "new.gguf")
    assert 0 < worst(shipped.parity) < 1e-2
    assert (shipped.parity.before, shipped.parity.after, shipped.parity.lost) == (2, 2, ())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16"])
def test_a_shorter_type_is_written_as_gguf_writes_it(files, tmp_path, kind):
    """What stands in the file is the type's rounding of the fold."""
    model = load(str(files()))
    patch = changed(model)  # rows of 96 numbers: three blocks
    pack(model, [patch], Gguf(kind), tmp_path / "new.gguf")
    name = GgufFile(files()).name_of(patch.deltas[0].address.parameter)
    read = {t.name: t for t in gguf.GGUFReader(tmp_path / "new.gguf").tensors}[name]
    assert read.tensor_type == Type[kind]
    with model.applied(patch):
        wanted = model.view.values(patch.deltas[0].address.parameter).clone()
    rounded = dequantize(encoded(wanted, Type[kind]), Type[kind])
    assert np.array_equal(dequantize(read.data, read.tensor_type), rounded)


def test_a_tied_head_in_a_gguf(files, tmp_path):
    """GPT-2's head is its embedding: one tensor of the file, changed where it is named."""
    model = load(str(files("gpt2")))
    head = f"{model.view.roles.head}.weight"
    change = change_of(LowRank, model.view.parameter(head).shape, size=0.01)
    patch = patch_of(model, (head, change))
    with pytest.raises(PatchError, match="is tied"):
        ship(model, [patch], "gguf", tmp_path / "new.gguf")
    assert ship(model, [patch], "gguf", tmp_path / "new.gguf", tied=[head]).parity.exact
    old, new = tensors(files("gpt2")), tensors(tmp_path / "new.gguf")
    assert {n for n in old if old[n] != new[n]} == {"token_embd.weight"}


def test_a_file_with_a_name_and_other_alignment(tmp_path):
    """Alignment is the file's own, and text metadata of any kind stays."""
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_custom_alignment(64)
    writer.add_string("general.name", "größer")
    made = torch.Generator().manual_seed(0)
    values = {f"t{n}": torch.randn(n, 32, generator=made) for n in (1, 3, 5)}
    for name, value in values.items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "small.gguf")
    assert file.alignment == 64
    file.rewrite(tmp_path / "same.gguf", {})
    same = (tmp_path / "same.gguf").read_bytes()
    assert same == (tmp_path / "small.gguf").read_bytes()
    file.rewrite(tmp_path / "new.gguf", {"t3": (2 * values["t3"], Type.Q8_0)})
    new = GgufFile(tmp_path / "new.gguf")
    assert new.field("general.name") == "größer"
    assert all(tensor.data_offset % 64 == 0 for tensor in new.reader.tensors)
    assert torch.equal(new.values("t5"), values["t5"])
    assert torch.allclose(new.values("t3"), 2 * values["t3"], atol=0.05)


# -- the adapter -----------------------------------------------------------------------------------


def test_an_adapter_as_llama_cpp_reads_it(files, tmp_path):
    """Type, kind, architecture, alpha, and a pair of factors for each changed tensor."""
    model = load(str(files()))
    patches = [changed(model, role="attn.q", rank=3), changed(model, seed=1, rank=1)]
    ship(model, patches, "gguf-lora", tmp_path / "adapter.gguf")
    file = GgufFile(tmp_path / "adapter.gguf")
    assert file.architecture == "llama"
    assert file.field("general.type") == "adapter"
    assert file.field("adapter.type") == "lora"
    assert file.field("adapter.lora.alpha") == 3.0
    assert set(file.tensors) == {
        f"blk.1.{name}.weight.lora_{half}" for name in ("attn_q", "ffn_down") for half in "ab"
    }
    q, down = patches[0].deltas[0].change, patches[1].deltas[0].change
    changes = added(file)
    wanted = ggufs.permuted(q.left @ q.right, 4)
    assert torch.allclose(changes["blk.1.attn_q.weight"], wanted, atol=1e-6)
    assert torch.allclose(changes["blk.1.ffn_down.weight"], down.left @ down.right, atol=1e-6)
    shape = [int(n) for n in file.tensors["blk.1.ffn_down.weight.lora_a"].shape]
    assert shape == [96, 3]  # as ggml counts: inputs first


def test_an_adapter_of_a_dense_patch_is_truncated(files, tmp_path):
    """As with PEFT: the rank that was asked for, and the share that it leaves out."""
    from knowpatch.export.gguf_lora import GgufLora

    model = load(str(files()))
    shipped = ship(model, [changed(model, Dense)], GgufLora(5), tmp_path / "adapter.gguf")
    assert "rank 5 in 1 map" in shipped.notes[0]
    assert "leave out" in shipped.notes[1]


def test_an_adapter_for_another_model_is_refused(files, tmp_path):
    """What is read back must say that it is for the model's architecture."""
    model = load(str(files()))
    packed = pack(model, [changed(model)], "gguf-lora", tmp_path / "adapter.gguf")
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", "gpt2")
    writer.add_float32("adapter.lora.alpha", 1.0)
    writer.add_tensor("t.lora_a", np.zeros((1, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="adapter for gpt2 models"):
        packed.check()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.gguf"]


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["gguf", "gguf-lora"])
def test_a_model_that_came_from_no_gguf(folders, tmp_path, target):
    """There is no file to write into; the message says how to have one."""
    model = load(str(folders("llama")))
    with pytest.raises(ModelError, match=r"not loaded from a GGUF file.*--model FILE\.gguf"):
        ship(model, [changed(model)], target, tmp_path / "new.gguf")
    assert not list(tmp_path.iterdir())


def test_types_that_cannot_be_written(files, tmp_path):
    """A type that the library only reads, none at all, and one whose blocks do not fit."""
    model = load(str(files()))
    assert {"F32", "F16", "BF16", "Q8_0", "Q4_1"} <= set(writable())
    for name in ("Q4_K", "Q9"):
        with pytest.raises(OptionError, match=f"type '{name}' cannot be written: .*allowed: .*F16"):
            ship(model, [changed(model)], Gguf(name), tmp_path / "new.gguf")
    with pytest.raises(OptionError, match=r"rows of 48 numbers .* blocks of 32: give"):
        ship(model, [changed(model, role="mlp.up")], Gguf("Q8_0"), tmp_path / "new.gguf")
    assert not list(tmp_path.iterdir())
    assert type_called("q8_0") == Type.Q8_0


def test_a_tensor_that_lies_in_no_known_way(files, tmp_path):
    """A file whose numbers are not the model's in any order is not written into."""
    model = load(str(files()))
    file = GgufFile(files())
    name = address(model).parameter
    with pytest.raises(ModelError, match="in any way that can be written back"):
        file.layout(file.name_of(name), model.view.values(name) + 1e-3, model.config)
    norm = next(n for n, p in model.model.named_parameters() if p.ndim == 1)
    patch = patch_of(model, (norm, Dense(torch.ones(48))))
    with pytest.raises(ModelError, match="in any way that can be written back"):
        ship(model, [patch], "gguf", tmp_path / "new.gguf")
    with pytest.raises(ModelError, match=r"has no tensor for model\.nothing\.weight"):
        file.name_of("model.nothing.weight")


def test_files_that_are_no_gguf(tmp_path):
    """Other files are refused in one line; one of an unknown kind has no names for its tensors."""
    (tmp_path / "text.gguf").write_text("not a model, but long enough to be looked at")
    with pytest.raises(ModelError, match="cannot be read as a GGUF file"):
        GgufFile(tmp_path / "text.gguf")
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "no-such-kind")
    writer.add_tensor("t", np.zeros((1, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    odd = GgufFile(tmp_path / "odd.gguf")
    with pytest.raises(ModelError, match="'no-such-kind' are not known by name"):
        odd.name_of("t")
    with pytest.raises(ModelError, match=r"lacks general\.name"):
        odd.field("general.name")


def test_a_gguf_is_not_overwritten(files, tmp_path):
    """Nor the model's own file; with force another file, whole or not at all."""
    own = tmp_path / "own.gguf"
    own.write_bytes(files().read_bytes())
    model = load(str(own))
    with pytest.raises(InputError, match="replace it with --force"):
        ship(model, [changed(model)], "gguf", own)
    with pytest.raises(InputError, match="is the model itself"):
        ship(model, [changed(model)], "gguf", own, force=True)
    (tmp_path / "other.gguf").write_bytes(b"old")
    with pytest.raises(InputError, match="replace it with --force"):
        ship(model, [changed(model)], "gguf", tmp_path / "other.gguf")
    ship(model, [changed(model)], "gguf", tmp_path / "other.gguf", force=True)
    assert own.read_bytes() == files().read_bytes()
    assert tensors(tmp_path / "other.gguf").keys() == tensors(own).keys()
    assert FRANCE.prompt
