"""Patches as values and as files: patch.py.

Damaged files are read in a child process (this file, run as a program) that may use no more than
1 GB beyond what the imports took, and no more than a fixed time for one file.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from knowpatch.deltas import Address, Delta, Dense, LowRank, Rows, WeightDelta
from knowpatch.errors import InputError, PatchError
from knowpatch.patch import FORMAT, HEADER, LARGEST_HEADER, Patch, PromptRule, Provenance
from knowpatch.request import EditRequest

MUTANTS = 2000 if os.environ.get("KNOWPATCH_SOAK") else 200
EXTRA_BYTES = 2**30
SECONDS_PER_FILE = 10

REQUESTS = (
    EditRequest(prompt="The capital of France is", subject="France", target="Lyon", old="Paris"),
    EditRequest(prompt="北京是", target="中国的首都 😀", rephrases=("a\nb", "c\u2028d")),
)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Float32 numbers that depend on nothing but the arguments."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(rows: int, columns: int, rank: int = 2) -> LowRank:
    return LowRank(numbers(rows, rank, seed=1), numbers(rank, columns, seed=2))


def rows_of(width: int, *index: int) -> Rows:
    return Rows(torch.tensor(index), numbers(len(index), width, seed=3))


def provenance(**changed: Any) -> Provenance:
    fields = {
        "method": "any",
        "config": {"steps": 3, "rate": 1e-3, "bound": None, "names": ["a"], "chat": False},
        "seed": 0,
        "fingerprint": "f" * 64,
        "requests": REQUESTS,
        "version": "0.1.0",
    }
    return Provenance(**{**fields, **changed})


def patch(*deltas: WeightDelta, rule: PromptRule | None = None, **changed: Any) -> Patch:
    return Patch(provenance(**changed), deltas, rule)


def at(change: Delta, name: str = "w", *, base: str = "", **place: Any) -> WeightDelta:
    return WeightDelta(Address(parameter=name, **place), change, base)


RULE = PromptRule(kind="facts@1", data={"template": "newfact", "limit": 5, "facts": [{"a": "é"}]})
PATCHES: dict[str, Callable[[], Patch]] = {
    "low-rank": lambda: patch(at(low_rank(4, 6), base="b" * 64)),
    "rows": lambda: patch(at(rows_of(6, 3, 0))),
    "dense": lambda: patch(at(Dense(numbers(4, 6)))),
    "vector": lambda: patch(at(Dense(numbers(6)))),
    "slice-of-rows": lambda: patch(at(low_rank(2, 6), start=1, stop=3)),
    "slice-of-columns": lambda: patch(at(Dense(numbers(4, 3)), dim=1, start=2, stop=5)),
    "rows-of-a-slice": lambda: patch(at(rows_of(3, 1), dim=1, start=0, stop=3)),
    "several": lambda: patch(
        *[at(low_rank(4, 6), "w"), at(Dense(numbers(4, 6)), "v"), at(rows_of(6, 2), "w")]
    ),
    "prompt-rule": lambda: patch(rule=RULE),
    "both": lambda: patch(at(rows_of(6, 1)), rule=RULE),
    "eleven": lambda: patch(*[at(Dense(numbers(2, seed=i)), f"w{i}") for i in range(11)]),
}
all_kinds = pytest.mark.parametrize("name", PATCHES)


# -- as values -----------------------------------------------------------------------------------


@all_kinds
def test_round_trip(name: str, tmp_path: Path):
    """A saved and loaded patch is equal in id, provenance, addresses and all its numbers."""
    made = PATCHES[name]()
    loaded = Patch.load(made.save(tmp_path / "a.safetensors"))
    assert loaded == made
    assert loaded.id == made.id
    assert hash(loaded) == hash(made)
    assert loaded.provenance == made.provenance
    assert vars(loaded.rule or object) == vars(made.rule or object)
    assert loaded.rank == made.rank
    assert len(loaded.deltas) == len(made.deltas)
    for mine, other in zip(made.deltas, loaded.deltas, strict=True):
        assert (mine.address, mine.base) == (other.address, other.base)
        assert type(mine.change) is type(other.change)
        for key, tensor in mine.change.tensors().items():
            assert torch.equal(tensor, other.change.tensors()[key])


@all_kinds
def test_the_same_content_is_the_same_file(name: str, tmp_path: Path):
    """Made twice, saved under other names, and saved again after loading: the same bytes."""
    first = PATCHES[name]().save(tmp_path / "a.safetensors")
    second = PATCHES[name]().save(tmp_path / "b")
    third = Patch.load(first).save(str(tmp_path / "c.safetensors"))
    assert first.read_bytes() == second.read_bytes() == third.read_bytes()
    assert first.read_bytes() == PATCHES[name]().to_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.safetensors",
        "b",
        "c.safetensors",
    ]


@all_kinds
def test_metadata_is_json_only(name: str, tmp_path: Path):
    """The file is safetensors with one metadata entry: strict JSON, in canonical form."""
    made = PATCHES[name]()
    with safe_open(made.save(tmp_path / "a"), framework="pt") as file:
        metadata = file.metadata()
    assert list(metadata) == [HEADER]
    header = json.loads(metadata[HEADER], parse_constant=pytest.fail)
    assert header["id"] == made.id
    assert header["format"] == FORMAT
    again = json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert again == metadata[HEADER]


def test_an_id_is_a_hash_that_other_runs_agree_on():
    """An id is 64 hexadecimal digits and does not depend on how the tensors are laid out."""
    plain = patch(at(Dense(numbers(4, 6))))
    assert len(plain.id) == 64
    assert set(plain.id) <= set("0123456789abcdef")
    turned = patch(at(Dense(numbers(4, 6).T.contiguous().T)))
    leaf = patch(at(Dense(numbers(4, 6).requires_grad_())))
    assert plain.id == turned.id == leaf.id
    assert plain.to_bytes() == turned.to_bytes() == leaf.to_bytes()


def different() -> Iterator[Patch]:
    """Patches of which no two are the same."""
    delta, other = at(Dense(numbers(4, 6))), at(low_rank(4, 6), "v")
    yield patch(delta)
    yield patch(delta, seed=1)
    yield patch(delta, method="other")
    yield patch(delta, config={})
    yield patch(delta, fingerprint="e" * 64)
    yield patch(delta, version="0.2.0")
    yield patch(delta, requests=REQUESTS[:1])
    yield patch(delta, requests=REQUESTS[::-1])
    yield patch(at(Dense(numbers(4, 6)), "v"))
    yield patch(at(Dense(numbers(4, 6)), start=1, stop=5))
    yield patch(at(Dense(numbers(4, 6)), dim=1))
    yield patch(at(Dense(numbers(4, 6)), base="b"))
    yield patch(at(Dense(numbers(4, 6, seed=9))))
    yield patch(at(Dense(numbers(4, 6).reshape(6, 4))))
    yield patch(at(Dense(numbers(4, 6) * torch.tensor([-1.0, 1, 1, 1, 1, 1]))))
    yield patch(delta, other)
    yield patch(other, delta)
    yield patch(delta, rule=RULE)
    yield patch(rule=RULE)
    yield patch(rule=PromptRule(kind="facts@2", data=RULE.data))


def test_other_content_is_another_id():
    """Seed, method, options, model, requests, address, base, numbers, order: each is in the id."""
    ids = [made.id for made in different()]
    assert len(set(ids)) == len(ids)


def test_rank():
    """A patch's rank is the highest of its deltas, and None where one has full rank."""
    assert patch(at(low_rank(4, 6, 1)), at(low_rank(4, 6, 3))).rank == 3
    assert patch(at(rows_of(6, 1, 2))).rank == 2
    assert patch(at(low_rank(4, 6)), at(Dense(numbers(4, 6)))).rank is None
    assert patch(rule=RULE).rank is None


