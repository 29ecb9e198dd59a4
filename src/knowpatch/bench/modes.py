"""The modes: single, batch and sequential. They differ in when a patch comes and when it goes.

Each takes the cases of a cell and yields rounds: cases to be scored, with what makes the model an
edited one. Patches that come before later ones (batch, sequential) are kept in the cell's folder as
soon as they are made, so that a run that was killed goes on from them.
"""

from __future__ import annotations

import contextlib
import logging
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import BaseModel

from knowpatch.bench.memory import Budget, Meter
from knowpatch.bench.schema import CellFacts, dump
from knowpatch.data.case import Case
from knowpatch.edited import EditedModel
from knowpatch.editing import edit, edit_each
from knowpatch.errors import KnowpatchError, OptionError
from knowpatch.files import write_atomically
from knowpatch.method import EditMethod
from knowpatch.patch import Patch

log = logging.getLogger(__name__)

SAMPLE = 100
"""Cases that are scored at an age before the end."""
Numbered = tuple[int, Case]


class Made(BaseModel):
    """What editing one case came to: seconds, peak memory, and the error if there was one."""

    seconds: float | None = None
    peak_mb: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Round:
    """Cases to be scored together.

    Attributes:
        cases: with their numbers.
        made: what editing each of them came to.
        patches: for each case the patches that it alone carries; None where all are live.
        edits: cases edited so far; final: whether these rows are the last word.
    """

    cases: Sequence[Numbered]
    made: Sequence[Made]
    patches: Sequence[tuple[Patch, ...]] | None = None
    edits: int = 1
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
        self, numbers: Sequence[int], made: Sequence[Made], *, final: bool, edits: int
    ) -> Iterator[Round]:
        """Rounds over live patches, for the cases that have no row yet."""
        left = [i for i in numbers if not self.done(i, edits, final)]
        for chunk in self.chunks(left):
            yield Round(chunk, [made[i] for i, _ in chunk], None, edits, final)


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
    """All cases at once in one patch."""
    count = len(work.cases)
    everything = [request for case in work.cases for request in case.requests]
    made, patches = _kept(work, 0, lambda: (edit(work.model, everything, method=work.method),))
    share = made.model_copy(update={"seconds": made.seconds and made.seconds / count})
    with work.model.applied(*patches):
        yield from work.rounds(range(count), [share] * count, final=True, edits=count)


def sequential(work: Work) -> Iterator[Round]:
    """One case after another, each on the model as edited so far; scored at ages and at the end.

    The cases scored before the end are the first of one random order, so that it is the same ones
    again and again.
    """
    made: list[Made] = []
    count = len(work.cases)
    order = random.Random(0).sample(range(count), count)
    with contextlib.ExitStack() as live:
        for number, case in enumerate(work.cases):
            one, patches = _kept(work, number, partial(_patches, work, case))
            for patch in patches:
                live.enter_context(work.model.applied(patch))
            made.append(one)
            work.edited(len(made))
            if number + 1 == count:
                break
            if 0 in work.facts.ages and number in order[:SAMPLE]:
                yield from work.rounds([number], made, final=False, edits=number + 1)
            if number + 1 in work.facts.ages:
                sample = sorted([i for i in order if i <= number][:SAMPLE])
                yield from work.rounds(sample, made, final=False, edits=number + 1)
        yield from work.rounds(range(count), made, final=True, edits=count)


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
    found = [_measured(work, partial(_patches, work, case)) for case in cases]
    return [made for made, _ in found], [patches for _, patches in found]


def _patches(work: Work, case: Case) -> tuple[Patch, ...]:
    """The patches that edit one case on the model as it is now."""
    if not case.requests:
        return ()
    if work.method.batch or len(case.requests) == 1:
        return (edit(work.model, case.requests, method=work.method),)
    patches: list[Patch] = []
    with contextlib.ExitStack() as live:
        for request in case.requests:
            patches.append(edit(work.model, request, method=work.method))
            live.enter_context(work.model.applied(patches[-1]))
    return tuple(patches)


def _measured(work: Work, edit_: Callable[[], tuple[Patch, ...]]) -> tuple[Made, tuple[Patch, ...]]:
    meter, error = Meter(work.model.view.device), None
    patches: tuple[Patch, ...] = ()
    try:
        with meter.running():
            patches = edit_()
    except Exception as fault:  # one case must not end the run; its row says what went wrong
        log.debug("editing failed", exc_info=True)
        error = described(fault)
    return _made(meter, 1, error), patches


def _made(meter: Meter, count: int, error: str | None = None) -> Made:
    return Made(seconds=meter.seconds / count, peak_mb=meter.peak / 1e6, error=error)


def described(fault: Exception) -> str:
    """An error as one line; whose fault it is shows in the name."""
    line = " ".join(str(fault).split())
    return line if isinstance(fault, KnowpatchError) else f"{type(fault).__name__}: {line}"


def _kept(
    work: Work, number: int, edit_: Callable[[], tuple[Patch, ...]]
) -> tuple[Made, tuple[Patch, ...]]:
    """What was made of a step before, else made now and kept."""
    folder = work.folder / "patches"
    note = folder / f"{number:06}.json"
    if note.is_file():
        made = Made.model_validate_json(note.read_bytes())
        files = sorted(folder.glob(f"{number:06}-*.safetensors"))
        return made, tuple(Patch.load(path) for path in files)
    made, patches = _measured(work, edit_)
    for i, patch in enumerate(patches):
        patch.save(folder / f"{number:06}-{i:03}.safetensors")
    write_atomically(note, dump(made).encode())
    return made, patches


def forget(folder: Path) -> None:
    """Remove the patches of a cell that is finished."""
    shutil.rmtree(folder / "patches", ignore_errors=True)
