"""Scoring: all metrics of several cases, asked of the unedited and of the edited model together."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pydantic import ValidationError

from knowpatch.ask import Ask
from knowpatch.bench.modes import described
from knowpatch.bench.schema import ScoreRow
from knowpatch.data.case import Case
from knowpatch.edited import EditedModel
from knowpatch.errors import OptionError, PatchError, Unscored
from knowpatch.metrics.asker import Asker, Nobody
from knowpatch.metrics.metric import Metric, Score
from knowpatch.patch import Patch

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
Scores = dict[str, ScoreRow]


@dataclass(frozen=True)
class Asked:
    """A case whose questions to the unedited model are answered."""

    case: Case
    before: Asker
    patches: tuple[Patch, ...] | None
    """Carried by this case alone; None where the edit is live."""


@dataclass(frozen=True)
class Scorer:
    """Scores cases of one model.

    Attributes:
        model: the model; unedited when `before` is called, edited (or to be) in `after`.
        metrics: what is asked.
        chat: whether questions go through the chat template.
    """

    model: EditedModel
    metrics: Sequence[Metric]
    chat: bool

    def before(self, cases: Sequence[Case]) -> list[Asker | str]:
        """Ask the unedited model what the metrics want of it: for each case an asker that knows
        its answers, or the error."""
        return _each(self._before, cases)

    def _before(self, cases: Sequence[Case]) -> list[Asker]:
        ask = Ask(self.model)
        askers = [Asker(ask, chat=self.chat) for _ in cases]
        nobody = Nobody(ask, chat=self.chat)
        for case, asker in zip(cases, askers, strict=True):
            for metric in self.metrics:
                metric.ask(case, asker, nobody)
        ask.run()
        return [asker.answered() for asker in askers]

    def after(self, asked: Sequence[Asked]) -> list[Scores | str]:
        """Ask the edited model, and score: for each case its scores, or the error."""
        try:
            return _each(self._after, asked)
        finally:
            for patch in {patch for item in asked for patch in item.patches or ()}:
                with contextlib.suppress(OptionError):  # one that never came to be held
                    self.model.release(patch.id)

    def _after(self, asked: Sequence[Asked]) -> list[Scores]:
        try:
            return self._scored(asked)
        except PatchError:
            if len(asked) > 1 or asked[0].patches is None:
                raise
        # What cannot be computed beside the model is merged into it.
        (item,) = asked
        with self.model.applied(*item.patches or ()):
            return self._scored([Asked(item.case, item.before, None)])

    def _scored(self, asked: Sequence[Asked]) -> list[Scores]:
        ask = Ask(self.model)
        results = []
        for item in asked:
            after = Asker(ask, item.patches, self.chat)
            found = {m.name: m.ask(item.case, item.before, after) for m in self.metrics}
            results.append({name: result for name, result in found.items() if result})
        ask.run()
        return [{name: _row(result) for name, result in case.items()} for case in results]


def _row(result: Callable[[], Score]) -> ScoreRow:
    try:
        return ScoreRow.model_validate(vars(result()))
    except Unscored as why:
        return ScoreRow(unscored=str(why))
    except ValidationError:  # no row holds what JSON cannot
        return ScoreRow(unscored="a value is not finite")


def _each(work: Callable[[Sequence[T]], list[R]], items: Sequence[T]) -> list[R | str]:
    """What `work` makes of the items together; of each alone, with errors, if that fails."""
    try:
        return list(work(items)) if items else []
    except Exception as fault:
        log.debug("scoring failed", exc_info=True)
        if len(items) == 1:
            return [described(fault)]
    return [outcome for item in items for outcome in _each(work, [item])]