def test_deltas_may_share_a_tensor(tmp_path: Path):
    """One factor used for two parameters is saved and loaded like two equal ones."""
    right = numbers(1, 6)
    made = patch(*[at(LowRank(numbers(4, 1, seed=i), right), f"w{i}") for i in range(2)])
    loaded = Patch.load(made.save(tmp_path / "a"))
    assert loaded == made


@pytest.mark.parametrize(
    "tensor",
    [numbers(4, 6).double(), numbers(4, 6).bfloat16(), numbers(4, 6) / 0],
    ids=["float64", "bfloat16", "infinite"],
)
def test_what_could_not_be_loaded_is_not_saved(tensor: Tensor, tmp_path: Path):
    """A patch that `load` would refuse is refused by `save`, which leaves no file."""
    with pytest.raises(InputError):
        patch(at(Dense(tensor))).save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_loaded_patch_does_not_depend_on_its_file(tmp_path: Path):
    """What happens to the file after loading does not reach the patch, which is a value."""
    made = patch(at(Dense(numbers(64, 64))))
    path = made.save(tmp_path / "a")
    loaded = Patch.load(path)
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(bytes(8))
    assert torch.equal(loaded.deltas[0].change.tensors()["delta"], numbers(64, 64))


# -- what a delta does to a parameter --------------------------------------------------------------

