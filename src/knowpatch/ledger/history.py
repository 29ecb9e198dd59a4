"""The history as a value: what the events say of each edit, and which edits are live when.

The live edits of a state are in the order of their places: the order in which they were recorded,
with an edit that was made anew in the place of the one that it stands for. So taking an edit back
and applying it again gives the same sequence, and with it the same bytes. A state is named by an
edit (right after it was recorded), by a tag, `base` (nothing live) or `now`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from knowpatch.errors import DataError, OptionError
from knowpatch.ledger.chain import Event

FORMAT = 1
NOW, BASE = "now", "base"
HASH = re.compile("[0-9a-f]{64}")
"""What files are named by: a name that is anything else could lead out of the workspace."""
Key = tuple[int, int]


@dataclass(eq=False)
class Edit:
    """One recorded edit. Its facts are those of its event (`recorded`), as plain data.

    Attributes:
        event: the event that recorded it.
        place: where it stands among the live ones.
        spans: from which event on it was live, up to which (None: still).
        touched: the events that say anything of it.
        first_day, final_day: on which it is live by itself; None for no limit.
        ended_by: the edits that follow it, while they are live, each with the day before.
    """

    event: Event
    place: Key
    spans: list[tuple[int, int | None]] = field(default_factory=list)
    touched: list[Event] = field(default_factory=list)
    first_day: str | None = None
    final_day: str | None = None
    ended_by: dict[Edit, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.set_period(self.recorded)

    def set_period(self, body: Mapping[str, Any]) -> None:
        """The days that an event names."""
        self.first_day, self.final_day = body["valid_from"], body["valid_until"]
        self.ended_by.clear()

    @property
    def last_day(self) -> str | None:
        """The last day on which it is live; None for no limit. An edit that follows it ends it,
        and no longer does when that is taken back."""
        days = [day for edit, day in self.ended_by.items() if edit.live]
        return min([*days, *([self.final_day] if self.final_day else [])], default=None)

    @property
    def rescheduled(self) -> bool:
        """Whether its days are others than those that it was recorded with."""
        days = (self.recorded["valid_from"], self.recorded["valid_until"])
        return days != (self.first_day, self.last_day)

    @property
    def recorded(self) -> Mapping[str, Any]:
        return self.event.body

    @property
    def id(self) -> str:
        """That of its patch."""
        return str(self.recorded["patch"])

    @property
    def short(self) -> str:
        return self.id[:12]

    @property
    def requests(self) -> Sequence[Mapping[str, Any]]:
        return self.recorded["requests"]  # type: ignore[no-any-return]

    @property
    def says(self) -> str:
        """Its first fact, and how many more there are."""
        first, more = self.requests[0], len(self.requests) - 1
        return f"{first['prompt']} → {first['target']}" + (f" (and {more} more)" if more else "")

    @property
    def live(self) -> bool:
        """Whether it has not been taken back; on which days it acts is another matter."""
        return bool(self.spans) and self.spans[-1][1] is None

    def live_at(self, number: int) -> bool:
        """Whether it was live right after that event."""
        return any(start <= number and (end is None or number < end) for start, end in self.spans)

    def valid_on(self, day: date) -> bool:
        """Whether that day is in its time, the first and the last day included."""
        start, end = self.first_day, self.last_day
        text = day.isoformat()
        return (start is None or start <= text) and (end is None or text <= end)


class History:
    """What the events say. Events are added in order (`add`).

    Attributes:
        edits: all of them, by id, in the order in which they were recorded.
        tags: from a tag's name to the number of the event whose state it names.
        model: what the workspace was made for, as `--model` takes it; None is the bundled one.
        fingerprint: that of the model, known from the first edit on.
        trusted: public keys, in hexadecimal digits; while there are any, edits have to be signed.
        head: the hash of the last event.
        number: of the last event.
    """

    def __init__(self) -> None:
        self.edits: dict[str, Edit] = {}
        self.tags: dict[str, int] = {}
        self.model: str | None = None
        self.fingerprint: str | None = None
        self.trusted: tuple[str, ...] = ()
        self.head, self.number = "", 0

    def add(self, events: Iterable[Event]) -> History:
        """Take in more events; DataError, naming it, where one says what cannot be."""
        for event in events:
            try:
                self._add(event)
            except (KeyError, TypeError, AttributeError, IndexError, ValueError):
                raise DataError(
                    f"event {event.number} ({event.kind}) says what this version of knowpatch "
                    "does not understand; use the version that wrote it"
                ) from None
            self.head, self.number = event.hash, event.number
        return self

    def _add(self, event: Event) -> None:
        body = event.body
        if event.kind == "init":
            if body["format"] != FORMAT:
                raise ValueError
            self.model = body["model"]
        elif event.kind == "edit":
            self._add_edit(event)
        elif event.kind in ("apply", "revert"):
            self._take_back(event)
            for edit in [self.edits[name] for name in body["applies"]]:
                self._begin(event, edit)
                if "valid_from" in body:  # edited again, for other days
                    edit.set_period(body)
                self._end(event, edit)
        elif event.kind == "tag":
            self.tags[str(body["name"])] = int(body["at"])
        elif event.kind == "trust":
            self.trusted = tuple(str(key) for key in body["keys"])
        else:
            raise ValueError

    def _add_edit(self, event: Event) -> None:
        body = event.body
        stands_for = body["instead_of"]
        place = (self.edits[stands_for].place[0], event.number) if stands_for else None
        edit = Edit(event, place or (event.number, event.number))
        texts = ("method", "fingerprint", "time", "author")
        hashes = (body["patch"], body["sha256"], body["report"] or "0" * 64)
        plain = all(isinstance(body[name], str) for name in texts)
        if not plain or not all(map(HASH.fullmatch, hashes)) or edit.id in self.edits:
            raise ValueError
        edit.says, edit.valid_on(date.min), int(body["over"] or 0), body["sequence"]
        self._take_back(event)
        self.edits[edit.id] = edit
        self._begin(event, edit)
        self._end(event, edit)
        if stands_for:
            self._inherit(self.edits[stands_for], edit)
        self.fingerprint = self.fingerprint or body["fingerprint"]

    def _begin(self, event: Event, edit: Edit) -> None:
        if not edit.live:
            edit.spans.append((event.number, None))
        edit.touched.append(event)

    def _take_back(self, event: Event) -> None:
        for edit in (self.edits[name] for name in event.body["reverts"]):
            if edit.live:
                edit.spans[-1] = (edit.spans[-1][0], event.number)
            edit.touched.append(event)

    def _end(self, event: Event, by: Edit) -> None:
        """Some edits are live until the day before `by`."""
        for name, day in event.body["ends"].items():
            self.edits[name].ended_by[by] = str(day)
            self.edits[name].touched.append(event)

    def _inherit(self, old: Edit, new: Edit) -> None:
        """What an edit ended, the one that was made anew in its place ends."""
        for edit in self.edits.values():
            if old in edit.ended_by:
                edit.ended_by[new] = edit.ended_by[old]

    # -- looking up --------------------------------------------------------------------------------

    def edit(self, name: str) -> Edit:
        """The edit whose id begins so; OptionError if there is not just one."""
        found = [edit for id_, edit in self.edits.items() if id_.startswith(name.lower())]
        if len(found) == 1 and name:
            return found[0]
        if not found or not name:
            raise OptionError(f"no edit has an id that begins with {name!r}; see knowpatch log")
        ids = ", ".join(edit.short for edit in found[:4]) + (", ..." if len(found) > 4 else "")
        raise OptionError(f"{name!r} is the beginning of {len(found)} ids ({ids}): give more of it")

    def live(self, on: date | None = None, *, at: int | None = None) -> list[Edit]:
        """The live edits, in order.

        Args:
            on: only those whose time holds that day; None for all.
            at: in the state right after that event; None for now.
        """
        found = [
            edit
            for edit in self.edits.values()
            if (edit.live if at is None else edit.live_at(at)) and (on is None or edit.valid_on(on))
        ]
        return sorted(found, key=lambda edit: edit.place)

    def state(self, name: str) -> int:
        """The number of the event whose state `name` names; OptionError if it names none."""
        if name in (NOW, BASE):
            return self.number if name == NOW else 0
        if name in self.tags:
            return self.tags[name]
        try:
            return self.edit(name).event.number
        except OptionError as error:
            tags = ", ".join(sorted(self.tags)) or "none"
            raise OptionError(
                f"{error}; a state is an edit's id, {BASE}, {NOW} or a tag (tags: {tags})"
            ) from None

    def stood(self, other: Edit, edit: Edit) -> bool:
        """Whether `other` was live, in a place before it, when `edit` was computed."""
        made = edit.recorded
        if made["over"] is None or other.place >= edit.place or other.id in made["reverts"]:
            return False
        if made["sequence"] is not None and other.recorded["sequence"] == made["sequence"]:
            return True
        day = made["on"]
        in_time = day is None or other.valid_on(date.fromisoformat(day))
        return in_time and other.live_at(int(made["over"]))

    def beneath(self, edit: Edit) -> list[Edit]:
        """The edits that `edit` was computed on top of, in order."""
        found = [other for other in self.edits.values() if self.stood(other, edit)]
        return sorted(found, key=lambda other: other.place)
