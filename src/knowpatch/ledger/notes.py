"""What is recorded beside an edit: who did it and why, how it came about, and when it is live."""

from __future__ import annotations

import getpass
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any


@dataclass(frozen=True)
class Note:
    """What is recorded beside what was done.

    Attributes:
        author: who did it; by default KNOWPATCH_AUTHOR, else the name of the user's account.
        reason: why.
    """

    author: str = ""
    reason: str | None = None

    def facts(self) -> dict[str, Any]:
        moment = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        return {"time": moment, "author": self.author or account(), "reason": self.reason}


@dataclass(frozen=True)
class Circumstances:
    """What is recorded of an edit beside its patch.

    Attributes:
        over: the number of the event after which the patch was computed; None if elsewhere.
        on: the day whose live edits it was computed on top of.
        source: where the fact, or the request, is from.
        took: for each request, whether its edit took.
        report: what was measured before and after, as plain data.
        valid_from, valid_until: first and last day on which it is live; None for no limit.
        instead_of: id of the edit in whose place it was made anew.
        folds: whether later edits of its method are computed from it.
        dtype: of the model's weights when it was computed: another one gives another patch.
        sequence: names the run in which it was made on top of others of the same run.
        turn: its number in that run, by which the report names its request.
    """

    over: int | None
    on: date | None = None
    source: str | None = None
    took: Sequence[bool] | None = None
    report: Mapping[str, Any] | None = None
    valid_from: date | None = None
    valid_until: date | None = None
    instead_of: str | None = None
    folds: bool = True
    dtype: str | None = None
    sequence: str | None = None
    turn: int | None = None

    def facts(self) -> dict[str, Any]:
        """As an event has them; the report is a file."""
        days = {"on": self.on, "valid_from": self.valid_from, "valid_until": self.valid_until}
        return {
            "took": None if self.took is None else list(self.took),
            "over": self.over,
            "source": self.source,
            "instead_of": self.instead_of,
            "folds": self.folds,
            "dtype": self.dtype,
            "sequence": self.sequence,
            "turn": self.turn,
            **{name: day and day.isoformat() for name, day in days.items()},
        }


def account() -> str:
    """The author where none is named."""
    try:
        return os.environ.get("KNOWPATCH_AUTHOR") or getpass.getuser()
    except (OSError, KeyError, ImportError):  # an account without a name
        return "unknown"


def today() -> date:
    return date.today()
