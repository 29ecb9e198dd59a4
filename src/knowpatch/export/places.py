"""Where an export may be written: nothing that was there before is lost by it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from knowpatch.errors import InputError
from knowpatch.files import replacing

MARK = "knowpatch.json"
"""The file in every exported folder that says what the folder was made of."""


def check_place(path: Path, *, folder: bool, force: bool) -> None:
    """Refuse, in one line, a place where something is that an export must not replace.

    Args:
        path: where it is to be written.
        folder: whether a folder is to be written, not a file.
        force: whether what an earlier export wrote may be replaced.
    """
    if not path.exists() or (folder and path.is_dir() and not any(path.iterdir())):
        return
    if folder:
        if not (path / MARK).is_file():
            raise InputError(f"{path}: exists, and no export wrote it; name a new folder")
    elif not path.is_file():
        raise InputError(f"{path}: is no ordinary file; name a new one")
    if not force:
        raise InputError(f"{path}: exists; name another place, or replace it with --force")


@contextlib.contextmanager
def placed(path: Path, *, folder: bool) -> Iterator[Path]:
    """A temporary file or folder that takes the place of `path`, and of what is there, if the block
    succeeds; else `path` is as it was."""
    aside: Path | None = None
    try:
        with replacing(path, folder=folder) as temporary:
            yield temporary
            if folder and path.is_dir() and any(path.iterdir()):
                aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
                os.replace(path, aside)
    finally:
        if aside is not None:
            if not path.exists():
                os.replace(aside, path)
            shutil.rmtree(aside, ignore_errors=True)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
