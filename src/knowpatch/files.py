"""Files that are never half-written, and the folder where knowpatch keeps what it can recompute."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

from knowpatch.errors import InputError

Json = TypeVar("Json")


def cache_folder() -> Path:
    """KNOWPATCH_CACHE, or `knowpatch` in the user's own cache directory; not yet created."""
    if chosen := os.environ.get("KNOWPATCH_CACHE"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "knowpatch"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", str(Path.home()))) / "knowpatch"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "knowpatch"


def kept_in(folder: str, content: str, ending: str) -> Path:
    """The file of a folder of the cache for something that `content` names completely."""
    name = hashlib.sha256(content.encode()).hexdigest()[:32]
    return cache_folder() / folder / f"{name}{ending}"


@contextlib.contextmanager
def plain_storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into one line about `path`.

    Some writers wrap the system's error in their own; the message is then all there is to go by.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            _storage_message(path, error.errno, str(error.strerror or error))
        ) from None
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        full = "No space left" in str(error) or "os error 28" in str(error)
        code = errno.ENOSPC if full else None
        raise InputError(_storage_message(path, code, str(error))) from None


def _storage_message(path: Path, code: int | None, reason: str) -> str:
    if code in (errno.ENOSPC, errno.EDQUOT):
        return f"{path}: the disk is full, nothing was written; free some space and try again"
    return f"{path}: cannot be written ({reason}); nothing was written"


@contextlib.contextmanager
def replacing(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """A temporary file (or folder) beside `path` that takes its place if the block succeeds.

    Whatever ends the block otherwise, an interrupt included, leaves `path` as it was.
    """
    with plain_storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if folder:
            temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            temporary.chmod(0o777 & ~_umask())
        else:
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            os.close(handle)
            temporary = Path(name)
            temporary.chmod(0o666 & ~_umask())
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The process's mask for new files, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_atomically(path: str | Path, content: bytes) -> Path:
    """Write `content` to `path`, whole or not at all."""
    path = Path(path)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return path


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Add lines to a file, whole; what a kill cut off at its end is written over."""
    with plain_storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write("".join(f"{line}\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that `append_lines` writes, without one that a kill cut off."""
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def _note(what: str, paths: Sequence[Path]) -> Path:
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = hashlib.sha256(json.dumps([what, stats]).encode()).hexdigest()
    return cache_folder() / "digests" / f"{key}.json"


def is_remembered(what: str, paths: Sequence[Path]) -> bool:
    """Whether `remembered` would not have to compute."""
    return _note(what, paths).is_file()


def remembered(what: str, paths: Sequence[Path], compute: Callable[[], Json]) -> Json:
    """`compute()`, remembered under `what` for as long as no file changes its size or time."""
    note = _note(what, paths)
    with contextlib.suppress(OSError, ValueError):
        found: Json = json.loads(note.read_text())
        return found
    value = compute()
    with contextlib.suppress(InputError):  # a cache that cannot be written is only slower
        write_atomically(note, json.dumps(value).encode())
    return value


@cache
def source_digest() -> str:
    """What this version of the library is: a hash of its source files."""
    root, source = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        source.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return source.hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, remembered by its path, size and time of change."""

    def compute() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return remembered("file", [path], compute)