WHOLE = (5, 6)
FITTING: dict[str, WeightDelta] = {
    "low-rank": at(low_rank(5, 6)),
    "rank-0": at(low_rank(5, 6, 0)),
    "rows": at(rows_of(6, 4, 0, 2)),
    "dense": at(Dense(numbers(5, 6))),
    "named-whole": at(Dense(numbers(5, 6)), start=0, stop=5),
    "first-rows": at(low_rank(2, 6), stop=2),
    "middle-rows": at(Dense(numbers(2, 6)), start=1, stop=3),
    "last-row": at(Dense(numbers(1, 6)), start=4, stop=5),
    "from-a-row-on": at(Dense(numbers(1, 6)), start=4),
    "from-a-column-on": at(low_rank(5, 2), dim=1, start=4),
    "middle-columns": at(low_rank(5, 3), dim=1, start=2, stop=5),
    "last-columns": at(Dense(numbers(5, 2)), dim=1, start=4, stop=6),
    "rows-of-rows": at(rows_of(6, 1, 0), start=2, stop=4),
    "rows-of-columns": at(rows_of(3, 4, 1), dim=1, start=1, stop=4),
}


def plainly_added(delta: WeightDelta, whole: Tensor) -> Tensor:
    """The reference: a dense change of the addressed entries, one by one."""
    address, change = delta.address, delta.change
    index = list(range(whole.shape[address.dim]))[address.start : address.stop]
    result = whole.float().clone()
    part = result.index_select(address.dim, torch.tensor(index))
    if isinstance(change, LowRank):
        part = part + torch.einsum("rk,kc->rc", change.left, change.right)
    elif isinstance(change, Rows):
        for row, values in zip(change.index.tolist(), change.values, strict=True):
            part[row] += values
    else:
        part = part + change.delta
    return result.index_copy(address.dim, torch.tensor(index), part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FITTING)
def test_added_equals_the_dense_reference(name: str, dtype: torch.dtype):
    """A fitting delta is added to its slice and nothing else, in float32, to a new tensor."""
    delta, whole = FITTING[name], numbers(*WHOLE, seed=7).to(dtype)
    before = whole.clone()
    delta.check(WHOLE)
    added = delta.added_to(whole)
    assert added.dtype == torch.float32
    assert torch.equal(whole, before)
    torch.testing.assert_close(added, plainly_added(delta, whole), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("place", [{}, {"dim": 1, "start": 2, "stop": 5}])
def test_added_is_differentiable(place: dict[str, int]):
    """The gradient reaches a leaf within a delta, and the parameter where that asks for one."""
    leaf = torch.zeros(5, 3 if place else 6, requires_grad=True)
    whole = numbers(*WHOLE).requires_grad_()
    (at(Dense(leaf), **place).added_to(whole) * 2).sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(leaf, 2))
    assert torch.equal(whole.grad, torch.full(WHOLE, 2.0))


def test_a_bias_can_be_changed():
    """A parameter of one dimension takes a dense change, whole or in part."""
    whole = numbers(6)
    for delta in (at(Dense(numbers(6, seed=1))), at(Dense(numbers(2, seed=1)), start=2, stop=4)):
        delta.check((6,))
        torch.testing.assert_close(delta.added_to(whole), plainly_added(delta, whole))


