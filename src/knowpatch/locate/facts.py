"""Facts to locate: prompts with a subject and the answer by the data; which a model knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from knowpatch.ask import Ask, Speaker
from knowpatch.data.case import MULTIHOP, REPHRASE, REWRITE, Case, Probe
from knowpatch.data.records import Record
from knowpatch.data.source import dataset_of, load
from knowpatch.errors import DataError, RequestError, did_you_mean
from knowpatch.parts.spans import subject_span
from knowpatch.progress import Progress, silent
from knowpatch.reading import decode, parse, read_bytes

FIELDS = ("prompt", "subject", "answer", "id", "rephrases", "chains")
ENDINGS = (".json", ".jsonl")
TOGETHER = 40
"""Facts that a model is asked about at a time."""


@dataclass(frozen=True)
class Fact:
    """One fact.

    Attributes:
        prompt: text that the answer follows.
        subject: what it is about, a part of the prompt.
        answer: what follows by the data; None for whatever the model says.
        id: the data's own name for it.
        rephrases: the same in other words, with the subject as it is.
        chains: questions about the subject that need this fact and others.
    """

    prompt: str
    subject: str
    answer: str | None = None
    id: str = ""
    rephrases: tuple[str, ...] = ()
    chains: tuple[str, ...] = ()

    @classmethod
    def of(cls, prompt: str, subject: str, answer: str | None = None, id: str = "") -> Fact:
        """A fact as a person gave it; RequestError if there is nothing to trace.

        Blanks around subject and answer go, as do those behind the prompt.
        """
        for name, text in (("prompt", prompt), ("subject", subject), ("answer", answer)):
            if text is not None and not text.strip():
                raise RequestError(f"the {name} is empty")
        subject_span(prompt, subject.strip())
        return cls(prompt.rstrip(), subject.strip(), answer and answer.strip(), id)


def read_facts(source: str | Path, *, data: Path | None = None) -> list[Fact]:
    """The facts of a file, or of a dataset, in order.

    Args:
        source: a .json or .jsonl file of objects with prompt, subject and, where known, answer, id,
            rephrases and chains; a dataset whose cases have subjects, by its name or by the path of
            its file.
        data: folder with the datasets' files.

    Raises:
        DataError, OptionError: naming the file, the place in it, and what is wrong.
    """
    path = Path(source)
    if path.suffix.lower() not in ENDINGS:
        return _of_cases(str(source), load(str(source), data=data).cases)
    if path.is_file() and (named := dataset_of(path)):
        name, folder = named
        return _of_cases(str(source), load(name, data=folder).cases)
    content = decode(read_bytes(path, DataError), DataError)
    try:
        return [_fact(record) for record in _records(content, path.suffix.lower())]
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _records(text: str, ending: str) -> Iterator[Record]:
    """The objects of a file, with their places."""
    if ending == ".jsonl":
        numbered = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        items: list[tuple[str, Any]] = [
            (f"line {n}", parse(line, DataError, line=n)) for n, line in numbered
        ]
    else:
        loaded = parse(text, DataError)
        listed = loaded if isinstance(loaded, list) else [loaded]
        items = [(f"entry {n}", item) for n, item in enumerate(listed, 1)]
    if not items:
        raise DataError("holds no fact; give at least one with prompt and subject")
    for number, (place, item) in enumerate(items, 1):
        yield Record(item, place, number)


def _fact(record: Record) -> Fact:
    for name in record.fields:
        if name not in FIELDS:
            hint = did_you_mean(name, FIELDS)
            raise DataError(f"{record.place}: unknown field {name!r}: {hint}")
    answer = record.text("answer") if "answer" in record else None
    try:
        fact = Fact.of(record.text("prompt"), record.text("subject"), answer, record.named("id"))
        rephrases, chains = (
            tuple(record.texts(name)) if name in record else () for name in ("rephrases", "chains")
        )
        for text in (*rephrases, *chains):
            subject_span(text, fact.subject)
    except RequestError as error:
        raise DataError(f"{record.place}: {error}") from None
    return replace(fact, rephrases=rephrases, chains=chains)


def _of_cases(source: str, cases: Sequence[Case]) -> list[Fact]:
    """What the cases say of subjects: of probes that name one, else what their edits replace."""
    found = []
    for case in cases:
        asked = [probe for probe in case.of(REWRITE) if probe.subject]
        found += [Fact.of(p.prompt, p.subject or "", p.expected, case.id) for p in asked]
        edits = [(n, r) for n, r in enumerate(case.requests) if r.subject and not asked]
        for number, edit in edits:
            fact = Fact.of(edit.prompt, edit.subject or "", edit.old, case.id)
            reworded = [probe for probe in case.of(REPHRASE) if probe.request == number]
            chains = _naming(fact, case.of(MULTIHOP))
            found.append(replace(fact, rephrases=_naming(fact, reworded), chains=chains))
    if not found:
        raise DataError(f"{source}: no case names a subject; give a file of facts with subjects")
    return found


def _naming(fact: Fact, probes: Sequence[Probe]) -> tuple[str, ...]:
    """The probes' prompts that name the fact's subject."""
    return tuple(p.prompt for p in probes if fact.subject in p.prompt)


def asked(model: Speaker, facts: Sequence[Fact]) -> Iterator[tuple[Fact, bool]]:
    """The facts in order, and whether the model knows each.

    It knows a fact if each token of the answer is the likeliest one behind those before it; what
    has no answer it knows. (ROME keeps facts whose answer is one token; here all of them count.)
    """
    for start in range(0, len(facts), TOGETHER):
        ask, chunk = Ask(model), facts[start : start + TOGETHER]
        forced = [ask.score(fact.prompt, fact.answer) if fact.answer else None for fact in chunk]
        for fact, future in zip(chunk, forced, strict=True):
            yield fact, future is None or all(future.result().correct)


def known(
    model: Speaker,
    facts: Sequence[Fact],
    *,
    most: int | None = None,
    progress: Progress = silent,
) -> tuple[list[Fact], int]:
    """The facts that a model knows (see `asked`), in order, and how many it was asked about.

    Args:
        most: facts that are enough; by default it is asked about all.
    """
    total = len(facts) if most is None else most
    found: list[Fact] = []
    count = 0
    for fact, knows in asked(model, facts):
        if len(found) == most:
            break
        progress("asking what the model knows", len(found), total)
        found += [fact] if knows else []
        count += 1
    progress("asking what the model knows", total, total)
    return found, count
