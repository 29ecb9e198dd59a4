"""The files of a workspace: patches and reports, each named by its hash and never changed.

A file is whole, and on the disk, before any event names it. What no event names is left over from
writers that were stopped, and may be swept away.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from time import time

from knowpatch.errors import DataError
from knowpatch.files import plain_storage_errors, write_atomically

PATCHES, REPORTS, WORK = "patches", "reports", "work"


def patch_path(folder: Path, patch_id: str) -> Path:
    return folder / PATCHES / f"{patch_id}.safetensors"


def report_path(folder: Path, digest: str) -> Path:
    return folder / REPORTS / f"{digest}.json"


def put(path: Path, content: bytes) -> str:
    """Write `content` to `path`, whole and on the disk; returns its SHA-256."""
    digest = hashlib.sha256(content).hexdigest()
    if not (path.is_file() and path.read_bytes() == content):
        write_atomically(path, content)
    with plain_storage_errors(path):
        for place in (path, path.parent):
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


def strays(folder: Path, known: Collection[str], *, age: float) -> Iterator[Path]:
    """Files and folders of work that no event names, and that no one has touched for `age` seconds.

    Args:
        folder: the workspace.
        known: names of the files that are named.
        age: a file that is younger may be a writer's whose event is still to come.
    """
    for part in (PATCHES, REPORTS, WORK):
        place = folder / part
        for path in sorted(place.iterdir()) if place.is_dir() else []:
            if path.name not in known and time() - _touched(path) >= age:
                yield path


def _touched(path: Path) -> float:
    inside = path.iterdir() if path.is_dir() else ()
    return max((item.lstat().st_mtime for item in (path, *inside)), default=0.0)