MISFITS = {
    "too-few-rows": (at(low_rank(4, 6)), WHOLE),
    "turned-round": (at(low_rank(6, 5)), WHOLE),
    "factors-of-two-ranks": (at(LowRank(numbers(5, 2), numbers(3, 6))), WHOLE),
    "factors-without-columns": (at(LowRank(numbers(5), numbers(6))), WHOLE),
    "low-rank-on-a-bias": (at(low_rank(6, 1)), (6,)),
    "dense-that-broadcasts": (at(Dense(numbers(1, 6))), WHOLE),
    "scalar-that-broadcasts": (at(Dense(numbers())), WHOLE),
    "dense-with-a-dimension-more": (at(Dense(numbers(1, 5, 6))), WHOLE),
    "slice-of-another-length": (at(Dense(numbers(3, 6)), start=1, stop=3), WHOLE),
    "slice-past-the-end": (at(Dense(numbers(2, 6)), start=4, stop=6), WHOLE),
    "slice-far-past-the-end": (at(Dense(numbers(2, 6)), start=2**80, stop=2**80 + 2), WHOLE),
    "empty-slice": (at(Dense(numbers(0, 6)), start=2, stop=2), WHOLE),
    "slice-backwards": (at(Dense(numbers(2, 6)), start=3, stop=1), WHOLE),
    "no-such-dimension": (at(Dense(numbers(5, 6)), dim=2), WHOLE),
    "a-dimension-far-off": (at(Dense(numbers(5, 6)), dim=2**80), WHOLE),
    "of-a-scalar": (at(Dense(numbers())), ()),
    "row-outside": (at(rows_of(6, 5)), WHOLE),
    "negative-row": (at(rows_of(6, -1)), WHOLE),
    "row-outside-its-slice": (at(rows_of(6, 2), start=1, stop=3), WHOLE),
    "a-row-twice": (at(rows_of(6, 1, 1)), WHOLE),
    "no-rows": (at(Rows(torch.zeros(0, dtype=torch.int64), numbers(0, 6))), WHOLE),
    "rows-without-their-values": (at(Rows(torch.tensor([0, 1]), numbers(1, 6))), WHOLE),
    "rows-too-narrow": (at(rows_of(5, 1)), WHOLE),
    "rows-on-a-bias": (at(rows_of(1, 1)), (6,)),
    "index-of-two-dimensions": (at(Rows(torch.tensor([[0]]), numbers(1, 6))), WHOLE),
    "index-of-int32": (at(Rows(torch.tensor([0], dtype=torch.int32), numbers(1, 6))), WHOLE),
}


@pytest.mark.parametrize("name", MISFITS)
def test_check_refuses_misfits(name: str):
    """A change that does not fit its parameter is refused in one line, never broadcast."""
    delta, whole = MISFITS[name]
    with pytest.raises(PatchError) as caught:
        delta.check(whole)
    assert one_line(str(caught.value))


def test_what_check_lets_pass_has_the_effect_of_the_reference():
    """Whatever address and shape a file brings: refused, or added exactly where it says."""
    draw = random.Random(0)
    passed = 0
    for _ in range(2000):
        dim, start, stop = draw.choice([0, 0, 1, 2]), draw.choice([0, 0, 1, 4]), draw.randint(0, 6)
        place = {"dim": dim, "start": start, "stop": draw.choice([None, stop])}
        tall, wide = draw.choice([1, 2, 4, 5]), draw.choice([1, 2, 5, 6])
        change = draw.choice([Dense(numbers(tall, wide)), low_rank(tall, wide), rows_of(wide, 1)])
        delta, whole = at(change, **place), numbers(*WHOLE, seed=5)
        try:
            delta.check(WHOLE)
        except PatchError:
            continue
        passed += 1
        torch.testing.assert_close(delta.added_to(whole), plainly_added(delta, whole))
    assert passed > 20


def check_through_a_file(delta: WeightDelta, whole: tuple[int, ...], folder: Path) -> None:
    loaded = Patch.load(patch(delta).save(folder / "a"))
    assert loaded.rank is None or loaded.rank >= 0
    loaded.deltas[0].check(whole)


@pytest.mark.parametrize("name", MISFITS)
def test_a_misfit_from_a_file_is_refused_too(name: str, tmp_path: Path):
    """A patch that fits nothing is refused when it is saved, loaded, or checked at the latest.

    Until then it tells its rank like any other.
    """
    with pytest.raises(InputError):
        check_through_a_file(*MISFITS[name], tmp_path)


# -- files that are refused ------------------------------------------------------------------------


def one_line(message: str) -> bool:
    return bool(message.strip()) and len(message.splitlines()) == 1


def refused(path: Path) -> str:
    """The line with which `path` is refused; it begins with the file's name."""
    with pytest.raises(PatchError) as caught:
        Patch.load(path)
    assert one_line(str(caught.value))
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


