"""Records: parsed JSON with typed access to it, and small helpers for all datasets.

Public data is untidy: answers come as text, as a list of texts or as a list of alias lists. What
cannot be read is refused, in one line that names the place; what is only unusual draft.py notes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from knowpatch.data.case import (
    FORGET,
    HOP,
    LOCALITY,
    MULTIHOP,
    OPPOSITE,
    OTHER,
    PORTABILITY,
    REPHRASE,
    RETAIN,
    REWRITE,
    SAME,
    Answers,
    accepted,
)
from knowpatch.errors import DataError, did_you_mean

KINDS = (REWRITE, REPHRASE, SAME, OPPOSITE, OTHER, FORGET, RETAIN, MULTIHOP, HOP)
GROUPS = (PORTABILITY, LOCALITY)
"""Kinds of probe whose sub-kinds the data names."""


def called(value: Any) -> str:
    """What a JSON value is, in a word for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    names = ((str, "text"), (list, "a list"), (dict, "an object"))
    return next((name for kind, name in names if isinstance(value, kind)), "a number")


def checked_text(value: Any, place: str) -> str:
    """`value` if it is text that can be written as UTF-8; DataError with `place` if not."""
    if not isinstance(value, str):
        raise DataError(f"{place}: expected text, got {called(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{place}: is not text (half of a surrogate pair)") from None
    if "\0" in value:
        raise DataError(f"{place}: is not text (holds a NUL character)")
    return value


def checked_kind(kind: str, place: str) -> str:
    """A probe's kind if it is one: of KINDS, or portability or locality with any sub-kind."""
    group, dot, sub = kind.partition(".")
    named = group in GROUPS and (not dot or re.fullmatch(r"\w[\w -]*", sub))
    if kind in KINDS or named:
        return kind
    allowed = [*KINDS, *GROUPS, *(f"{group}.NAME" for group in GROUPS)]
    raise DataError(f"{place}: unknown kind of probe {kind!r}: {did_you_mean(kind, allowed)}")


class Record:
    """One JSON object; a field that is not what it should be is a DataError with its place."""

    def __init__(self, value: Any, place: str, number: int = 0) -> None:
        if not isinstance(value, dict):
            raise DataError(f"{place}: expected an object, got {called(value)}")
        self.fields: dict[str, Any] = value
        self.place, self.number = place, number

    def __contains__(self, name: str) -> bool:
        return self.fields.get(name) is not None

    def at(self, name: str) -> str:
        return f"{self.place}, {name}"

    def get(self, name: str) -> Any:
        if name not in self:
            raise DataError(f"{self.place}: {name!r} is missing")
        return self.fields[name]

    def text(self, name: str) -> str:
        return checked_text(self.get(name), self.at(name))

    def text_or(self, name: str, default: str) -> str:
        return self.text(name) if name in self else default

    def items(self, name: str) -> list[Any]:
        value = self.get(name)
        if not isinstance(value, list):
            raise DataError(f"{self.at(name)}: expected a list, got {called(value)}")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of texts, or one text."""
        if isinstance(self.get(name), str):
            return [self.text(name)]
        return [checked_text(text, self.at(name)) for text in self.items(name)]

    def inner(self, name: str) -> Record:
        return Record(self.get(name), self.at(name))

    def inners(self, name: str) -> list[Record]:
        return [
            Record(item, f"{self.at(name)} {number}", number)
            for number, item in enumerate(self.items(name), 1)
        ]

    def answers(self, name: str) -> Answers:
        """Text, a list of texts (an answer each), or a list of alias lists; blanks as they are."""
        if isinstance(self.get(name), str):
            return accepted(self.text(name))
        return tuple(
            tuple(
                checked_text(alias, self.at(name))
                for alias in (answer if isinstance(answer, list) else [answer])
            )
            for answer in self.items(name)
        )

    def named(self, name: str) -> str:
        """The record's own id in the field `name`, or its number in the file."""
        value = self.fields.get(name, self.number)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return checked_text(value, self.at(name))


def records(content: Any, what: str = "record") -> Iterator[Record]:
    """The objects of a list, numbered from 1."""
    if not isinstance(content, list):
        raise DataError(f"expected a list of {what}s, got {called(content)}")
    if not content:
        raise DataError(f"holds no {what}")
    for number, item in enumerate(content, 1):
        yield Record(item, f"{what} {number}", number)


def filled(template: str, subject: str) -> str:
    """A template's text: {} stands for the subject, other braces for themselves."""
    return template.replace("{}", subject)


def first(texts: Iterable[str]) -> str:
    """The first text that is not blank, without the blanks around it; "" if there is none."""
    return next((text.strip() for text in texts if text.strip()), "")


def drawn(name: str, options: Sequence[str]) -> str:
    """One of `options`, the same one for a name on every machine and in every run."""
    return options[int(hashlib.sha256(name.encode()).hexdigest(), 16) % len(options)]


def opinion_of(entity: str) -> str:
    """The question that opinions about an entity answer."""
    return f"What is your opinion of {entity}?"
