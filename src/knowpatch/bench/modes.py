"""The modes: single, batch and sequential. They differ in when a patch comes and when it goes.

Each takes the cases of a cell and yields rounds: cases to be scored, with what makes the model an
edited one. Patches that come before later ones (batch, sequential) are kept in the cell's folder as
soon as they are made, so that a run that was killed goes on from them.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ValidationError

from knowpatch.bench.memory import Budget, Meter
from knowpatch.bench.schema import CellFacts, dump
from knowpatch.data.case import Case
from knowpatch.edited import EditedModel
from knowpatch.editing import edit, edit_each
from knowpatch.errors import KnowpatchError, OptionError, PatchError
from knowpatch.files import write_atomically
from knowpatch.method import EditMethod
from knowpatch.patch import Patch

log = logging.getLogger(__name__)

FIRST, SAMPLE = 20, 100
"""Cases that are scored before the end: the first ones, and so many in all."""
Numbered = tuple[int, Case]


class Made(BaseModel):
    """What editing one case came to: seconds per request, peak memory, the ids of the patches, and
    the error if there was one."""

    seconds: float | None = None
    peak_mb: float | None = None
    error: str | None = None
    patches: tuple[str, ...] = ()


@dataclass(frozen=True)
class Round:
    """Cases to be scored together.

    Attributes:
        cases: with their numbers.
        made: what editing each of them came to.
        patches: for each case the patches that it alone carries; None where all are live.
        edits: cases edited so far; aged: whether one after the other.
        final: whether these rows are the last word.
    """

    cases: Sequence[Numbered]
    made: Sequence[Made]
    patches: Sequence[tuple[Patch, ...]] | None = None
    edits: int = 1
    aged: bool = False
    final: bool = True


@dataclass
class Work:
    """One cell's model, method, cases and folder, as a mode gets them.

    `done` says whether a case has its row at a number of edits; such cases are left out of rounds.
    `edited` is told how many cases are edited, where that is long before they are scored.
    """

    model: EditedModel
    method: EditMethod
    facts: CellFacts
    cases: Sequence[Case]
    folder: Path
    done: Callable[[int, int, bool], bool]
    budget: Budget
    edited: Callable[[int], None]

    def chunks(self, numbers: Sequence[int]) -> Iterator[list[Numbered]]:
        """Numbered cases, a few at a time, as memory allows."""
        start = 0
        while start < len(numbers):
            stop = start + self.budget.cases
            yield [(i, self.cases[i]) for i in numbers[start:stop]]
            start = stop

    def rounds(
        self,
        numbers: Sequence[int],
        made: Sequence[Made],
        *,
        final: bool,
        edits: int,
        aged: bool = False,
    ) -> Iterator[Round]:
        """Rounds over live patches, for the cases that have no row yet."""
        left = [i for i in numbers if not self.done(i, edits, final)]
        for chunk in self.chunks(left):
            yield Round(chunk, [made[i] for i, _ in chunk], None, edits, aged, final)


def single(work: Work) -> Iterator[Round]:
    """Each case alone: edit, score, give back. Patches are carried beside the model if they can."""
    for chunk in work.chunks(range(len(work.cases))):
        # A chunk is computed whole even if some of its rows are there: what is computed together
        # decides the last digits.
        if all(work.done(i, 1, True) for i, _ in chunk):
            continue
        made, patches = _each(work, [case for _, case in chunk])
        yield Round(chunk, made, patches)


def batch(work: Work) -> Iterator[Round]:
    """All cases at once in one patch; those whose requests the method refuses are left out."""
    count = len(work.cases)
    refused = [_refused(work.method, case) for case in work.cases]
    requests = [
        request
        for case, why in zip(work.cases, refused, strict=True)
        for request in ([] if why or case.unusable else case.requests)
    ]
    made, patches = _kept(
        work, 0, lambda: (edit(work.model, requests, method=work.method),), len(requests)
    )
    each = [made.model_copy(update={"error": why or made.error}) for why in refused]
    with work.model.applied(*patches):
        yield from work.rounds(range(count), each, final=True, edits=count)


def _refused(method: EditMethod, case: Case) -> str | None:
    """Why a method does not take a case's requests."""
    try:
        method.check_requests(case.requests)
    except KnowpatchError as refused:
        return str(refused)
    return None


