"""Draft: a case that is being put together from a record, and what is unusual about it.

Some answers are empty, some targets are what the model should say already, some records come twice:
a Draft notes it as an oddity of the case and goes on, so that it is counted and never silently
dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from knowpatch.data.case import REPHRASE, REWRITE, Answers, Case, Probe, accepted, oddities
from knowpatch.errors import DataError, RequestError
from knowpatch.request import EditRequest, Kind, make_request

EMPTY_ANSWER, EMPTY_QUESTION = "empty answer", "empty question"
SAME_TARGET = "target equals the old answer"
NO_SUBJECT, FOREIGN_SUBJECT = "no subject", "subject is not in the prompt"
NO_OLD = "no old answer"
REPEATED_REPHRASE = "a rephrase repeats the prompt or another rephrase"
SAME_CASE, SAME_PROMPT = "same as case", "same prompt as case"


def request_of(**fields: Any) -> EditRequest:
    """An EditRequest; DataError with one line if the fields do not make one.

    A target that equals the old answer is counted for the whole file, so that EditRequest's own
    warning, once for each, is not wanted: `old` is put in behind its back.
    """
    old, target = str(fields.get("old") or ""), str(fields.get("target") or "")
    repeats = bool(old.strip()) and old.strip() == target.strip()
    if repeats:
        fields = {**fields, "old": None, "kind": fields.get("kind") or "modify"}
    try:
        request = make_request(**fields)
    except RequestError as error:
        raise DataError(str(error)) from None
    return request.model_copy(update={"old": old}) if repeats else request


class Draft:
    """A case that is being put together."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.requests: list[EditRequest] = []
        self.probes: list[Probe] = []
        self.oddities: list[str] = []
        self.unusable: str | None = None

    def note(self, oddity: str) -> None:
        if oddity not in self.oddities:
            self.oddities.append(oddity)

    def edit(
        self,
        prompt: str,
        target: str,
        *,
        subject: str | None = None,
        old: str | None = None,
        kind: Kind = "modify",
    ) -> int:
        """Enter a request, with its rewrite probe; returns its number.

        Args:
            subject: None where the data has none; blank is an oddity.
            old: None where the data has none; blank is an oddity.
        """
        number, target = len(self.requests), target.strip()
        if not prompt.strip() or not target:
            what = "prompt" if target else "target"
            self.unusable = self.unusable or f"the {what} is empty"
            return number
        about = self._subject(prompt, subject)
        if old is not None and not old.strip():
            self.note(NO_OLD)
        elif old is not None and old.strip() == target:
            self.note(SAME_TARGET)
        blankless = {"subject": about or "", "old": (old or "").strip()}
        given = {name: text for name, text in blankless.items() if text}
        self.requests.append(request_of(prompt=prompt, target=target, kind=kind, **given))
        self.ask(REWRITE, prompt, accepted(target), request=number)
        return number

    def _subject(self, prompt: str, subject: str | None) -> str | None:
        """A subject that is in its prompt, without blanks around it; None, noted, if it is not."""
        if subject is None:
            return None
        bare = subject.strip()
        if not bare:
            self.note(NO_SUBJECT)
        elif bare not in prompt:
            self.note(FOREIGN_SUBJECT)
        return bare if bare and bare in prompt else None

    def rephrase(self, prompts: Iterable[str], request: int) -> None:
        """Enter other wordings of a request's prompt, each once."""
        if self.unusable:
            return
        edited = self.requests[request]
        known = {edited.prompt}
        for prompt in prompts:
            if prompt in known:
                self.note(REPEATED_REPHRASE)
            else:
                known.add(prompt)
                self.ask(REPHRASE, prompt, accepted(edited.target), request=request)

    def ask(
        self,
        kind: str,
        prompt: str,
        answers: Answers,
        *,
        request: int | None = None,
        subject: str | None = None,
    ) -> None:
        """Enter a probe, without its empty answers; none where no answer is left."""
        filled = (tuple(text.strip() for text in answer if text.strip()) for answer in answers)
        kept = tuple(answer for answer in filled if answer)
        if not kept or [len(answer) for answer in kept] != [len(answer) for answer in answers]:
            self.note(EMPTY_ANSWER)
        if not prompt.strip():
            self.note(EMPTY_QUESTION)
        elif kept:
            about = self._subject(prompt, subject)
            self.probes.append(Probe(kind, prompt, kept, request=request, subject=about))

    def case(self) -> Case:
        """The case; without requests and probes where it is unusable."""
        odd = tuple(self.oddities)
        if self.unusable:
            return Case(self.id, (), (), odd, self.unusable)
        return Case(self.id, tuple(self.requests), tuple(self.probes), odd)


def marked(cases: Iterable[Case]) -> Iterator[Case]:
    """The cases, those marked whose edits, or whose prompts, an earlier case has."""
    ids: set[str] = set()
    same: dict[tuple[tuple[str, str], ...], str] = {}
    prompts: dict[tuple[str, ...], str] = {}
    for case in cases:
        if case.id in ids:
            raise DataError(f"two cases have the id {case.id!r}")
        ids.add(case.id)
        if SAME_TARGET not in case.oddities and any(map(_repeats, case.requests)):
            case = replace(case, oddities=(*case.oddities, SAME_TARGET))
        if case.requests:
            edits = tuple((request.prompt, request.target) for request in case.requests)
            asked = tuple(request.prompt for request in case.requests)
            if earlier := same.get(edits):
                case = replace(case, oddities=(*case.oddities, f"{SAME_CASE} {earlier}"))
            elif earlier := prompts.get(asked):
                case = replace(case, oddities=(*case.oddities, f"{SAME_PROMPT} {earlier}"))
            same.setdefault(edits, case.id)
            prompts.setdefault(asked, case.id)
        yield case


def _repeats(request: EditRequest) -> bool:
    return request.old is not None and request.old.strip() == request.target.strip()


def tally(cases: Sequence[Case]) -> Mapping[str, int]:
    """How many cases have each oddity, whichever earlier case it speaks of; commonest first."""
    general = re.compile(rf"^({SAME_CASE}|{SAME_PROMPT}) .*", re.DOTALL)
    return oddities(
        [
            replace(case, oddities=tuple(general.sub(r"\1 N", odd) for odd in case.oddities))
            for case in cases
        ]
    )