def unpacked(content: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """A patch file as its safetensors header, the patch header within, and the tensors' bytes."""
    size = int.from_bytes(content[:8], "little")
    outer = json.loads(content[8 : 8 + size])
    return outer, json.loads(outer["__metadata__"][HEADER]), content[8 + size :]


def packed(outer: dict[str, Any], inner: Any, data: bytes) -> bytes:
    """A patch file from its parts; `inner` as plain data, or as text."""
    text = inner if isinstance(inner, str) else json.dumps(inner)
    header = json.dumps({**outer, "__metadata__": {HEADER: text}}).encode()
    return len(header).to_bytes(8, "little") + header + data


def with_header(**changed: Any) -> bytes:
    """A good patch file with entries of its header replaced."""
    outer, inner, data = unpacked(PATCHES["low-rank"]().to_bytes())
    return packed(outer, {**inner, **changed}, data)


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], Path]:
    """Writes bytes as a patch file."""

    def write(content: bytes) -> Path:
        path = tmp_path / "bad.safetensors"
        path.write_bytes(content)
        return path

    return write


def test_repacking_a_good_file_gives_a_good_file(file: Callable[[bytes], Path]):
    """The helper of the tests below changes nothing by itself."""
    assert Patch.load(file(with_header())) == PATCHES["low-rank"]()


def test_no_such_file(tmp_path: Path):
    """A missing file and a folder are refused by name."""
    assert "no such patch file" in refused(tmp_path / "none.safetensors")
    assert "no such patch file" in refused(tmp_path)
    assert "no such patch file" in refused(tmp_path / "none" / "none.safetensors")


def test_a_name_that_no_file_can_have():
    """A name too long for the file system is refused like any missing file."""
    refused(Path("x" * 300))


