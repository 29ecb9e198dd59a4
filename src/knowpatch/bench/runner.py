"""Runner: a plan's cells, run into rows. Rows are appended as they come; what is there is not run
again, so that a run that was killed at any moment ends with the same rows."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import torch
import transformers
import yaml

import knowpatch
from knowpatch.bench.memory import Budget, check_room, peak
from knowpatch.bench.modes import MODES, Made, Round, Work, check_mode, forget
from knowpatch.bench.plan import MethodPlan, Plan
from knowpatch.bench.schema import CellFacts, Mode, Row, dump, facts_of, rows_of
from knowpatch.bench.scoring import Asked, Scorer, Scores
from knowpatch.data.case import Case
from knowpatch.data.general import FILE, General, dealt, load_general, present_general
from knowpatch.data.source import Loaded, expanded, load
from knowpatch.edited import EditedModel
from knowpatch.editing import choose
from knowpatch.errors import InputError
from knowpatch.files import append_lines, source_digest, write_atomically
from knowpatch.method import EditMethod
from knowpatch.metrics.asker import Asker
from knowpatch.metrics.catalogue import ALL, chosen
from knowpatch.metrics.metric import Metric
from knowpatch.progress import Progress, silent

log = logging.getLogger(__name__)


@dataclass
class Cell:
    """One cell that is about to run.

    Attributes:
        facts: what it is; folder: where its rows go.
        method, cases: configured, loaded.
    """

    facts: CellFacts
    folder: Path
    method: EditMethod
    cases: Sequence[Case]
    _rows: dict[tuple[int, int, bool], Row] = field(default_factory=dict)

    @classmethod
    def at(cls, facts: CellFacts, out: Path, method: EditMethod, cases: Sequence[Case]) -> Cell:
        """The cell below `out`, with the rows that are there."""
        name = hashlib.sha256(dump(facts).encode()).hexdigest()[:16]
        cell = cls(facts, out / "cells" / name, method, cases)
        if not (cell.folder / "cell.json").is_file():
            write_atomically(cell.folder / "cell.json", dump(facts).encode())
        facts_of(cell.folder)
        for row in rows_of(cell.folder):
            cell._rows[row.index, row.edits, row.final] = row
        return cell

    def done(self, index: int, edits: int, final: bool) -> bool:
        return (index, edits, final) in self._rows

    @property
    def finished(self) -> int:
        """Cases with their last word."""
        return sum(final for _, _, final in self._rows)

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows that are not there yet, whole; what a kill cut off is written over."""
        new = [row for row in rows if not self.done(row.index, row.edits, row.final)]
        append_lines(self.folder / "rows.jsonl", [dump(row) for row in new])
        for row in new:
            self._rows[row.index, row.edits, row.final] = row