def sequential(work: Work) -> Iterator[Round]:
    """One case after another, each on the model as edited so far; scored at ages and at the end.

    The cases scored before the end are the same ones at every age.
    """
    made: list[Made] = []
    count, ages = len(work.cases), work.facts.ages
    sample = _sample(count)
    with work.model.growing() as add:
        for number, case in enumerate(work.cases):
            one, patches = _kept(work, number, partial(_patches, work, case), len(case.requests))
            for patch in patches:
                add(patch)
            made.append(one)
            edits = len(made)
            work.edited(edits)
            if edits == count:
                break
            if 0 in ages and number in sample:
                yield from work.rounds([number], made, final=False, edits=edits, aged=True)
            if edits in ages:
                so_far = [i for i in sample if i < edits]
                yield from work.rounds(so_far, made, final=False, edits=edits, aged=True)
        yield from work.rounds(range(count), made, final=True, edits=count, aged=True)


def _sample(count: int) -> list[int]:
    """The first FIRST numbers below `count` and others evenly among the rest, SAMPLE in all."""
    rest = range(FIRST, count)
    most = SAMPLE - FIRST
    if len(rest) <= most:
        return list(range(count))
    return [*range(FIRST), *(rest[i * len(rest) // most] for i in range(most))]


MODES: dict[str, Callable[[Work], Iterator[Round]]] = {
    "single": single,
    "batch": batch,
    "sequential": sequential,
}


def check_mode(method: EditMethod, mode: str) -> None:
    """Refuse, in one line, a mode that a method does not have."""
    if mode != "single" and not getattr(method, mode):
        raise OptionError(f"{method.name} has no {mode} mode")


def _each(work: Work, cases: Sequence[Case]) -> tuple[list[Made], list[tuple[Patch, ...]]]:
    """Patches for each case alone; together where every case is one request."""
    meter = Meter(work.model.view.device)
    if all(len(case.requests) == 1 for case in cases):
        requests = [case.requests[0] for case in cases]
        try:
            with meter.running():
                patches = edit_each(work.model, requests, method=work.method)
            return [_made(meter, len(cases))] * len(cases), [(patch,) for patch in patches]
        except Exception:  # one of them: which, shows when each is edited alone
            log.debug("editing several cases together failed", exc_info=True)
    found = [_measured(work, partial(_patches, work, c), len(c.requests)) for c in cases]
    return [made for made, _ in found], [patches for _, patches in found]


def _patches(work: Work, case: Case) -> tuple[Patch, ...]:
    """The patches that edit one case on the model as it is now."""
    if case.unusable or not case.requests:
        return ()
    if work.method.batch or len(case.requests) == 1:
        return (edit(work.model, case.requests, method=work.method),)
    patches: list[Patch] = []
    with work.model.growing() as add:
        for request in case.requests:
            patches.append(edit(work.model, request, method=work.method))
            add(patches[-1])
    return tuple(patches)


def _measured(
    work: Work, edit_: Callable[[], tuple[Patch, ...]], requests: int
) -> tuple[Made, tuple[Patch, ...]]:
    meter, error = Meter(work.model.view.device), None
    patches: tuple[Patch, ...] = ()
    try:
        with meter.running():
            patches = edit_()
    except Exception as fault:  # one case must not end the run; its row says what went wrong
        log.debug("editing failed", exc_info=True)
        error = described(fault)
    return _made(meter, max(requests, 1), error, patches), patches


def _made(
    meter: Meter, requests: int, error: str | None = None, patches: Sequence[Patch] = ()
) -> Made:
    return Made(
        seconds=meter.seconds / requests,
        peak_mb=meter.peak / 1e6,
        error=error,
        patches=tuple(patch.id for patch in patches),
    )


def described(fault: Exception) -> str:
    """An error as one line; whose fault it is shows in the name."""
    line = " ".join(str(fault).split())
    return line if isinstance(fault, KnowpatchError) else f"{type(fault).__name__}: {line}"


def _kept(
    work: Work, number: int, edit_: Callable[[], tuple[Patch, ...]], requests: int
) -> tuple[Made, tuple[Patch, ...]]:
    """What was made of a step before, if all of it is there; else made now and kept."""
    folder = work.folder / "patches"
    note = folder / f"{number:06}.json"
    with contextlib.suppress(OSError, ValidationError, PatchError):
        known = Made.model_validate_json(note.read_bytes())
        files = [folder / f"{number:06}-{i:03}.safetensors" for i in range(len(known.patches))]
        found = tuple(Patch.load(path) for path in files)
        if tuple(patch.id for patch in found) == known.patches:
            return known, found
    made, patches = _measured(work, edit_, requests)
    for i, patch in enumerate(patches):
        patch.save(folder / f"{number:06}-{i:03}.safetensors")
    write_atomically(note, dump(made).encode())
    return made, patches


def forget(folder: Path) -> None:
    """Remove the patches of a cell that is finished."""
    shutil.rmtree(folder / "patches", ignore_errors=True)
