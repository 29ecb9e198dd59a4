"""The files of a workspace: patches and reports, each named by its hash and never changed.

A file is whole, and on the disk, before any event names it. What no event names is left over from
writers that were stopped, and may be swept away.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from time import time
from typing import Any

from knowpatch.errors import DataError
from knowpatch.files import plain_storage_errors, write_atomically

PATCHES, REPORTS, WORK = "patches", "reports", "work"
DAY = 86400.0
"""Seconds: what is younger may be a writer's whose event is still to come."""


def patch_path(folder: Path, patch_id: str) -> Path:
    return folder / PATCHES / f"{patch_id}.safetensors"


def report_path(folder: Path, digest: str) -> Path:
    return folder / REPORTS / f"{digest}.json"


def stems(recorded: Mapping[str, Any]) -> Iterator[str]:
    """How the names of an edit's files begin: patch and signatures by its id, and its report."""
    yield str(recorded["patch"])
    if recorded["report"] is not None:
        yield str(recorded["report"])


def put(path: Path, content: bytes) -> str:
    """Write `content` to `path`, whole and on the disk; returns its SHA-256."""
    digest = hashlib.sha256(content).hexdigest()
    with plain_storage_errors(path):
        if path.is_file() and path.read_bytes() == content:
            os.utime(path)  # in use again: not to be swept away
        else:
            write_atomically(path, content)
        # A folder, too, has to be told where one can open it, or its new name may be lost.
        for place in (path, path.parent) if os.name == "posix" else (path,):
            handle = os.open(place, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    return digest


def content_of(path: Path, digest: str) -> bytes:
    """What a file holds; DataError if it is not what was recorded."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {_why(error)}") from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise DataError(f"{path}: damaged (it is not the file that was recorded)")
    return content


def _why(error: OSError) -> str:
    return "is missing" if isinstance(error, FileNotFoundError) else f"not readable ({error})"


def strays(folder: Path, known: Collection[str], *, age: float) -> Iterator[tuple[Path, int]]:
    """What no event names, and no one has touched for `age` seconds, with its size in bytes.

    Args:
        folder: the workspace.
        known: how the names of those begin that events name (`stems`).
        age: a file that is younger may be a writer's whose event is still to come.
    """
    inside = [part for part in (PATCHES, REPORTS, WORK) if (folder / part).is_dir()]
    found = [path for part in inside for path in sorted((folder / part).iterdir())]
    found += [path for path in sorted(folder.glob(".*")) if path.is_file()]  # half-written
    for path in found:
        files = [path, *path.iterdir()] if path.is_dir() else [path]
        touched = max(file.lstat().st_mtime for file in files)
        if path.name.split(".")[0] not in known and time() - touched >= age:
            yield path, sum(file.lstat().st_size for file in files if not file.is_dir())
