"""Case and Probe: one benchmark record, as requests to edit and questions to ask.

What a method may learn from is in the requests; what it is judged by is in the probes. Every
dataset is read into these, so that no metric and no runner knows a dataset's format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from knowpatch.request import EditRequest

REWRITE, REPHRASE = "rewrite", "rephrase"
PORTABILITY, LOCALITY = "portability", "locality"
NEIGHBOUR = "locality.neighbour"
SAME, OPPOSITE, OTHER = "sentiment.same", "sentiment.opposite", "sentiment.other"
FORGET, RETAIN = "forget", "retain"
MULTIHOP, HOP = "multihop", "hop"
GENERAL = "general"

Answers = tuple[tuple[str, ...], ...]
"""Accepted answers, each with its aliases; the name that the data gives comes first."""


@dataclass(frozen=True)
class Probe:
    """One question.

    Attributes:
        kind: what is asked for, with a sub-kind behind a dot:
            rewrite (the edited prompt), rephrase, portability.*, locality.*; sentiment.same,
            .opposite (answers of the wanted and of the other sentiment), .other (of another
            entity); forget (whose answers should be gone), retain; multihop, and hop (the single
            questions of its chain, in order); general (a question about what no edit is about).
        prompt: the question, or the start of a text.
        answers: accepted answers, each with its aliases; none where there is no right answer.
        chat: whether it is asked through the chat template.
        request: number of the request it belongs to; None for all.
        choices: what there is to choose from, the answer among it; none for other questions.
        subject: what it is about, a part of the prompt, where no request says so.
    """

    kind: str
    prompt: str
    answers: Answers = ()
    chat: bool = False
    request: int | None = None
    choices: tuple[str, ...] = ()
    subject: str | None = None

    @property
    def expected(self) -> str | None:
        """The first accepted answer; None where the answer should stay as it is."""
        return self.answers[0][0] if self.answers else None

    @property
    def aliases(self) -> tuple[str, ...]:
        """All accepted strings, once each."""
        return tuple(dict.fromkeys(alias for answer in self.answers for alias in answer))

    @property
    def sub_kind(self) -> str:
        return self.kind.partition(".")[2]


def accepted(*answers: str) -> Answers:
    """Accepted answers without aliases."""
    return tuple((answer,) for answer in answers)


@dataclass(frozen=True)
class Case:
    """One record.

    Attributes:
        id: the record's own id, or its number in the file; unique within a dataset.
        requests: what to edit; more than one where the record's edits belong together.
        probes: what to ask.
        oddities: what is unusual about the record ("target equals the old answer"), for counting.
        unusable: why nothing can be edited or asked; such a case is a row with this error.
    """

    id: str
    requests: tuple[EditRequest, ...]
    probes: tuple[Probe, ...]
    oddities: tuple[str, ...] = ()
    unusable: str | None = None

    def of(self, kind: str) -> tuple[Probe, ...]:
        """The probes of a kind: of "locality" those of all its sub-kinds."""
        return tuple(p for p in self.probes if p.kind == kind or p.kind.startswith(f"{kind}."))

    def by_sub_kind(self, kind: str) -> dict[str, list[Probe]]:
        """The probes of a kind by sub-kind ("" for none), in order of appearance."""
        found: dict[str, list[Probe]] = {}
        for probe in self.of(kind):
            found.setdefault(probe.sub_kind, []).append(probe)
        return found

    def sampled(self, most: int | None) -> Case:
        """This case with at most `most` probes of each kind, chosen by their hash, in order.

        All edited prompts are kept, and all parts of a chain: fewer would be another question.
        """
        if most is None:
            return self
        kept: set[int] = set()
        for kind in {probe.kind for probe in self.probes}:
            mine = [i for i, probe in enumerate(self.probes) if probe.kind == kind]
            if kind not in (REWRITE, MULTIHOP, HOP):
                mine = sorted(mine, key=lambda i: _hash(self.probes[i]))[:most]
            kept.update(mine)
        return replace(self, probes=tuple(p for i, p in enumerate(self.probes) if i in kept))


def _hash(probe: Probe) -> str:
    return hashlib.sha256(f"{probe.kind}\n{probe.prompt}\n{probe.answers}".encode()).hexdigest()


def oddities(cases: Sequence[Case]) -> Mapping[str, int]:
    """How many cases have each oddity, commonest first."""
    counts: dict[str, int] = {}
    for case in cases:
        for oddity in dict.fromkeys(case.oddities):
            counts[oddity] = counts.get(oddity, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
