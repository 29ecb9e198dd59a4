"""Where the chain is kept: a sqlite3 database, and the same events as lines of a text file.

The database orders writers: an event is added within one of its transactions, by one process at a
time. The text file is the second copy. A line is appended (and on the disk) before the transaction
is committed, so the text is never behind; a writer that was killed between the two leaves a whole
line, which the next writer takes in, or a torn one, which it cuts off.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from knowpatch.errors import DataError, InputError
from knowpatch.files import plain_storage_errors, write_atomically
from knowpatch.ledger.chain import Event, Stored, linked, written

DATABASE, TEXT = "history.db", "history.jsonl"
JOURNAL = f"{DATABASE}-journal"
"""Where sqlite keeps what an unfinished transaction would go back to."""
WAIT = 60.0
"""Seconds that a writer waits for others."""
HEAD, MIDDLE, TAIL = '{"event":', ',"hash":"', '"}\n'
REPAIR = "knowpatch verify --repair mends what another copy holds"


class Store:
    """The events of a workspace.

    Attributes:
        events: those read so far, in order.
    """

    def __init__(self, folder: Path) -> None:
        self.database, self.text = folder / DATABASE, folder / TEXT
        self.events: list[Event] = []
        self._bytes = 0  # of the text, as far as it is known to hold these events

    def refresh(self) -> Sequence[Event]:
        """Read what others have added; returns the new events.

        Raises:
            DataError: the database is damaged, in one line that says what to do.
        """
        with self._connected() as db:
            return self._take(db)

    def _take(self, db: sqlite3.Connection) -> list[Event]:
        """The events of the database that are not known yet."""
        last = self.events[-1] if self.events else None
        number = last.number if last else 0
        rows = db.execute(
            "SELECT number, hash, line FROM events WHERE number >= ? ORDER BY number", (number,)
        ).fetchall()
        if last is not None and (not rows or rows.pop(0)[1] != last.hash):
            raise DataError(f"{self.database}: is another history than a moment ago; start anew")
        try:
            new = linked([(str(row[1]), str(row[2])) for row in rows], last)
        except DataError as error:
            raise DataError(f"{self.database}: damaged ({error}); {REPAIR}") from None
        self._know(new)
        return new

    def _know(self, new: Sequence[Event]) -> None:
        self.events += new
        self._bytes += sum(len(text_of(event)) for event in new)

    @contextlib.contextmanager
    def writing(self) -> Iterator[list[Mapping[str, Any]]]:
        """One process at a time: what the block puts into the list is added as events.

        The block sees all that others have added. If it raises, nothing is added.

        Raises:
            InputError: the disk is full, or the workspace cannot be written; DataError: damaged.
        """
        with plain_storage_errors(self.database), self._connected() as db:
            db.execute("BEGIN IMMEDIATE")
            self._take(db)
            self._insert(db, self._caught_up())
            db.execute("SAVEPOINT caught_up")
            bodies: list[Mapping[str, Any]] = []
            try:
                yield bodies
                added = self._behind(bodies)
                self._append(added)
                self._insert(db, added)
            except BaseException:
                db.execute("ROLLBACK TO caught_up")
                db.commit()
                raise
            db.commit()
            self._know(added)

    def _behind(self, bodies: Sequence[Mapping[str, Any]]) -> list[Event]:
        """The events that `bodies` become behind those that are known."""
        last = self.events[-1] if self.events else None
        number, previous = (last.number, last.hash) if last else (0, "")
        added = []
        for body in bodies:
            added.append(written(number + 1, previous, body))
            number, previous = number + 1, added[-1].hash
        return added

    def _insert(self, db: sqlite3.Connection, events: Sequence[Event]) -> None:
        rows = [(event.number, event.hash, event.line) for event in events]
        db.executemany("INSERT INTO events VALUES (?, ?, ?)", rows)

    def _append(self, events: Sequence[Event]) -> None:
        with self.text.open("ab") as file:
            try:
                file.write(b"".join(text_of(event) for event in events))
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(self._bytes)
                raise

    def _caught_up(self) -> list[Event]:
        """What the text holds that the database lacks, after a writer was killed between them."""
        size = self.text.stat().st_size if self.text.is_file() else 0
        if size < self._bytes:
            raise DataError(f"{self.text}: is shorter than {self.database.name} says; {REPAIR}")
        if size == self._bytes:
            return []
        with self.text.open("rb+") as file:
            file.seek(self._bytes)
            rest = file.read()
            whole = rest[: rest.rfind(b"\n") + 1]
            try:
                last = self.events[-1] if self.events else None
                new = linked(stored_in(whole), last)
            except DataError as error:
                raise DataError(f"{self.text}: damaged ({error}); {REPAIR}") from None
            file.truncate(self._bytes + len(whole))
        self._know(new)
        return new

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        if not self.database.is_file():
            raise DataError(f"{self.database}: is missing; {REPAIR}")
        try:
            with contextlib.closing(connect(self.database, "rw")) as db:
                yield db
        except sqlite3.OperationalError as error:
            raise InputError(f"{self.database}: {error}; {_advice(error)}") from None
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise DataError(f"{self.database}: damaged ({error}); {REPAIR}") from None


def _advice(error: sqlite3.Error) -> str:
    if "locked" in str(error):
        return "another program holds it; try again"
    if "readonly" in str(error) or "unable to open" in str(error):
        return "make it writable, or work elsewhere"
    return "the disk is full; free some space" if "full" in str(error) else REPAIR


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """A connection whose transactions begin where they are told to; mode rw, or rwc to create."""
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=WAIT, isolation_level=None)


def write_anew(folder: Path, events: Sequence[Event]) -> None:
    """Write both copies from nothing, each whole or not at all, the text first."""
    write_atomically(folder / TEXT, b"".join(text_of(event) for event in events))
    fresh = folder / f".{DATABASE}.new"
    fresh.unlink(missing_ok=True)
    with plain_storage_errors(fresh), contextlib.closing(connect(fresh, "rwc")) as db:
        db.execute(
            "CREATE TABLE events (number INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE,"
            " line TEXT NOT NULL)"
        )
        db.execute("BEGIN")
        rows = [(event.number, event.hash, event.line) for event in events]
        db.executemany("INSERT INTO events VALUES (?, ?, ?)", rows)
        db.commit()
    # The journal is the old database's: it must not be rolled back into the new one.
    (folder / JOURNAL).unlink(missing_ok=True)
    os.replace(fresh, folder / DATABASE)


def text_of(event: Event) -> bytes:
    """An event as a line of the text."""
    return f"{HEAD}{event.line}{MIDDLE}{event.hash}{TAIL}".encode()


def stored_in(content: bytes) -> list[Stored]:
    """The events of a text, in order; what is no such line comes as a line without a hash."""
    found = []
    for raw in content.split(b"\n")[:-1]:
        line = raw.decode("utf-8", "replace")
        body, middle, end = line.removeprefix(HEAD).rpartition(MIDDLE)
        good = line.startswith(HEAD) and middle and end.endswith(TAIL.strip())
        found.append((end.removesuffix(TAIL.strip()), body) if good else ("", line))
    return found
