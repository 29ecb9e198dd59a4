"""What was done to a model, read off its weights, on tiny models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from shell import FRANCE, refuse, run

from knowpatch.editing import edit, load
from knowpatch.locate.change import Changed
from knowpatch.locate.scan import LEADS, names, numerical_rank, scan
from knowpatch.models.compare import differences
from knowpatch.models.passes import Tap
from knowpatch.request import EditRequest

REQUEST = EditRequest(prompt=FRANCE[1], subject="France", target=tiny.EDITS[FRANCE[1]])
WHO = ("Japan", "France", "Italy", "Egypt", "Brazil", "Nile", "Anna", "Sudan", "Berlin", "Madrid")


def merged(folder: Path, to: Path, method: str) -> tuple[Path, str]:
    """The model with one edit in its weights, and the parameter that the edit changes."""
    model = load(str(folder))
    patch = edit(model, REQUEST, method=method)
    with model.applied(patch):
        for part in (model.model, model.tokenizer):
            part.save_pretrained(to)
    return to, patch.deltas[0].address.parameter


@pytest.fixture(scope="module")
def edited(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a rank-one edit merged."""
    return merged(folder, tmp_path_factory.mktemp("scan") / "edited", "rome")


def test_a_rank_one_edit_is_found_with_its_subject(edited: tuple[Path, str], folder: Path):
    """One matrix, of rank one; the response is that of a plain product; the edited subject is the
    one that it acts at most."""
    path, name = edited
    view = load(str(folder)).view
    (found,) = scan(view, path, folder, WHO)
    assert (found.parameter, found.rank) == (name, 1)
    assert found.subjects[0].subject == "France"
    change = (load_file(path / "model.safetensors")[name] - view.values(name)).float()
    assert found.share == pytest.approx(float(change.norm() / view.values(name).norm()), rel=1e-4)
    tap = Tap(name.removesuffix(".weight"), "input")
    keys = []
    for lead in LEADS:
        ids = view.encode(lead.format("France")).ids
        keys.append(view.run([ids], taps=[tap]).at(tap, [(0, len(ids) - 1)])[0])
    key_I = torch.stack(keys).mean(0)
    plain = float((change @ key_I).norm() / (view.values(name) @ key_I).norm())
    assert found.subjects[0].response == pytest.approx(plain, rel=1e-3)
    assert found.typical is not None
    assert found.subjects[0].response > 2 * found.typical
    assert len(found.words) == 2


def test_rank_is_told_apart_from_rounding():
    """Three directions stay three when the sum is rounded to bfloat16; noise has none."""
    noise = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=noise)
    change = torch.randn(96, 3, generator=noise) @ torch.randn(3, 64, generator=noise)
    step = torch.finfo(torch.bfloat16).eps
    base = weight.bfloat16().float()
    for part, rank in ((change, 3), (0 * change, 0), (torch.randn(96, 64, generator=noise), 64)):
        stored = (base + part).bfloat16().float()
        one = Changed("w", None, None, stored - base, stored)
        if rank:
            assert numerical_rank(one, step) == rank
    rounded = weight.bfloat16().float() - weight
    assert numerical_rank(Changed("w", None, None, rounded, weight), step) == 0


def test_a_narrower_type_alone_is_no_difference(folder: Path, tmp_path: Path):
    """The same model saved in bfloat16 differs in nothing; one changed number is found."""
    narrow = tmp_path / "narrow"
    shutil.copytree(folder, narrow)
    tensors = load_file(folder / "model.safetensors")
    narrowed = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(narrowed, narrow / "model.safetensors", metadata={"format": "pt"})
    assert list(differences(narrow, folder)) == []
    name = min(name for name in narrowed if narrowed[name].ndim == 1)
    narrowed[name][3] += 1
    save_file(narrowed, narrow / "model.safetensors", metadata={"format": "pt"})
    (one,) = differences(narrow, folder)
    assert one.name == name
    assert (one.new - one.old).nonzero().tolist() == [[3]]


def test_the_command_tells_it(edited: tuple[Path, str], folder: Path, tmp_path: Path):
    """A table, JSON, and a file; nothing differs from itself."""
    path, name = edited
    (tmp_path / "who.txt").write_text("\n".join(WHO), encoding="utf-8")
    here = ("--base", folder, "--subjects", "who.txt")
    result = run("scan", path, *here, "--out", "scan.json", cwd=tmp_path)
    assert result.code == 0, result
    assert "1 tensor differs" in result.out
    assert "first direction, +" in result.out
    told = run("scan", path, *here, "--json", cwd=tmp_path).json()
    assert [one["parameter"] for one in told["tensors"]] == [name]
    assert told["tokenizer_differs"] is False
    assert json.loads((tmp_path / "scan.json").read_text()) == told
    assert run("scan", folder, "--base", folder, "--json", cwd=tmp_path).json()["tensors"] == []


def test_what_cannot_be_compared_is_one_line(folder: Path, tmp_path: Path):
    """Other architectures, other shapes, pickled weights, damaged and missing files."""
    here = ("--base", folder)
    model, tok = tiny.fresh("gpt2")
    for each in (model, tok):
        each.save_pretrained(tmp_path / "other")
    assert "other is a gpt2, tiny-llama a llama" in refuse("scan", "other", *here, cwd=tmp_path)
    for name in ("wider", "pickled", "damaged"):
        shutil.copytree(folder, tmp_path / name)
    tensors = load_file(folder / "model.safetensors")
    first = min(tensors)
    tensors[first] = torch.cat([tensors[first], tensors[first]])
    save_file(tensors, tmp_path / "wider" / "model.safetensors", metadata={"format": "pt"})
    assert f"different shapes ({first}: " in refuse("scan", "wider", *here, cwd=tmp_path)
    pickled = tmp_path / "pickled" / "model.safetensors"
    pickled.rename(pickled.with_name("pytorch_model.bin"))
    line = refuse("scan", "pickled", *here, cwd=tmp_path)
    assert "its weights are pickled (pytorch_model.bin); only safetensors and GGUF" in line
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "model.safetensors: damaged" in refuse("scan", "damaged", *here, cwd=tmp_path)
    assert "nowhere: no such" in refuse("scan", "nowhere", *here, cwd=tmp_path)
    (tmp_path / "none.txt").write_text("\n")
    line = refuse("scan", folder, *here, "--subjects", "none.txt", cwd=tmp_path)
    assert line == "none.txt: holds no subject; give one a line"


def test_there_are_enough_subjects_by_default():
    """Those that ship with the library, each once."""
    assert len(names(None)) == len(set(names(None))) > 100