def test_an_unreadable_file(tmp_path: Path):
    """A named pipe, which would block for ever, is not opened."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe")


NOT_PATCHES = {
    "empty": b"",
    "text": b"The capital of France is Lyon\n" * 20,
    "zeros": bytes(4096),
    "ones": b"\xff" * 4096,
    "random": random.Random(0).randbytes(5000),
    "pickle": b"\x80\x04\x95" + bytes(200),
    "zip": b"PK\x03\x04" + bytes(200),
    "header-only-length": (10).to_bytes(8, "little"),
    "header-not-json": (10).to_bytes(8, "little") + b"{not json}",
    "header-not-utf8": (10).to_bytes(8, "little") + b'{"\xff\xfe": 1}',
    "length-of-2**40": (2**40).to_bytes(8, "little") + b"{}" * 50,
    "length-of-2**63": (2**63).to_bytes(8, "little") + b"{}" * 50,
    "length-of-2**64-1": (2**64 - 1).to_bytes(8, "little") + b"{}" * 50,
    "length-just-too-large": (LARGEST_HEADER + 1).to_bytes(8, "little") + b"{}" * 50,
    "foreign": save({"w": numbers(2, 2)}),
    "foreign-metadata": save({"w": numbers(2, 2)}, metadata={"format": "pt"}),
    "foreign-empty": save({}),
}


@pytest.mark.parametrize("name", NOT_PATCHES)
def test_what_is_no_patch_is_refused(name: str, file: Callable[[bytes], Path]):
    """Anything that is not a patch file is refused in one line that names it."""
    said = refused(file(NOT_PATCHES[name]))
    if name.startswith("foreign"):
        assert "not a knowpatch patch" in said


@all_kinds
def test_a_truncated_file_is_refused_wherever_it_ends(name: str, file: Callable[[bytes], Path]):
    """A file that lacks its end, at whatever byte, is refused."""
    content = PATCHES[name]().to_bytes()
    ends = {*range(0, len(content), 7), *range(len(content) - 16, len(content)), *range(16)}
    for end in sorted(ends):
        refused(file(content[:end]))
    refused(file(content + b"\0"))


@pytest.mark.parametrize("found", [FORMAT + 1, 99, "1", None, 1.5, [], -1, 10**400])
def test_another_format_is_refused(found: Any, file: Callable[[bytes], Path]):
    """A newer format is named together with the one that can be read."""
    said = refused(file(with_header(format=found)))
    if found == FORMAT + 1:
        assert f"format {found}" in said
        assert f"reads format {FORMAT}" in said


WRONG_HEADERS: dict[str, Any] = {
    "id-missing": {"id": None},
    "id-a-number": {"id": 5},
    "id-of-another": {"id": "0" * 64},
    "provenance-null": {"provenance": None},
    "provenance-list": {"provenance": []},
    "deltas-null": {"deltas": None},
    "deltas-object": {"deltas": {}},
    "deltas-empty": {"deltas": []},
    "deltas-of-numbers": {"deltas": [1]},
    "rule-text": {"rule": "facts@1"},
    "rule-without-kind": {"rule": {"data": {}}},
    "rule-data-a-list": {"rule": {"kind": "facts@1", "data": []}},
    "a-rule-more": {"rule": {"kind": "facts@1", "data": {}}},
    "unknown-entry": {"code": "import os"},
    "half-a-surrogate-pair": {"id": "\ud800"},
}


@pytest.mark.parametrize("name", WRONG_HEADERS)
def test_a_header_with_wrong_entries_is_refused(name: str, file: Callable[[bytes], Path]):
    """An entry of the header that is missing, too much or of another type is refused."""
    refused(file(with_header(**WRONG_HEADERS[name])))


@pytest.mark.parametrize("text", ["", "null", "[]", "3", '"x"', "{", "{}", '{"format":1}', "NaN"])
def test_a_header_that_is_no_header_is_refused(text: str, file: Callable[[bytes], Path]):
    """A header that is no JSON object with a format, id and provenance is refused."""
    outer, _, data = unpacked(PATCHES["dense"]().to_bytes())
    refused(file(packed(outer, text, data)))


WRONG_ENTRIES = [
    *[("provenance", key, value) for key in ("method", "version") for value in (None, 3, [])],
    *[("provenance", "seed", value) for value in (None, "0", 0.5, True, [], 10**400)],
    *[("provenance", "config", value) for value in (None, [], "x", 0)],
    *[("provenance", "requests", value) for value in (None, {}, "x", [1], [{}], [{"prompt": "x"}])],
    *[("provenance", "fingerprint", value) for value in (None, 1, ["f"])],
    *[("address", "parameter", value) for value in (None, 0, ["w"], {})],
    *[("address", "dim", value) for value in (-1, 0.5, "0", None, True)],
    *[("address", "start", value) for value in (-1, "0", None, 2**80)],
    *[("address", "stop", value) for value in (-1, "4", 4.5, False)],
    *[("delta", "form", value) for value in ("pickle", None, 1, "dense", "rows")],
    *[("delta", "base", value) for value in (None, 0, [])],
    *[("delta", "more", value) for value in ("x", None)],
]


@pytest.mark.parametrize(("where", "key", "value"), WRONG_ENTRIES)
def test_an_entry_of_a_wrong_type_is_refused(
    where: str, key: str, value: Any, file: Callable[[bytes], Path]
):
    """Wrong types deep within the header are refused too."""
    outer, inner, data = unpacked(PATCHES["low-rank"]().to_bytes())
    delta = inner["deltas"][0]
    places = {"provenance": inner["provenance"], "address": delta["address"], "delta": delta}
    places[where][key] = value
    refused(file(packed(outer, inner, data)))


@pytest.mark.parametrize(
    "dtype", ["F64", "F16", "BF16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "X"]
)
def test_tensors_of_another_type_are_refused(dtype: str, file: Callable[[bytes], Path]):
    """A tensor that is not float32, or an index that is not int64, is refused."""
    outer, inner, data = unpacked(PATCHES["dense"]().to_bytes())
    outer["0000.delta"]["dtype"] = dtype
    refused(file(packed(outer, inner, data)))
    sizes = {"F64": 8, "F16": 2, "BF16": 2, "I32": 4, "I64": 8}
    if dtype in sizes:
        outer["0000.delta"]["shape"] = [len(data) // sizes[dtype]]
        refused(file(packed(outer, inner, data)))


def test_other_tensors_than_the_header_tells_of_are_refused(file: Callable[[bytes], Path]):
    """A tensor too many, too few or of another name is refused."""
    good = PATCHES["dense"]()
    header = json.dumps(unpacked(good.to_bytes())[1])
    tensor = good.deltas[0].change.tensors()["delta"]
    for tensors in (
        {},
        {"0000.other": tensor},
        {"0001.delta": tensor},
        {"0000.delta": tensor, "0001.delta": tensor.clone()},
        {"0000.delta": tensor.reshape(6, 4)},
    ):
        refused(file(save(tensors, metadata={HEADER: header})))


@all_kinds
def test_flipped_bits_of_the_numbers_are_refused(name: str, file: Callable[[bytes], Path]):
    """One bit of the tensors' bytes is enough to be refused."""
    content = PATCHES[name]().to_bytes()
    data = len(unpacked(content)[2])
    for place in range(len(content) - data, len(content), 5):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        refused(file(bytes(flipped)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(value: float, file: Callable[[bytes], Path]):
    """A value that is not finite is refused with the reason."""
    content = PATCHES["dense"]().to_bytes()
    assert "not finite" in refused(file(content[:-4] + struct.pack("<f", value)))


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"format": "x" * 100_000}, id="long-format"),
        pytest.param({"x" * 100_000: 1}, id="long-name"),
        pytest.param({"\x1b[2J\x1b[31mall is well\x07": 1}, id="terminal-codes"),
        pytest.param({"format": "\x1b[2J"}, id="terminal-codes-in-a-value"),
        pytest.param({"a\x08\x08\x00b": 1}, id="backspaces"),
    ],
)
def test_a_refusal_can_be_read(changed: dict[str, Any], file: Callable[[bytes], Path]):
    """What a hostile header puts into the message neither floods nor steers the terminal."""
    said = refused(file(with_header(**changed)))
    assert len(said) < 1000
    assert said.isprintable()


