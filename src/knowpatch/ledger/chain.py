"""The chain: what happened, one event after the other, each holding the hash of the one before.

An event's body is one line of canonical JSON with its kind, its time and `previous`, the hash of
the body before it ("" for the first). Its own hash is SHA-256 of that line, so whoever knows the
last hash knows every byte of the history. Events are only ever added.

Stored, an event is its line and its hash. A line that does not give its hash is damaged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from knowpatch.errors import DataError, InputError

Stored = tuple[str, str]
"""A hash, and the line that gives it."""


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        number: its place in the chain, from 1 on.
        hash: of its line, 64 hexadecimal digits.
        line: its body as stored.
        body: its body as plain data.
    """

    number: int
    hash: str
    line: str
    body: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def kind(self) -> str:
        return str(self.body["kind"])


def digest(line: str) -> str:
    """The hash of a line, by which the next event names it."""
    return hashlib.sha256(line.encode("utf-8", "surrogatepass")).hexdigest()


def written(number: int, previous: str, body: Mapping[str, Any]) -> Event:
    """The event that `body` becomes behind the one with the hash `previous`.

    Raises:
        InputError: text that UTF-8 cannot hold, or a number that is not finite.
    """
    whole = {**body, "previous": previous}
    try:
        line = json.dumps(
            whole, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False
        )
        line.encode()
    except UnicodeEncodeError:
        raise InputError("what is to be recorded is not text in UTF-8; give it in UTF-8") from None
    except ValueError:
        raise InputError("a number that is to be recorded is not finite") from None
    return Event(number, digest(line), line, json.loads(line))


def read(number: int, previous: str, stored: Stored) -> Event:
    """The stored event that follows `previous`; DataError, naming it, if it is not one."""
    hash_, line = stored
    if digest(line) != hash_:
        raise DataError(f"event {number} was changed (it does not give its hash)")
    try:
        body = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"event {number} is not JSON") from None
    if not isinstance(body, dict) or not isinstance(body.get("kind"), str):
        raise DataError(f"event {number} is not an event")
    if body.get("previous") != previous:
        raise DataError(f"event {number} does not follow the one before it")
    return Event(number, hash_, line, body)


def linked(stored: Iterable[Stored], after: Event | None = None) -> list[Event]:
    """The events of a stored chain that goes on behind `after`; DataError where it breaks."""
    events = [] if after is None else [after]
    for item in stored:
        last = events[-1] if events else None
        events.append(read(last.number + 1 if last else 1, last.hash if last else "", item))
    return events if after is None else events[1:]


def joined(*copies: Iterable[Stored]) -> tuple[list[Event], int]:
    """The chain that several copies hold together, each perhaps damaged elsewhere.

    Returns:
        The events, and how many undamaged ones follow nothing that any copy holds.
    """
    follower: dict[str, Stored] = {}
    for stored in (stored for copy in copies for stored in copy):
        if (previous := _previous(stored)) is not None:
            follower.setdefault(previous, stored)
    chain: list[Stored] = []
    while (found := follower.pop(chain[-1][0] if chain else "", None)) is not None:
        chain.append(found)
    return linked(chain), len(follower)


def _previous(stored: Stored) -> str | None:
    """What an undamaged event names as the one before it; None of a damaged one."""
    try:
        return str(read(0, json.loads(stored[1])["previous"], stored).body["previous"])
    except (DataError, ValueError, RecursionError, KeyError, TypeError):
        return None
