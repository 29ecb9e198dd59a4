"""General questions: multiple choice about what no edit is about, from a file of JSON lines.

One object a line, in UTF-8:

    {"question": "Where do fish live?", "choices": ["in water", "in trees"], "answer": "in water"}

"answer" is one of the choices, "id" may stand beside them; unknown fields are refused. The form in
which CommonsenseQA (and ARC, and OpenBookQA) is published is read as well:

    {"question": {"stem": TEXT, "choices": [{"label": "A", "text": TEXT}, ...]}, "answerKey": "A"}

They belong to no case, so they are dealt out: each is asked of one of a cell's cases, whatever the
mode, and what they cost does not grow with the cases. A model with all edits answers each once; of
models with one edit each, every one answers its share. A case that fails takes its share with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from knowpatch.data.case import GENERAL, Case, Probe, accepted
from knowpatch.data.records import Record
from knowpatch.data.source import VARIABLE, data_folder
from knowpatch.errors import DataError, did_you_mean
from knowpatch.reading import decode, parse, read_bytes

FILE = "general/commonsenseqa_dev.jsonl"
"""The questions that are asked where no file is named, below a data folder."""
MOST = 300
PROMPT = "Question: {}\nAnswer:"
OWN = ("question", "choices", "answer", "id")


@dataclass(frozen=True)
class General:
    """General questions that were loaded: as probes, and the SHA-256 of the file they are from."""

    probes: tuple[Probe, ...]
    digest: str


def load_general(
    file: Path | None = None, *, data: Path | None = None, limit: int = MOST
) -> General:
    """The first `limit` questions of a file; by default of FILE below the data folder.

    Raises:
        DataError: in one line: no such file, or what is wrong with which of its lines.
    """
    path = file or _in_folder(data)
    content = read_bytes(path, DataError)
    try:
        # The whole file is checked, so that its end is not found damaged in a longer run.
        probes = tuple(_questions(content))[:limit]
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return General(probes, hashlib.sha256(content).hexdigest())


def present_general(data: Path | None) -> Path | None:
    """FILE below the data folder, if it is there."""
    folder = data_folder(data)
    return folder / FILE if folder and (folder / FILE).is_file() else None


def _in_folder(data: Path | None) -> Path:
    if path := present_general(data):
        return path
    folder = data_folder(data)
    where = f"is not below {folder}" if folder else "has to be given"
    raise DataError(
        f"general questions: {FILE} {where}; the hub does not have it: give the folder that holds "
        f"it with --data DIR (or {VARIABLE}), or questions of your own as `general` in a plan"
    )


def _questions(content: bytes) -> Iterator[Probe]:
    found = 0
    for number, line in enumerate(decode(content, DataError).split("\n"), 1):
        if line.strip():
            found += 1
            yield _question(Record(parse(line, DataError, line=number), f"line {number}"))
    if not found:
        raise DataError("holds no question; give one JSON object a line")


def _question(record: Record) -> Probe:
    if isinstance(record.get("question"), dict):
        text, choices, answer = _published(record)
    else:
        for name in record.fields:
            if name not in OWN:
                hint = did_you_mean(name, OWN)
                raise DataError(f"{record.place}: unknown field {name!r}: {hint}")
        text, answer = record.text("question"), record.text("answer")
        choices = record.texts("choices")
    given = tuple(dict.fromkeys(choice.strip() for choice in choices))  # some come twice
    if not text.strip() or not all(given) or len(given) < 2:
        raise DataError(f"{record.place}: expected a question and two choices or more, none empty")
    if answer.strip() not in given:
        raise DataError(f"{record.place}: the answer {answer!r} is none of the choices")
    return Probe(GENERAL, PROMPT.format(text.strip()), accepted(answer.strip()), choices=given)


def _published(record: Record) -> tuple[str, list[str], str]:
    """Question, choices and answer of a line in the published form."""
    inner, key = record.inner("question"), record.text("answerKey")
    choices = {one.text("label"): one.text("text") for one in inner.inners("choices")}
    if key not in choices:
        raise DataError(f"{record.at('answerKey')}: no choice is labelled {key!r}")
    return inner.text("stem"), list(choices.values()), choices[key]


def dealt(cases: Sequence[Case], probes: Sequence[Probe]) -> tuple[Case, ...]:
    """The cases with the questions dealt out in turn, to those that have something to edit."""
    takers = [i for i, case in enumerate(cases) if case.requests and not case.unusable]
    hands = {taker: tuple(probes[n :: len(takers)]) for n, taker in enumerate(takers)}
    return tuple(
        replace(case, probes=(*case.probes, *hands.get(i, ()))) for i, case in enumerate(cases)
    )