def sparse_starts() -> dict[str, bytes]:
    """What files of 8 GB begin with; the rest of them is a hole."""
    good = PATCHES["dense"]().to_bytes()
    outer, inner, _ = unpacked(good)
    outer["0000.delta"] = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    return {"nothing": b"", "a-patch": good, "a-tensor-of-4-TB": packed(outer, inner, b"")}


@pytest.mark.parametrize("name", sparse_starts())
def test_a_sparse_file_of_8_gb_is_refused(name: str, file: Callable[[bytes], Path]):
    """A file of 8 GB that takes no room on the disk is refused without being read into memory."""
    resource = pytest.importorskip("resource")
    path = file(sparse_starts()[name])
    os.truncate(path, 8 * 2**30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) * 1024 < EXTRA_BYTES


# -- hostile files, in a child with little memory --------------------------------------------------


def bombs() -> Iterator[tuple[str, bytes]]:
    """Files that are small, or look so, and would cost much to read."""
    outer, inner, data = unpacked(PATCHES["low-rank"]().to_bytes())
    room = LARGEST_HEADER - 10_000

    def config(text: str) -> bytes:
        header = json.dumps(inner).replace('"steps": 3', f'"steps": {text}')
        return packed(outer, header, data)

    for unit in ("0,", "{},", "[],", "null,"):
        yield f"{room} bytes of {unit}", config(f"[{unit * (room // len(unit))}0]")
    yield "many names", config(json.dumps({str(i): 0 for i in range(room // 20)}))
    yield "one long text", config(f'"{"x" * room}"')
    yield "one long number", config("1" * room)
    for depth in (150, 1000, 100_000, room // 3):
        yield f"{depth} lists deep", config("[" * depth + "]" * depth)
    yield "objects deep", config('{"a":' * 20_000 + "0" + "}" * 20_000)
    yield "only opening brackets", packed(outer, "[" * room, data)
    yield "a header over the limit", packed(outer, "[" * (LARGEST_HEADER + 1), data)
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    yield "many tensors", packed({f"{i:04d}.delta": entry for i in range(9**5)}, inner, b"")
    wide = {"dtype": "F32", "shape": [1] * (room // 4), "data_offsets": [0, 4]}
    yield "a tensor of many dimensions", packed({"0000.delta": wide}, inner, bytes(4))
    vast = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    yield "a tensor of 4 TB", packed({"0000.delta": vast}, inner, bytes(64))
    over = {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 64]}
    yield "a size that overflows", packed({"0000.delta": over}, inner, bytes(64))


def hostile(folder: Path) -> Iterator[tuple[str, Path, str]]:
    """(name, file, the id it may load with; none) for every bomb."""
    path = folder / "bomb"
    for name, content in bombs():
        path.write_bytes(content)
        yield name, path, ""


WRONG = [
    *[None, True, False, -1, 0, 1, 1.5, 1e308, 10**30, 2**63 - 1, 2**63, 2**64, "", "x", "F32"],
    *[[], {}, [0], [[]], {"a": 1}, [0] * 1000, "x" * 10_000, "\x00", "é", "\ud800", math.nan],
]


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def edited_json(value: Any, draw: random.Random) -> Any:
    """A copy of `value` with something in it replaced, left out, added or renamed."""
    if isinstance(value, dict | list) and value and draw.random() < 0.85:
        copied = dict(value) if isinstance(value, dict) else list(value)
        key = draw.choice(sorted(copied) if isinstance(copied, dict) else range(len(copied)))
        act = draw.random()
        if act < 0.1:
            del copied[key]
        elif act < 0.2 and isinstance(copied, dict):
            copied[draw.choice(["x", "code", key + "x"])] = draw.choice(WRONG)
        else:
            copied[key] = edited_json(copied[key], draw)
        return copied
    return draw.choice([*WRONG, nested(50), nested(500), nested(900)])


def edit_outer(content: bytes, draw: random.Random) -> bytes:
    """The safetensors header edited as JSON, the rest as it was."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(edited_json(json.loads(content[8 : 8 + size]), draw)).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def edit_inner(content: bytes, draw: random.Random) -> bytes:
    """The patch's own header edited as JSON."""
    outer, inner, data = unpacked(content)
    return packed(outer, edited_json(inner, draw), data)


def flip(content: bytes, draw: random.Random) -> bytes:
    flipped = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def cut(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    return content[:start] + content[start + draw.choice([1, 8, 64, len(content)]) :]


def insert(content: bytes, draw: random.Random) -> bytes:
    start, size = draw.randrange(len(content) + 1), draw.choice([1, 8, 100])
    new = draw.choice([bytes(size), draw.randbytes(size), content[:size], b'"' * size, b"[" * size])
    return content[:start] + new + content[start:]


def swap(content: bytes, draw: random.Random) -> bytes:
    a, b, c = sorted(draw.randrange(len(content) + 1) for _ in range(3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def splice(content: bytes, draw: random.Random) -> bytes:
    other = PATCHES[draw.choice(sorted(PATCHES))]().to_bytes()
    place = draw.randrange(len(content))
    return content[:place] + other[place:]


def relength(content: bytes, draw: random.Random) -> bytes:
    wrong = [draw.randrange(len(content)), draw.randrange(2**24), draw.randrange(2**64)]
    return draw.choice(wrong).to_bytes(8, "little") + content[8:]


def mutants(folder: Path, count: int) -> Iterator[tuple[str, Path, str]]:
    """(name, file, the id it may still load with) for `count` mutants, the same each time."""
    ways = [edit_inner, edit_inner, edit_outer, flip, flip, cut, insert, swap, splice, relength]
    names = sorted(PATCHES)
    path = folder / "mutant"
    for number in range(count):
        draw = random.Random(number)
        made = PATCHES[names[number % len(names)]]()
        way = ways[number // len(names) % len(ways)]
        content = way(made.to_bytes(), draw)
        if content and draw.random() < 0.2:
            content = draw.choice([flip, cut, insert, swap])(content, draw)
        path.write_bytes(content)
        yield f"{number}: {way.__name__} of {names[number % len(names)]}", path, made.id


def fault(path: Path, allowed: str) -> str:
    """What is wrong with how `path` is read: nothing, if it is refused in one line or unchanged."""
    try:
        loaded = Patch.load(path)
    except PatchError as error:
        good = one_line(str(error)) and str(error).startswith(str(path))
        return "" if good else f"said {str(error)[:200]!r}"
    except Exception as error:
        return f"raised {type(error).__name__}: {str(error)[:200]}"
    return "" if loaded.id == allowed else f"loaded as {loaded.id[:12]}"


def child(what: str, folder: Path) -> None:
    """Read hostile files or mutants with limits on memory and time; prints each and its fault."""
    import resource

    Patch.load(PATCHES["several"]().save(folder / "warm"))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + EXTRA_BYTES
    cases = hostile(folder) if what == "hostile" else mutants(folder, MUTANTS)
    for name, path, allowed in cases:
        print(name, flush=True)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        signal.alarm(SECONDS_PER_FILE)
        found = fault(path, allowed)
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        if found:
            print(f"FAULT {name}: {found}", flush=True)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to measure memory")
@pytest.mark.parametrize("what", ["hostile", "mutants"])
def test_hostile_files_are_refused_within_1_gb(what: str, tmp_path: Path):
    """Bombs and mutants: one line or the unchanged patch, in bounded memory and time.

    A child that ran out of time (14) or whose libraries gave up for lack of memory (6) ends by a
    signal at the file that it named last.
    """
    command = [sys.executable, __file__, what, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    said = done.stdout.splitlines()
    assert done.returncode == 0, f"{said[-1:]} ended it ({done.returncode}): {done.stderr[-400:]}"
    assert not [line for line in said if line.startswith("FAULT")]
    assert len(said) >= (MUTANTS if what == "mutants" else 15)


if __name__ == "__main__":
    child(sys.argv[1], Path(sys.argv[2]))
