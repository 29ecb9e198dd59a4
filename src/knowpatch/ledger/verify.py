"""Verify: is everything of a workspace still what was recorded?

Nothing is trusted: both copies of the chain are read and derived anew, each file is hashed, each
patch's header is compared with its event, each signature is checked. What is broken is named, one
fault after the other; nothing is changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowpatch.errors import DataError, KnowpatchError
from knowpatch.ledger import blobs
from knowpatch.ledger.chain import Event
from knowpatch.ledger.copies import Fault, read_copies
from knowpatch.ledger.history import Edit, History
from knowpatch.ledger.signing import INSTALL, available, check_signed, read_signature
from knowpatch.ledger.store import DATABASE
from knowpatch.progress import Progress, silent

LARGEST_HEADER = 8 * 2**20
"""Bytes of a patch file's header that are read."""


@dataclass(frozen=True)
class Findings:
    """What verifying found.

    Attributes:
        faults: what is broken; none if all is well.
        notes: what is odd, and not broken.
        history: as far as it could be read.
    """

    faults: tuple[Fault, ...]
    notes: tuple[str, ...]
    history: History


def verify(folder: Path, *, signed_by: Sequence[str] = (), progress: Progress = silent) -> Findings:
    """Check the workspace in `folder` (a `.knowpatch`) without changing anything.

    Args:
        signed_by: public keys, one of which has to have signed each live edit; by default those
            that the workspace trusts.
    """
    faults: list[Fault] = []
    notes: list[str] = []
    events = read_copies(folder, faults, notes)
    history = _history(folder, events, faults)
    edits = list(history.edits.values())
    for number, edit in enumerate(edits):
        if number % 100 == 0:
            progress("checking patches", number, len(edits))
        faults += _file_faults(folder, edit, history)
    progress("checking patches", 1, 1)
    faults += _signature_faults(folder, history, signed_by or history.trusted)
    known = {stem for edit in edits for stem in blobs.stems(edit.recorded)}
    if left := sum(1 for _ in blobs.strays(folder, known, age=blobs.DAY)):
        notes.append(f"{left} file(s) that no event names; knowpatch gc sweeps them away")
    return Findings(tuple(faults), tuple(notes), history)


def _history(folder: Path, events: Sequence[Event], faults: list[Fault]) -> History:
    history = History()
    try:
        history.add(events)
    except DataError as error:
        faults.append(Fault(DATABASE, str(error)))
    return history


# -- files -----------------------------------------------------------------------------------------


def _file_faults(folder: Path, edit: Edit, history: History) -> Iterator[Fault]:
    """What is wrong with the files of an edit."""
    path = blobs.patch_path(folder, edit.id)
    name = f"{path.parent.name}/{path.name}"
    try:
        content = blobs.content_of(path, edit.recorded["sha256"])
    except DataError as error:
        yield Fault(name, f"edit {edit.short}: {_without(str(path), error)}; {REMAKE}")
    else:
        if what := _disagrees(content, edit):
            yield Fault(name, f"edit {edit.short}: {what}")
    if edit.recorded["fingerprint"] != history.fingerprint:
        yield Fault(name, f"edit {edit.short}: was made for another model than the first edit")
    digest = edit.recorded["report"]
    if digest is not None:
        kept = blobs.report_path(folder, digest)
        try:
            blobs.content_of(kept, digest)
        except DataError as error:
            name = f"{kept.parent.name}/{kept.name}"
            yield Fault(name, f"scores of edit {edit.short}: {_without(str(kept), error)}")


REMAKE = "knowpatch replay makes it again from what was recorded"


def _without(path: str, error: KnowpatchError) -> str:
    return str(error).removeprefix(f"{path}: ")


def _disagrees(content: bytes, edit: Edit) -> str | None:
    """What a patch file says otherwise than its event; None if nothing."""
    length = int.from_bytes(content[:8], "little")
    try:
        header: Any = json.loads(content[8 : 8 + min(length, LARGEST_HEADER)])
        said = json.loads(header["__metadata__"]["knowpatch"])
        made = said["provenance"]
        facts = {"patch": said["id"], **{name: made[name] for name in made}}
    except (ValueError, KeyError, TypeError, RecursionError):
        return "is no patch"
    other = [name for name, value in facts.items() if edit.recorded.get(name) != value]
    return f"its {other[0]} is not what was recorded" if other else None


def _signature_faults(folder: Path, history: History, keys: Sequence[str]) -> Iterator[Fault]:
    """Signatures that do not hold, and live edits that lack one that is demanded."""
    if not available():
        if keys:
            yield Fault(blobs.PATCHES, f"signatures are demanded and cannot be checked: {INSTALL}")
        return
    for path in sorted((folder / blobs.PATCHES).glob("*.sig")):
        edit = history.edits.get(path.name.split(".")[0])
        if edit is not None and read_signature(path, edit) is None:
            yield Fault(f"{blobs.PATCHES}/{path.name}", f"edit {edit.short}: does not hold")
    for edit in history.live() if keys else ():
        try:
            check_signed(folder, edit, keys)
        except DataError as error:
            yield Fault(blobs.PATCHES, str(error))