class Runner:
    """Runs a plan on one model, into one folder.

    Args:
        model: what the plan is run on; given back as it was.
        plan: what to run.
        out: the results folder; rows that are in it are not run again.
        progress: told of each cell how many of its cases have their last word.
    """

    def __init__(
        self, model: EditedModel, plan: Plan, out: Path, *, progress: Progress = silent
    ) -> None:
        self.model, self.plan, self.out, self.progress = model, plan, out, progress
        check_room(plan.memory_bytes)
        self.metrics = chosen(plan.metrics)
        # Whatever is wrong with the plan shows before the first edit.
        self.methods = [self._method(one) for one in plan.methods]
        self.loaded = [
            load(name, data=plan.data, limit=plan.limit).sampled(plan.probes)
            for name in expanded(plan.datasets)
        ]
        self.general = self._general()
        if self.general:
            probes = self.general.probes
            self.loaded = [replace(x, cases=dealt(x.cases, probes)) for x in self.loaded]

    def run(self) -> list[Cell]:
        """Run all cells that are not finished; those of one dataset after each other, so that the
        unedited model is asked once."""
        fields = self.plan.absolute().model_dump(mode="json", exclude_defaults=True)
        write_atomically(self.out / "plan.yaml", yaml.safe_dump(fields).encode())
        cells: dict[Path, Cell] = {}
        for loaded, mode, method in product(self.loaded, self.plan.modes, self.methods):
            cell = self._cell(loaded, mode, method)
            if cell.folder not in cells:  # a method may be named twice
                self._run(cell)
                cells[cell.folder] = cell
        return list(cells.values())

    def _method(self, plan: MethodPlan) -> EditMethod:
        options = {"chat": True, **plan.options} if self.plan.chat else plan.options
        return choose(plan.name, options, seed=self.plan.seed)

    def _general(self) -> General | None:
        """The general questions, if a metric asks them. Where all metrics are wanted, those that
        would need a file that nobody named are left without questions if it is not there."""
        plan = self.plan
        if not any(metric.general for metric in self.metrics):
            return None
        if ALL in (plan.metrics or ()) and not plan.general and not present_general(plan.data):
            log.warning("general questions are not asked: %s is not in the data folder", FILE)
            return None
        return load_general(plan.general, data=plan.data, limit=plan.questions)

    def _cell(self, loaded: Loaded, mode: Mode, method: EditMethod) -> Cell:
        view = self.model.view
        plugged = [type(method), *loaded.source, *(metric.ask for metric in self.metrics)]
        facts = CellFacts(
            model={"source": view.source, "fingerprint": view.fingerprint, "form": view.form},
            method=method.name,
            config=method.config.model_dump(mode="json"),
            seed=self.plan.seed,
            dataset=loaded.name,
            split=loaded.split,
            digest=loaded.digest,
            mode=mode,
            limit=len(loaded.cases),
            probes=self.plan.probes,
            chat=self.plan.chat,
            metrics=tuple(metric.name for metric in self.metrics),
            ages=self.plan.ages if mode == "sequential" else (),
            versions=_versions(plugged, self.metrics) | self._questions(),
        )
        return Cell.at(facts, self.out, method, loaded.cases)

    def _questions(self) -> dict[str, str]:
        """Which general questions the rows are of."""
        if self.general is None:
            return {}
        return {"general": f"{len(self.general.probes)} of {self.general.digest[:16]}"}

    def _run(self, cell: Cell) -> None:
        total = len(cell.cases)
        stage = f"{cell.facts.method} on {cell.facts.dataset}, {cell.facts.mode}"
        self.progress(stage, cell.finished, total)
        if cell.finished == total:
            forget(cell.folder)  # a kill may have come in between
            return
        try:
            check_mode(cell.method, cell.facts.mode)
            cell.method.check(self.model.view)
        except InputError as refused:
            cell.append([_row(i, c, Made(), str(refused)) for i, c in enumerate(cell.cases)])
            return
        work = Work(
            model=self.model,
            method=cell.method,
            facts=cell.facts,
            cases=cell.cases,
            folder=cell.folder,
            done=cell.done,
            budget=Budget(self.plan.memory_bytes),
            edited=lambda done: self.progress(f"{stage}, editing", done, total),
        )
        scorer = Scorer(self.model, self.metrics, self.plan.chat)
        known = self._before(work, scorer)
        for round_ in MODES[cell.facts.mode](work):
            cell.append(self._score(scorer, round_, known))
            work.budget.used(peak())
            self.progress(stage, cell.finished, total)
        forget(cell.folder)

    def _before(self, work: Work, scorer: Scorer) -> dict[int, Asker | str]:
        """What the unedited model says, where edits stay live while cases are scored."""
        known: dict[int, Asker | str] = {}
        if work.facts.mode != "single":
            for chunk in work.chunks(range(len(work.cases))):
                answers = scorer.before([case for _, case in chunk])
                known.update(zip((i for i, _ in chunk), answers, strict=True))
        return known

    def _score(self, scorer: Scorer, round_: Round, known: dict[int, Asker | str]) -> list[Row]:
        """The rows of a round; `known` is what the unedited model said, if it was asked before."""
        cases = [case for _, case in round_.cases]
        before = [known[i] for i, _ in round_.cases] if known else scorer.before(cases)
        outcomes: list[Scores | str] = [
            case.unusable or made.error or (asker if isinstance(asker, str) else {})
            for made, case, asker in zip(round_.made, cases, before, strict=True)
        ]
        good = [n for n, outcome in enumerate(outcomes) if not outcome]
        patches = round_.patches
        asked = [
            Asked(cases[n], asker, None if patches is None else patches[n])
            for n in good
            if isinstance(asker := before[n], Asker)
        ]
        for n, outcome in zip(good, scorer.after(asked), strict=True):
            outcomes[n] = outcome
        return [
            _row(i, case, made, outcome, round_)
            for (i, case), made, outcome in zip(round_.cases, round_.made, outcomes, strict=True)
        ]


def _row(
    index: int, case: Case, made: Made, outcome: Scores | str, round_: Round | None = None
) -> Row:
    failed = isinstance(outcome, str)
    return Row(
        case=case.id,
        subject=next((r.subject or r.prompt for r in case.requests), ""),
        index=index,
        edits=round_.edits if round_ else 1,
        age=max(round_.edits - 1 - index, 0) if round_ and round_.aged else 0,
        final=round_.final if round_ else True,
        scores={} if isinstance(outcome, str) else outcome,
        seconds=made.seconds if case.requests and not failed else None,
        peak_mb=made.peak_mb if case.requests and not failed else None,
        error=outcome if isinstance(outcome, str) else None,
    )


def _versions(plugged: Sequence[object], metrics: Sequence[Metric]) -> dict[str, str]:
    """What the rows depend on besides the plan: the library's own source, what it runs on, the
    files of methods, datasets and metrics from elsewhere, and metrics' own settings."""
    found = {
        "knowpatch": knowpatch.__version__,
        "source": source_digest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    root = Path(knowpatch.__file__).parent
    files = {Path(inspect.getfile(inspect.unwrap(one))) for one in plugged}  # type: ignore[arg-type]
    for path in sorted(files):
        if root not in path.parents:
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found | {metric.name: metric.setting() for metric in metrics if metric.setting}
