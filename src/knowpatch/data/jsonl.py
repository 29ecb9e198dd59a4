"""Cases as JSON lines: the format for one's own data, and for what is made here.

One object a line, in UTF-8:

    {"id": "1", "requests": [REQUEST, ...], "probes": [PROBE, ...]}

    REQUEST  {"prompt", "target", "subject"?, "old"?, "kind"?, "rephrases"?, "id"?}
             as in a file of edit requests. Where there is one, its fields but "id" may stand in the
             case itself: {"prompt": ..., "target": ..., "probes": [...]}.
    PROBE    {"kind", "prompt", "answers"?, "request"?, "subject"?}
             kind: rewrite, rephrase, portability.NAME, locality.NAME, sentiment.same,
             sentiment.opposite, sentiment.other, forget, retain, multihop or hop.
             answers: one text, a list of texts, or a list of alias lists.
             request: the number, from 0, of the request that it belongs to.
             subject: what it is about, a part of the prompt, where no request says so.

"id" is by default the line's number. Without "probes" each request's own prompt is asked (an empty
list asks nothing). "oddities" (a list of texts) and "unusable" (a text) tell of what the case was
read from. Unknown fields are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from knowpatch.data.case import REWRITE, Answers, Case, Probe, accepted
from knowpatch.data.draft import request_of
from knowpatch.data.records import Record, called, checked_kind
from knowpatch.errors import DataError, did_you_mean
from knowpatch.files import write_atomically
from knowpatch.reading import decode, parse, read_bytes
from knowpatch.request import EditRequest

REQUEST = tuple(EditRequest.model_fields)
INLINE = tuple(name for name in REQUEST if name != "id")
CASE = ("id", "requests", "probes", "oddities", "unusable")
PROBE = ("kind", "prompt", "answers", "request", "subject")


def read_cases(path: Path) -> list[Case]:
    """The cases of a file.

    Raises:
        DataError: naming the file, the line, and what is wrong with it.
    """
    try:
        return list(cases_of(read_bytes(path, DataError)))
    except DataError as error:
        text = str(error)
        raise DataError(text if text.startswith(f"{path}:") else f"{path}: {text}") from None


def cases_of(content: bytes) -> Iterator[Case]:
    """The cases of a file's content; DataError naming the line."""
    ids: dict[str, int] = {}
    # Not splitlines: U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(decode(content, DataError).split("\n"), 1):
        if line.strip():
            case = _case(Record(parse(line, DataError, line=number), f"line {number}", number))
            if case.id in ids:
                raise DataError(f"line {number}: line {ids[case.id]} has the id {case.id!r} too")
            ids[case.id] = number
            yield case
    if not ids:
        raise DataError("holds no case; give one JSON object a line")


def write_cases(cases: Iterable[Case], path: Path) -> Path:
    """Write cases to a file, whole or not at all; reading it gives the same cases.

    Raises:
        DataError: two cases of one id, or a case that could not be read again.
    """
    lines = []
    ids: set[str] = set()
    for case in cases:
        line = json.dumps(_fields(case), ensure_ascii=False)
        if case.id in ids or _case(Record(json.loads(line), f"case {case.id!r}")) != case:
            raise DataError(f"case {case.id!r}: comes twice, or is not one that a file can hold")
        ids.add(case.id)
        lines.append(line + "\n")
    return write_atomically(path, "".join(lines).encode())


def _case(record: Record) -> Case:
    requests = tuple(_requests(record))
    if "probes" in record:
        probes = tuple(_probe(item, len(requests)) for item in record.inners("probes"))
    elif requests:
        probes = tuple(
            Probe(REWRITE, request.prompt, accepted(request.target), request=number)
            for number, request in enumerate(requests)
        )
    else:
        raise DataError(f"{record.place}: holds neither a request nor a probe; give one of them")
    oddities = tuple(record.texts("oddities")) if "oddities" in record else ()
    unusable = record.text("unusable") if "unusable" in record else None
    return Case(record.named("id"), requests, probes, oddities, unusable)


def _requests(record: Record) -> Iterator[EditRequest]:
    if "requests" in record.fields:
        _known(record, CASE)
        yield from (_request(item) for item in record.inners("requests"))
    else:
        _known(record, (*CASE, *INLINE))
        fields = {name: record.fields[name] for name in INLINE if name in record}
        if fields:
            yield _request(Record(fields, record.place))


def _known(record: Record, allowed: Iterable[str]) -> None:
    for name in record.fields:
        if name not in allowed:
            raise DataError(
                f"{record.place}: unknown field {name!r}: {did_you_mean(name, allowed)}"
            )


def _request(record: Record) -> EditRequest:
    _known(record, REQUEST)
    texts = ("prompt", "target", "subject", "old", "kind", "id")
    fields: dict[str, Any] = {name: record.text(name) for name in texts if name in record}
    if "rephrases" in record:
        fields["rephrases"] = record.texts("rephrases")
    try:
        return request_of(**fields)
    except DataError as error:
        raise DataError(f"{record.place}: {error}") from None


def _probe(record: Record, requests: int) -> Probe:
    _known(record, PROBE)
    number = record.fields.get("request")
    whole = isinstance(number, int) and not isinstance(number, bool)
    if number is not None and not (whole and 0 <= number < requests):
        raise DataError(
            f"{record.at('request')}: expected the number of one of the case's {requests} requests,"
            f" from 0, got {number if whole and abs(number) < 10**9 else called(number)}"
        )
    prompt = record.text("prompt")
    if not prompt.strip():
        raise DataError(f"{record.at('prompt')}: is empty; give a question")
    kind = checked_kind(record.text("kind"), record.at("kind"))
    subject = record.text("subject").strip() if "subject" in record else None
    if subject is not None and (not subject or subject not in prompt):
        raise DataError(f"{record.at('subject')}: {subject!r} is not a part of the prompt")
    return Probe(kind, prompt, _answers(record), request=number, subject=subject)


def _answers(record: Record) -> Answers:
    answers = record.answers("answers") if "answers" in record else ()
    if not all(answer and all(alias.strip() for alias in answer) for answer in answers):
        raise DataError(f"{record.at('answers')}: an answer is empty; leave it out")
    return answers


def _fields(case: Case) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "id": case.id,
        "requests": [
            request.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
            | {"kind": request.kind, "target": request.target}
            for request in case.requests
        ],
        "probes": [_probe_fields(probe) for probe in case.probes],
    }
    if case.oddities:
        fields["oddities"] = list(case.oddities)
    if case.unusable is not None:
        fields["unusable"] = case.unusable
    return fields


def _probe_fields(probe: Probe) -> dict[str, Any]:
    fields: dict[str, Any] = {"kind": probe.kind, "prompt": probe.prompt}
    if probe.answers:
        fields["answers"] = [list(answer) for answer in probe.answers]
    if probe.request is not None:
        fields["request"] = probe.request
    if probe.subject is not None:
        fields["subject"] = probe.subject
    return fields
