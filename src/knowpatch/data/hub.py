"""Files of hub datasets: fetched once, at one revision, and checked against what the hub states.

The hub states a checksum with each file of a revision: the SHA-256 of a large file, the git object
id (SHA-1 of "blob SIZE", a NUL and the content) of a small one. A file that agrees gets a lock file
beside it with its own SHA-256, by which later runs check it without the hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from knowpatch.data.dataset import Hub
from knowpatch.errors import DataError, InputError
from knowpatch.files import cache_folder, write_atomically


def inside(hub: Hub, file: str) -> str | None:
    """A file's path in the repository, from its path below a data folder; None: not in it."""
    if not hub.folder:
        return file
    return file.removeprefix(f"{hub.folder}/") if file.startswith(f"{hub.folder}/") else None


def kept(hub: Hub, file: str) -> Path | None:
    """A file of the repository, if it was fetched before and is still what it was."""
    path = _folder(hub) / file
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        noted = json.loads(_lock(path).read_bytes())["sha256"]
        if hashlib.sha256(path.read_bytes()).hexdigest() == noted:
            return path
    return None


def fetched(hub: Hub, file: str) -> Path:
    """A file of the repository, from the cache or from the hub.

    Raises:
        DataError: the hub cannot be reached, has no such file, or sends something else.
    """
    if known := kept(hub, file):
        return known
    stated = _stated(hub, file)
    path = _download(hub, file, force=False)
    content = path.read_bytes()
    if not agrees(content, stated):  # what an earlier run left behind may be damaged
        path = _download(hub, file, force=True)
        content = path.read_bytes()
    if not agrees(content, stated):
        path.unlink()
        raise DataError(
            f"{hub.repo}: {file} came with {len(content)} bytes that do not have the "
            f"checksum {stated} that the hub states; try again, or give the folder with --data DIR"
        )
    note = {"sha256": hashlib.sha256(content).hexdigest(), "stated": stated}
    write_atomically(_lock(path), json.dumps(note).encode())
    return path


def agrees(content: bytes, stated: str) -> bool:
    """Whether content has a checksum: SHA-256 in 64 hex digits, or a git object id in 40."""
    if re.fullmatch(r"[0-9a-f]{64}", stated):
        return hashlib.sha256(content).hexdigest() == stated
    if re.fullmatch(r"[0-9a-f]{40}", stated):
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == stated
    return False


def _folder(hub: Hub) -> Path:
    return cache_folder() / "datasets" / hub.repo.replace("/", "--") / hub.revision


def _lock(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _stated(hub: Hub, file: str) -> str:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with _one_line(hub, file):
        url = hf_hub_url(hub.repo, file, repo_type="dataset", revision=hub.revision)
        return str(get_hf_file_metadata(url).etag)


def _download(hub: Hub, file: str, *, force: bool) -> Path:
    from huggingface_hub import hf_hub_download

    with _one_line(hub, file):
        return Path(
            hf_hub_download(
                hub.repo,
                file,
                repo_type="dataset",
                revision=hub.revision,
                local_dir=_folder(hub),
                force_download=force,
            )
        )


@contextlib.contextmanager
def _one_line(hub: Hub, file: str) -> Iterator[None]:
    """Whatever the hub client raises becomes one line."""
    try:
        yield
    except (KeyboardInterrupt, MemoryError, InputError):
        raise
    except Exception as error:  # offline, unknown, gated, interrupted: the client has many
        said = " ".join(str(error).split())[:200]
        raise DataError(
            f"{file} cannot be fetched from the hub dataset {hub.repo} "
            f"({type(error).__name__}: {said}); give the folder that holds it with --data DIR "
            "(or KNOWPATCH_DATA)"
        ) from None
