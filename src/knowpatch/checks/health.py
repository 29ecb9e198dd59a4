"""Health: what a history of edits has done to a model, state by state.

After an edit was recorded: perplexity of the ordinary text, control drift (the share of the control
prompts whose answer is not the unedited model's any more), how far the weights are from those that
came, and how much longer they are. The last two are over all matrices that any edit of the history
touches, so that states can be compared. What was measured is kept on disk by model and live edits:
a run that was stopped goes on, and later ones ask only about what is new.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from knowpatch.ask import Ask
from knowpatch.edited import EditedModel
from knowpatch.effects import ANSWER_TOKENS
from knowpatch.errors import Unscored
from knowpatch.files import kept_in, source_digest, write_atomically
from knowpatch.future import Future
from knowpatch.ledger.standing import bring
from knowpatch.metrics.asker import Asker, Nobody
from knowpatch.metrics.kinds.perplexity import of_corpus, of_ordinary
from knowpatch.metrics.metric import Result, total_columns
from knowpatch.models.passes import Ids, Scored
from knowpatch.patch import Patch
from knowpatch.probes import controls
from knowpatch.progress import Progress, silent


@dataclass(frozen=True)
class Vitals:
    """What was measured of one state.

    Attributes:
        perplexity: of the ordinary text; None where no answer can be forced.
        moved: control prompts whose answer changed, of `asked`.
        change: norm of the change of all touched matrices, over that of the matrices as they came.
        growth: their norm over that as they came, less one.
    """

    perplexity: float | None
    moved: int
    asked: int
    change: float
    growth: float

    @property
    def drift(self) -> float:
        """Share of the control prompts whose answer changed."""
        return self.moved / self.asked


class Examination:
    """Measures states of one model against what it was without any edit.

    Args:
        model: with nothing live on it; given back so by `closing`.
        weights: names of the parameters that any of the edits changes.
        progress: told how far the asking is.
    """

    def __init__(
        self, model: EditedModel, weights: Sequence[str], *, progress: Progress = silent
    ) -> None:
        assert not model.live
        self.model, self.weights, self.progress = model, weights, progress

    def vitals(self, patches: Sequence[Patch]) -> Vitals:
        """Of the state in which these patches are live, measured and kept."""
        bring(self.model, patches)
        found = self._measured()
        path = self._kept([patch.id for patch in patches])
        write_atomically(path, json.dumps(asdict(found)).encode())
        return found

    def known(self, ids: Sequence[str]) -> Vitals | None:
        """Of the state in which the patches of these ids are live, if it was measured before."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Vitals(**json.loads(self._kept(ids).read_text()))
        return None

    def close(self) -> None:
        """Give the model back as it came."""
        bring(self.model, [])

    def _kept(self, ids: Sequence[str]) -> Path:
        view = self.model.view
        content = [source_digest(), view.fingerprint, view.form, sorted(self.weights), list(ids)]
        return kept_in("health", json.dumps(content), ".json")

    @cached_property
    def _before(self) -> tuple[Asker, dict[str, Ids]]:
        """The unedited model's answers: to the ordinary text, and to the control prompts."""
        live = self.model.live
        bring(self.model, [])
        ask = Ask(self.model, progress=self.progress)
        asker = Asker(ask)
        of_ordinary(asker, Nobody(ask))
        said = {p: ask.generate(p, max_new_tokens=ANSWER_TOKENS) for p in controls()}
        ask.run()
        bring(self.model, live)
        return asker.answered(), {prompt: one.result().ids for prompt, one in said.items()}

    def _measured(self) -> Vitals:
        before, answers = self._before
        ask = Ask(self.model, progress=self.progress)
        text = of_ordinary(before, Asker(ask))
        forced = {prompt: ask.score(prompt, ids) for prompt, ids in answers.items()}
        ask.run()
        moved = sum(self._moved(one, prompt, answers[prompt]) for prompt, one in forced.items())
        return Vitals(_perplexity(text), moved, len(answers), *self._norms())

    def _moved(self, forced: Future[Scored], prompt: str, answer: Ids) -> bool:
        """Whether the answer is another one: it is the same if each of its tokens still leads."""
        with contextlib.suppress(Unscored):
            return not all(forced.result().correct)
        ask = Ask(self.model)  # a procedure answers
        said = ask.generate(prompt, max_new_tokens=ANSWER_TOKENS).result()
        return said.text != self.model.view.decode(answer)

    def _norms(self) -> tuple[float, float]:
        """Norm of the change, and growth of the norm, as shares."""
        change = now = base = 0.0
        for new, old in self._touched():
            change += float((new - old).norm()) ** 2
            now, base = now + float(new.norm()) ** 2, base + float(old.norm()) ** 2
        return ((change / base) ** 0.5, (now / base) ** 0.5 - 1) if base else (0.0, 0.0)

    def _touched(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each touched matrix as it is and as it came, float64, one at a time."""
        view = self.model.view
        for name in self.weights:
            stored = view.values(name)
            yield stored.double(), view.originals.get(name, stored).double()


def _perplexity(text: Result) -> float | None:
    with contextlib.suppress(Unscored):
        return of_corpus(total_columns(text().after))
    return None


def chosen(count: int, most: int) -> list[int]:
    """Up to `most` of `count` things, evenly spaced, the last (and the first) among them."""
    if count <= most:
        return list(range(count))
    return [count - 1 - round(i * (count - 1) / max(most - 1, 1)) for i in range(most)][::-1]
