"""EditRequest: one thing a model should say otherwise; reading and checking files of them.

A request holds what a method may learn from, never the questions it is judged by.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from knowpatch.errors import RequestError, did_you_mean
from knowpatch.reading import decode, parse, read_bytes

log = logging.getLogger(__name__)

Kind = Literal["insert", "modify", "erase"]
REFUSAL = "I don't know."
"""What a model learns to answer where a fact is erased (the refusal of KnowEdit's erasure set)."""


class EditRequest(BaseModel):
    """One fact to insert, modify or erase.

    Attributes:
        prompt: text that the answer follows ("The capital of Australia is").
        target: the wanted answer; for an erasure, what to say instead.
        subject: what the fact is about, a part of the prompt. Some methods need it.
        old: the answer so far, if known.
        kind: insert (no old answer), modify (an old one is replaced) or erase. By default modify
            if `old` is given, else insert.
        rephrases: other wordings of the prompt that a method may learn from.
        id: the caller's own name for the request.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    prompt: str
    target: str = ""
    subject: str | None = None
    old: str | None = None
    kind: Kind = "insert"
    rephrases: tuple[str, ...] = ()
    id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {name: value for name, value in data.items() if value is not None}
        if data.get("kind") == "erase":
            data.setdefault("target", REFUSAL)
        elif "old" in data:
            data.setdefault("kind", "modify")
        return data

    @field_validator("prompt", "target", "subject", "old")
    @classmethod
    def _filled(cls, text: str | None) -> str | None:
        return None if text is None else _checked(text)

    @field_validator("subject")
    @classmethod
    def _bare(cls, text: str | None) -> str | None:
        return None if text is None else text.strip()

    @field_validator("rephrases")
    @classmethod
    def _all_filled(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_checked(text) for text in texts)

    @model_validator(mode="after")
    def _consistent(self) -> EditRequest:
        if not self.target:
            raise ValueError("target is missing")
        if self.subject is not None and self.subject not in self.prompt:
            raise ValueError(f"subject {self.subject!r} is not in the prompt {self.prompt!r}")
        if self.old is not None and self.old.strip() == self.target.strip():
            log.warning("the target %r equals the old answer: nothing to learn", self.target)
        return self


def _checked(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not text (half of a surrogate pair)") from None
    return text


def make_request(**fields: Any) -> EditRequest:
    """An EditRequest from plain values; RequestError with one line if they do not make one."""
    try:
        return EditRequest(**fields)
    except ValidationError as error:
        raise RequestError(f"bad edit request: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """A pydantic error as one line: the first fault, with its field and what is allowed."""
    faults = error.errors()
    # A misspelt field explains the one that is missing.
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    field = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"unknown field {field!r}: {did_you_mean(field, EditRequest.model_fields)}"
    said = fault["msg"].removeprefix("Value error, ")
    return f"{field} {said}" if said.startswith("is ") else f"{field}: {said}" if field else said


def read_requests(path: str | Path) -> list[EditRequest]:
    """The requests of a .json, .jsonl, .csv, .yaml or .yml file, in order.

    JSON and YAML hold a list of objects (or one object); JSON lines one object a line; CSV one row
    a request under a header of field names, rephrases separated by "|".

    Raises:
        RequestError: naming the file, the line or entry, and what is allowed.
    """
    path = Path(path)
    readers = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".yaml": _yaml, ".yml": _yaml}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise RequestError(f"{path}: unknown ending {path.suffix!r}; allowed: {', '.join(readers)}")
    content = read_bytes(path, RequestError)
    try:
        requests = [_request(f, place) for place, f in reader(decode(content, RequestError))]
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None
    if not requests:
        raise RequestError(f"{path}: holds no request; give at least one with prompt and target")
    _note_repeats(path, requests)
    return requests


def _note_repeats(path: Path, requests: Sequence[EditRequest]) -> None:
    """Say once for each prompt that comes again what is odd about it."""
    targets: dict[str, list[str]] = {}
    for request in requests:
        targets.setdefault(request.prompt, []).append(request.target.strip())
    for prompt, wanted in targets.items():
        if len(wanted) > 1:
            different = list(dict.fromkeys(wanted))
            what = f"answers that exclude each other ({', '.join(different)})"
            log.warning(
                "%s: %r comes %d times, with %s",
                path,
                prompt,
                len(wanted),
                what if len(different) > 1 else "the same answer",
            )


def _request(fields: Any, place: str) -> EditRequest:
    if not isinstance(fields, dict):
        raise RequestError(f"{place}: expected an object with prompt and target")
    try:
        return EditRequest(**{str(name): value for name, value in fields.items()})
    except ValidationError as error:
        raise RequestError(f"{place}: {explain(error)}") from None


Entries = Iterator[tuple[str, Any]]


def _entries(loaded: Any) -> Entries:
    items: Sequence[Any] = loaded if isinstance(loaded, list) else [loaded]
    for number, item in enumerate(items, 1):
        yield f"entry {number}", item


def _json(text: str) -> Entries:
    return _entries(parse(text, RequestError))


def _jsonl(text: str) -> Entries:
    # Not splitlines: U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", parse(line, RequestError, line=number)


def _csv(text: str) -> Entries:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        for row in reader:
            if None in row:
                raise RequestError(f"line {reader.line_num}: more cells than the header")
            fields: dict[str, Any] = {name: cell for name, cell in row.items() if cell}
            if "rephrases" in fields:
                parts = (part.strip() for part in fields["rephrases"].split("|"))
                fields["rephrases"] = [part for part in parts if part]
            yield f"line {reader.line_num}", fields
    except csv.Error as error:
        line = reader.reader.line_num
        raise RequestError(f"line {line}: not CSV ({error})") from None


class _PlainLoader(yaml.SafeLoader):
    """YAML whose scalars stay text: an answer 12:30, 010 or 1.10 must not become a number."""


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag.endswith((":null", ":merge"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _as_text(loader: _PlainLoader, node: yaml.ScalarNode) -> str:
    return str(loader.construct_scalar(node))


for _tag in ("int", "float", "bool", "timestamp"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _as_text)


def _yaml(text: str) -> Entries:
    try:
        loaded = yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        said = getattr(error, "problem", None) or getattr(error, "reason", None)
        reason = said or "nested too deeply"
        raise RequestError(f"line {line}: not YAML ({reason})") from None
    return _entries(loaded)
