"""Files that are written whole or not at all, and what is remembered: files.py."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from knowpatch import files
from knowpatch.errors import InputError
from knowpatch.files import (
    cache_folder,
    file_digest,
    plain_storage_errors,
    remembered,
    replacing,
    write_atomically,
)

ENDINGS = [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError, InputError, GeneratorExit]


def full(*args: object, **kwargs: object) -> None:
    """What the system does on a full disk."""
    raise OSError(errno.ENOSPC, "No space left on device")


def fail_half_way(temporary: Path, ending: type[BaseException]) -> None:
    """Half of some work on `temporary`, and then what ends it."""
    temporary.parent.mkdir(exist_ok=True)
    temporary.write_bytes(b"half")
    raise ending("stop")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file with old content, alone in its folder."""
    path = tmp_path / "out" / "a.bin"
    path.parent.mkdir()
    path.write_bytes(b"old")
    return path


def untouched(old: Path) -> bool:
    """Whether the old file is whole and nothing else lies beside it."""
    return old.read_bytes() == b"old" and list(old.parent.iterdir()) == [old]


# -- replacing -------------------------------------------------------------------------------------


def test_a_file_is_written_and_replaced(tmp_path: Path):
    """The content is there under the wanted name, in folders made for it, and nothing beside it."""
    path = tmp_path / "deep" / "er" / "a.bin"
    assert write_atomically(str(path), b"one") == path
    assert write_atomically(path, b"") == path
    assert path.read_bytes() == b""
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_written(tmp_path: Path):
    """A folder takes its place whole, and an empty one is replaced."""
    path = tmp_path / "model"
    path.mkdir()
    with replacing(path, folder=True) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("x")
        assert not list(path.iterdir())
    assert (path / "sub" / "a").read_text() == "x"
    assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_lies_beside_its_place(tmp_path: Path):
    """The rename never crosses file systems: the temporary is in the same folder."""
    path = tmp_path / "a.bin"
    with replacing(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary != path
        assert not path.exists()
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.skipif(sys.platform == "win32", reason="modes are of POSIX")
def test_what_is_written_can_be_read_by_others(tmp_path: Path):
    """A file and a folder are not left with the private mode of a temporary one."""
    write_atomically(tmp_path / "a", b"x")
    with replacing(tmp_path / "b", folder=True):
        pass
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) & 0o444 == 0o444
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) & 0o555 == 0o555


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_block_that_fails_leaves_the_old_file(ending: type[BaseException], old: Path):
    """Whatever ends the block, the old file stays, no temporary does, and the reason comes out."""
    with pytest.raises(ending), replacing(old) as temporary:
        fail_half_way(temporary, ending)
    assert untouched(old)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_block_that_fails_leaves_no_folder(ending: type[BaseException], tmp_path: Path):
    """A folder that is not finished vanishes with all that is in it."""
    with pytest.raises(ending), replacing(tmp_path / "model", folder=True) as temporary:
        fail_half_way(temporary / "sub" / "half", ending)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_in_use_is_left_alone(tmp_path: Path):
    """A folder with something in it is not replaced: one line, and what was there stays."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "mine").write_text("mine")
    with pytest.raises(InputError) as caught, replacing(path, folder=True) as temporary:
        (temporary / "new").write_text("new")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert [p.name for p in path.iterdir()] == ["mine"]


def test_two_writers_do_not_meet(old: Path):
    """Two that write the same file at once each write their own; the last to finish stays."""
    with replacing(old) as first:
        first.write_bytes(b"first")
        with replacing(old) as second:
            second.write_bytes(b"second")
        assert old.read_bytes() == b"second"
    assert old.read_bytes() == b"first"
    assert list(old.parent.iterdir()) == [old]


# -- what the system refuses -----------------------------------------------------------------------


def said(caught: pytest.ExceptionInfo[InputError], path: Path) -> str:
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    assert caught.value.__suppress_context__
    return message


@pytest.mark.parametrize("where", ["write_bytes", "replace", "mkstemp"])
def test_a_full_disk_is_one_line(where: str, old: Path, monkeypatch: pytest.MonkeyPatch):
    """A disk that is full while writing, renaming or opening: one line, and nothing is changed."""
    with monkeypatch.context() as patched:
        owner = {"write_bytes": Path, "replace": os, "mkstemp": files.tempfile}[where]
        patched.setattr(owner, where, full)
        with pytest.raises(InputError) as caught:
            write_atomically(old, b"new")
    assert "the disk is full, nothing was written" in said(caught, old)
    assert untouched(old)


def test_a_disk_that_fills_up_half_way(old: Path, monkeypatch: pytest.MonkeyPatch):
    """Half a file on a full disk does not become the file."""
    write = Path.write_bytes

    def half(path: Path, content: bytes) -> None:
        write(path, content[: len(content) // 2])
        full()

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(InputError, match="disk is full"):
        write_atomically(old, b"new content")
    monkeypatch.undo()
    assert untouched(old)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EACCES, "cannot be written (Permission denied)"),
        (errno.EROFS, "cannot be written (Read-only file system)"),
        (errno.ENAMETOOLONG, "cannot be written (File name too long)"),
    ],
)
def test_the_systems_refusals_are_plain(code: int, words: str, tmp_path: Path):
    """Each refusal to write says what it is, and that nothing was written."""
    path = tmp_path / "a"
    with pytest.raises(InputError) as caught, plain_storage_errors(path):
        raise OSError(code, os.strerror(code))
    message = said(caught, path)
    assert words in message
    assert "nothing was written" in message


def test_a_writer_that_wraps_the_systems_error(tmp_path: Path):
    """The error of a full disk is told even where the safetensors library has wrapped it."""
    wrapped = type("SafetensorError", (Exception,), {})
    for text, words in [
        ("I/O error: No space left on device (os error 28)", "the disk is full"),
        ("I/O error: something else", "cannot be written (I/O error: something else)"),
    ]:
        with pytest.raises(InputError) as caught, plain_storage_errors(tmp_path / "a"):
            raise wrapped(text)
        assert words in said(caught, tmp_path / "a")


def test_other_errors_pass(tmp_path: Path):
    """A mistake in the program is not told as one of the disk."""
    with pytest.raises(ZeroDivisionError), plain_storage_errors(tmp_path / "a"):
        _ = 1 / 0


def test_a_place_below_a_file(old: Path):
    """A path whose folder is a file is one line."""
    with pytest.raises(InputError) as caught:
        write_atomically(old / "b", b"new")
    said(caught, old / "b")
    assert untouched(old)


def test_a_folder_in_the_files_place(tmp_path: Path):
    """A path that is a folder is one line, and the folder stays."""
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError) as caught:
        write_atomically(tmp_path / "a", b"new")
    said(caught, tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(sys.platform == "win32", reason="names are shorter elsewhere")
def test_a_name_that_is_too_long(tmp_path: Path):
    """A name that the file system does not take is one line, and nothing is left."""
    with pytest.raises(InputError, match="cannot be written"):
        write_atomically(tmp_path / ("x" * 300), b"new")
    assert not list(tmp_path.iterdir())


# -- what is remembered ----------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of this test's own, not yet made."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("KNOWPATCH_CACHE", str(folder))
    return folder


@pytest.fixture
def counted() -> Callable[[], int]:
    """A computation that tells how often it has run."""
    runs: list[None] = []

    def compute() -> int:
        runs.append(None)
        return len(runs)

    return compute


def test_it_is_computed_once(cache: Path, old: Path, counted: Callable[[], int]):
    """A second call for the same files gives what the first one computed, from the disk."""
    assert [remembered("n", [old], counted) for _ in range(3)] == [1, 1, 1]
    assert len(list(cache.rglob("*.json"))) == 1


def test_a_changed_file_is_computed_anew(cache: Path, old: Path, counted: Callable[[], int]):
    """Another size, another time of change, or another file: another computation."""
    other = old.with_name("b.bin")
    other.write_bytes(b"old")
    assert remembered("n", [old], counted) == 1
    old.write_bytes(b"longer")
    assert remembered("n", [old], counted) == 2
    os.utime(old, ns=(1, 1))
    assert remembered("n", [old], counted) == 3
    assert remembered("n", [other], counted) == 4
    assert remembered("n", [old, other], counted) == 5
    assert remembered("m", [old], counted) == 6
    assert remembered("n", [old], counted) == 3


@pytest.mark.parametrize("note", [b"", b"{", b"\xff\xfe", b"[1,"])
def test_a_damaged_note_is_computed_anew(
    note: bytes, cache: Path, old: Path, counted: Callable[[], int]
):
    """A note that cannot be read is replaced, not believed."""
    remembered("n", [old], counted)
    (path,) = cache.rglob("*.json")
    path.write_bytes(note)
    assert remembered("n", [old], counted) == 2
    assert json.loads(path.read_text()) == 2


def test_a_cache_that_cannot_be_written_is_only_slower(
    cache: Path, old: Path, counted: Callable[[], int], monkeypatch: pytest.MonkeyPatch
):
    """Where nothing can be kept, everything still works."""
    monkeypatch.setattr(os, "replace", full)
    assert [remembered("n", [old], counted) for _ in range(2)] == [1, 2]
    cache.with_name("a-file").write_text("x")
    monkeypatch.setenv("KNOWPATCH_CACHE", str(cache.with_name("a-file") / "cache"))
    assert remembered("n", [old], counted) == 3


def test_a_failed_computation_is_not_remembered(cache: Path, old: Path, counted: Callable[[], int]):
    """An error is passed on, and the next call computes."""

    def fail() -> int:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        remembered("n", [old], fail)
    assert remembered("n", [old], counted) == 1


def test_a_files_digest(cache: Path, old: Path):
    """The digest is the SHA-256 of the content, also after the content has changed."""
    for content in (b"one", b"two, longer", b""):
        old.write_bytes(content)
        assert file_digest(old) == hashlib.sha256(content).hexdigest()
        assert file_digest(old) == hashlib.sha256(content).hexdigest()


# -- where it is kept ------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, with none of the variables set."""
    for name in ("KNOWPATCH_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return tmp_path


def test_the_cache_folder_is_the_one_that_is_named(home: Path, monkeypatch: pytest.MonkeyPatch):
    """KNOWPATCH_CACHE is the folder itself and wins over everything else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    monkeypatch.setenv("KNOWPATCH_CACHE", str(home / "mine"))
    assert cache_folder() == home / "mine"


@pytest.mark.parametrize(
    ("platform", "variables", "place"),
    [
        ("linux", {}, ".cache/knowpatch"),
        ("linux", {"XDG_CACHE_HOME": "xdg"}, "xdg/knowpatch"),
        ("linux", {"XDG_CACHE_HOME": ""}, ".cache/knowpatch"),
        ("linux", {"KNOWPATCH_CACHE": "", "XDG_CACHE_HOME": "xdg"}, "xdg/knowpatch"),
        ("darwin", {"XDG_CACHE_HOME": "xdg"}, "Library/Caches/knowpatch"),
        ("win32", {"LOCALAPPDATA": "local"}, "local/knowpatch"),
        ("win32", {}, "knowpatch"),
    ],
)
def test_the_cache_folder_of_each_system(
    platform: str,
    variables: dict[str, str],
    place: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Without a name it is the user's cache folder as the system has it; an empty name is none."""
    monkeypatch.setattr(sys, "platform", platform)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(home / value) if value else "")
    assert cache_folder() == home / place


def test_asking_for_the_cache_folder_makes_none(home: Path):
    """The folder is made when something is kept, not before."""
    assert not cache_folder().exists()
    write_atomically(cache_folder() / "a", b"x")
    assert cache_folder().is_dir()
