"""The two copies of the chain, read leniently, compared, and put together again.

What of a copy can be read is read, and what is wrong with it is named. Mending makes the chain of
whatever either copy still holds, and moves the damaged files aside: nothing is thrown away.
"""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import strftime

from knowpatch.errors import DataError
from knowpatch.files import plain_storage_errors
from knowpatch.ledger.chain import Event, Stored, joined, linked
from knowpatch.ledger.history import History
from knowpatch.ledger.store import DATABASE, JOURNAL, TEXT, connect, stored_in, write_anew


@dataclass(frozen=True)
class Fault:
    """Something that is not as it was recorded: in which file, and what."""

    file: str
    what: str


def read_copies(folder: Path, faults: list[Fault], notes: list[str]) -> list[Event]:
    """The chain that the two copies hold together; what is wrong with either, or between them."""
    kept, text = (_copy(name, folder, faults) for name in READERS)
    if not faults:
        _compare(linked(kept), linked(text), faults, notes)
    return joined(kept, text)[0] if faults else linked(text)


def _copy(name: str, folder: Path, faults: list[Fault]) -> list[Stored]:
    """What can be read of a copy; the first that is wrong with it is named."""
    items: list[Stored] = []
    try:
        items = READERS[name](folder)
        linked(items)
    except DataError as error:
        faults.append(Fault(name, str(error)))
        items = error.found if isinstance(error, _Partly) else items
    return items


def _compare(kept: list[Event], text: list[Event], faults: list[Fault], notes: list[str]) -> None:
    """Both copies hold the same events, but for what a killed writer had yet to take in."""
    for one, other in zip(kept, text, strict=False):
        if one.hash != other.hash:
            faults.append(Fault(TEXT, f"event {one.number} is not that of {DATABASE}"))
            return
    if len(text) > len(kept):
        more = len(text) - len(kept)
        notes.append(f"{TEXT} holds {more} event(s) more (an interrupted write): the next takes it")
    elif len(text) < len(kept):
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


def repair(folder: Path) -> tuple[int, Path | None]:
    """Put the chain together from both copies, and write both anew; the old ones are kept aside.

    No one else should write meanwhile. Stopped at any moment, it can be done again.

    Returns:
        How many events there are, and the folder that the old copies are in (None: nothing to do).

    Raises:
        DataError: an event is damaged in both copies; nothing was changed.
    """
    copies = [_readable(name, folder) for name in READERS]
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
    with plain_storage_errors(folder):
        aside = Path(tempfile.mkdtemp(prefix=f"damaged-{strftime('%Y%m%d')}-", dir=folder))
        for name in (JOURNAL, DATABASE, TEXT):
            if (folder / name).exists():
                (aside / name).write_bytes((folder / name).read_bytes())
        write_anew(folder, events)
    return len(events), aside


def _broken(folder: Path) -> bool:
    try:
        _in_database(folder)
    except DataError:
        return True
    return not (folder / TEXT).read_bytes().endswith(b"\n")


def _readable(name: str, folder: Path) -> list[Stored]:
    """What can be read of a copy, damaged or not."""
    try:
        return READERS[name](folder)
    except _Partly as partly:
        return partly.found
    except DataError:
        return []


READERS: dict[str, Callable[[Path], list[Stored]]] = {DATABASE: _in_database, TEXT: _in_text}
