"""Verify: is everything of a workspace still what was recorded? And mend what a copy still holds.

Nothing is trusted: both copies of the chain are read and derived anew, each file is hashed, and
each patch's header is compared with its event. What is broken is named, one fault after the other;
nothing is changed. Mending puts a chain together from both copies, and moves the damaged files
aside.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import strftime
from typing import Any

from knowpatch.errors import DataError, KnowpatchError
from knowpatch.files import plain_storage_errors
from knowpatch.ledger import blobs
from knowpatch.ledger.chain import Event, Stored, joined, linked
from knowpatch.ledger.history import Edit, History
from knowpatch.ledger.store import DATABASE, TEXT, connect, stored_in, write_anew
from knowpatch.progress import Progress, silent

LARGEST_HEADER = 8 * 2**20
"""Bytes of a patch file's header that are read."""
LEFT_OVER = 3600.0
"""Seconds after which a file that no event names is called left over."""


@dataclass(frozen=True)
class Fault:
    """Something that is not as it was recorded: in which file, and what."""

    file: str
    what: str


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


def verify(folder: Path, *, progress: Progress = silent) -> Findings:
    """Check the workspace in `folder` (a `.knowpatch`) without changing anything."""
    faults: list[Fault] = []
    notes: list[str] = []
    events = _events(folder, faults, notes)
    history = _history(folder, events, faults)
    edits = list(history.edits.values())
    for number, edit in enumerate(edits):
        if number % 100 == 0:
            progress("checking patches", number, len(edits))
        faults += _file_faults(folder, edit, history)
    progress("checking patches", 1, 1)
    names = {name for edit in edits for name in _names(folder, edit)}
    if left := sum(1 for _ in blobs.strays(folder, names, age=LEFT_OVER)):
        notes.append(f"{left} file(s) that no event names; knowpatch gc sweeps them away")
    return Findings(tuple(faults), tuple(notes), history)


def _names(folder: Path, edit: Edit) -> Iterator[str]:
    yield blobs.patch_path(folder, edit.id).name
    if edit.recorded["report"] is not None:
        yield blobs.report_path(folder, edit.recorded["report"]).name


# -- the chain -------------------------------------------------------------------------------------


def _events(folder: Path, faults: list[Fault], notes: list[str]) -> list[Event]:
    """The longest chain of the two copies; what is wrong with either, or between them."""
    chains: dict[str, list[Event]] = {}
    for name, stored in ((DATABASE, _in_database), (TEXT, _in_text)):
        try:
            items = stored(folder)
        except DataError as error:
            faults.append(Fault(name, str(error)))
            items = error.found if isinstance(error, _Partly) else []
        chains[name] = _chain(name, items, faults)
    _compare(chains[DATABASE], chains[TEXT], faults, notes)
    return max(chains.values(), key=len)


def _chain(name: str, items: Sequence[Stored], faults: list[Fault]) -> list[Event]:
    """The events of a copy up to the first that is broken."""
    try:
        return linked(items)
    except DataError as error:
        faults.append(Fault(name, str(error)))
    good: list[Event] = []
    for item in items:
        try:
            good += linked([item], good[-1]) if good else linked([item])
        except DataError:
            break
    return good


def _compare(kept: list[Event], text: list[Event], faults: list[Fault], notes: list[str]) -> None:
    """Both copies hold the same events, but for what a killed writer had yet to take in."""
    for one, other in zip(kept, text, strict=False):
        if one.hash != other.hash:
            faults.append(Fault(TEXT, f"event {one.number} is not that of {DATABASE}"))
            return
    if faults or len(kept) == len(text):
        return
    if len(text) > len(kept):
        more = len(text) - len(kept)
        notes.append(f"{TEXT} holds {more} event(s) more (an interrupted write): the next takes it")
    else:
        faults.append(Fault(TEXT, f"event {len(text) + 1} is missing"))


def _in_database(folder: Path) -> list[Stored]:
    """The rows of the database, as far as they can be read."""
    path = folder / DATABASE
    if not path.is_file():
        raise DataError("is missing")
    found: list[Stored] = []
    try:
        with contextlib.closing(connect(path, "rw")) as db:
            db.text_factory = lambda raw: raw.decode("utf-8", "replace")
            for row in db.execute("SELECT hash, line FROM events ORDER BY number"):
                found.append((str(row[0]), str(row[1])))
            (said,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    except sqlite3.Error as error:
        raise _Partly(str(error), found) from None
    if said != "ok":
        raise _Partly(" ".join(str(said).split()), found)
    return found


class _Partly(DataError):
    """A copy that is damaged, with what could be read of it."""

    def __init__(self, why: str, found: list[Stored]) -> None:
        super().__init__(f"damaged ({why})")
        self.found = found


def _in_text(folder: Path) -> list[Stored]:
    """The lines of the text; a torn end, which an interrupted write leaves, is none."""
    try:
        return stored_in((folder / TEXT).read_bytes())
    except FileNotFoundError:
        raise DataError("is missing") from None
    except OSError as error:
        raise DataError(f"not readable ({error.strerror})") from None


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


# -- mending ---------------------------------------------------------------------------------------


def repair(folder: Path) -> tuple[int, Path | None]:
    """Put the chain together from both copies, and write both anew; the damaged ones move aside.

    Returns:
        How many events there are, and the folder that the old copies are in (None: nothing to do).

    Raises:
        DataError: an event is damaged in both copies; nothing was changed.
    """
    copies = [_readable(folder, _in_database), _readable(folder, _in_text)]
    events, lost = joined(*copies)
    if not events:
        raise DataError(f"{folder}: neither {DATABASE} nor {TEXT} holds a readable event")
    if lost:
        raise DataError(
            f"{folder}: event {len(events) + 1} is damaged in both {DATABASE} and {TEXT}, and "
            f"{lost} later one(s) hang on it; nothing was changed: restore one of them from a copy"
        )
    History().add(events)
    whole = [(event.hash, event.line) for event in events]
    if copies == [whole, whole] and not _broken(folder):
        return len(events), None
    aside = folder / f"damaged-{strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    with plain_storage_errors(aside):
        aside.mkdir()
        for name in (f"{DATABASE}-journal", DATABASE, TEXT):
            if (folder / name).exists():
                os.replace(folder / name, aside / name)
        write_anew(folder, events)
    return len(events), aside


def _broken(folder: Path) -> bool:
    try:
        _in_database(folder)
    except DataError:
        return True
    return not (folder / TEXT).read_bytes().endswith(b"\n")


def _readable(folder: Path, stored: Any) -> list[Stored]:
    try:
        found: list[Stored] = stored(folder)
        return found
    except _Partly as partly:
        return partly.found
    except DataError:
        return []
