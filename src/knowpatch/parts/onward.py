"""Long answers in windows, and passes over one window after the other.

A pass reads one window: what comes before it has been read, with the vectors that act there, and is
kept as keys and values; so are the states below the changed module. Where a model cannot be read in
pieces, passes run whole rows from the module up. Either way the numbers are those of a full pass.
Axes: N answers, A answers that are left in a window, M predicted tokens, D width of the module's
output, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from knowpatch.models.above import Above
from knowpatch.models.batch import Batch
from knowpatch.models.hooks import Hook, choosing, registered, seeing_nothing, shifting
from knowpatch.models.known import Known, output_of
from knowpatch.models.passes import Ids, Row, Shift
from knowpatch.models.past import Past
from knowpatch.models.replay import holding, renumbered
from knowpatch.models.twin import twin
from knowpatch.models.view import ModelView
from knowpatch.parts.tasks import ValueTask


@dataclass(frozen=True)
class LongAnswer:
    """An answer behind its prompt, in windows of `size` tokens (the last may be shorter).

    With None for the size it is one window.
    """

    prompt: Ids
    answer: Ids
    size: int | None = None

    @property
    def starts(self) -> range:
        """Where each window begins in the answer."""
        return range(0, len(self.answer), self.size or len(self.answer))

    @property
    def windows(self) -> tuple[Ids, ...]:
        """The answer's tokens: together all of them, each once."""
        size = self.starts.step
        return tuple(self.answer[start : start + size] for start in self.starts)

    @property
    def positions(self) -> tuple[int, ...]:
        """The token before each window's first, where its vector is added."""
        return tuple(len(self.prompt) - 1 + start for start in self.starts)

    @property
    def ids(self) -> Ids:
        """All that is read: the answer's last token predicts nothing."""
        return (*self.prompt, *self.answer[:-1])

    def until(self, window: int) -> Ids:
        """What is read to predict a window's tokens."""
        return self.ids[: self.positions[window] + len(self.windows[window])]

    @property
    def tasks(self) -> list[ValueTask]:
        """Each window as a fact to be written at its place."""
        end = len(self.prompt)
        return [
            ValueTask(window, (Row(self.ids, position, end),))
            for window, position in zip(self.windows, self.positions, strict=True)
        ]


def passes_over(
    view: ModelView, module: str, answers: Sequence[LongAnswer], dtype: torch.dtype | None
) -> Passes:
    """Passes over the windows of `answers` with vectors added to the output of `module`.

    Args:
        dtype: of the passes; None for the model's own.
    """
    attention = holding(view, (module,))
    fits = view.reads_in_pieces(max(len(answer.ids) for answer in answers), 3)
    if fits and attention is not None:
        return Onward(view, module, answers, dtype, attention)
    return Whole(view, module, answers, dtype)


class Passes(Protocol):
    """Passes over one window of several answers that differ in that window's vectors."""

    def begin(self, window: int, mine: Sequence[int]) -> None:
        """From now on this window of the answers `mine`."""

    def logits(self, delta_AD: Tensor) -> Tensor:
        """Where the window's tokens are predicted, answer by answer (M, V)."""

    def keep(self, rows: Sequence[int]) -> None:
        """Only these of the answers go on in this window."""

    def end(self, delta_ND: Tensor) -> None:
        """The window's vectors, of all answers that it began with."""


class Whole:
    """Whole rows, from the module up, with all vectors so far."""

    def __init__(
        self,
        view: ModelView,
        module: str,
        answers: Sequence[LongAnswer],
        dtype: torch.dtype | None,
    ) -> None:
        self._view, self._module, self._answers, self._dtype = view, module, answers, dtype
        self._lowest = lowest(view, module)
        self._before: dict[int, list[Tensor]] = {i: [] for i in range(len(answers))}

    def begin(self, window: int, mine: Sequence[int]) -> None:
        self._window, self._mine = window, list(mine)
        self._alive = list(range(len(mine)))
        self._above = Above(
            self._view,
            self._lowest,
            [self._answers[i].until(window) for i in mine],
            prompts=[len(self._answers[i].prompt) for i in mine],
            dtype=self._dtype,
        )

    def logits(self, delta_AD: Tensor) -> Tensor:
        places: list[tuple[int, int]] = []
        shifted: list[tuple[int, int]] = []
        vectors: list[Tensor] = []
        for row, (number, delta_D) in enumerate(zip(self._alive, delta_AD, strict=True)):
            answer = self._answers[self._mine[number]]
            size, at = len(answer.windows[self._window]), answer.positions[self._window]
            places += [(row, at + i) for i in range(size)]
            shifted += [(row, at) for at in answer.positions[: self._window + 1]]
            vectors += [*self._before[self._mine[number]], delta_D]
        shift = Shift(self._module, shifted, torch.stack(vectors))
        return self._above.run(self._alive, logits_at=places, shifts=[shift]).logits_MV

    def keep(self, rows: Sequence[int]) -> None:
        self._alive = [self._alive[row] for row in rows]

    def end(self, delta_ND: Tensor) -> None:
        for i, delta_D in zip(self._mine, delta_ND, strict=True):
            self._before[i].append(delta_D)


class Onward:
    """One window at a time, on top of what has been read with the vectors so far."""

    def __init__(
        self,
        view: ModelView,
        module: str,
        answers: Sequence[LongAnswer],
        dtype: torch.dtype | None,
        attention: str,
    ) -> None:
        self._view, self._module, self._answers = view, module, answers
        self._attention, self._stands = attention, view.stand_in(dtype)
        self._weights: dict[int, Tensor] = {}
        self._rows = list(range(len(answers)))
        self._past = Past.nothing(len(answers), view.device)
        self._read([answer.prompt[:-1] for answer in answers], None, [])

    def _twin(self) -> Any:
        return twin(self._view.model, attention=self._attention, weight=self._weight)

    def _weight(self, parameter: torch.nn.Parameter) -> Tensor:
        if id(parameter) not in self._weights:
            self._weights[id(parameter)] = self._stands(parameter)
        return self._weights[id(parameter)]

    def _read(self, rows: list[Ids], lasts: list[int] | None, deltas: Sequence[Tensor]) -> None:
        """Read on, with vectors at the rows' first tokens."""
        model = self._twin()
        hooks = [seeing_nothing(model.get_submodule(self._view.roles.head))]
        hooks += self._view.beside(lasts, model=model).hooks()
        hooks += self._moving(model, self._piece(rows), torch.stack(list(deltas))) if deltas else []
        with registered(hooks):
            self._past = self._past.read(model, rows)

    def _piece(self, rows: Sequence[Ids]) -> Batch:
        return Batch.of(rows, pad=0, side="right", device=self._view.device)

    def _moving(self, model: Any, piece: Batch, delta_AD: Tensor) -> list[Hook]:
        shift = Shift(self._module, [(row, 0) for row in range(len(delta_AD))], delta_AD)
        return [shifting(model.get_submodule(self._module), piece, shift)]

    def begin(self, window: int, mine: Sequence[int]) -> None:
        self._past = self._past.pick([self._rows.index(i) for i in mine])
        self._rows = list(mine)
        answers = [self._answers[i] for i in mine]
        self._pieces = [a.until(window)[a.positions[window] :] for a in answers]
        self._lasts = [
            self._past.columns + len(a.prompt) - 1 - a.positions[window] for a in answers
        ]
        self._before = Past(copy.deepcopy(self._past.cache), self._past.mask_BP)
        self._before.freeze()
        self._batch, self._alive_lasts = self._piece(self._pieces), self._lasts
        self._places = [
            (row, i) for row, piece in enumerate(self._pieces) for i in range(len(piece))
        ]
        self._model, below = (
            self._twin(),
            self._view.roles.blocks[: lowest(self._view, self._module)],
        )
        self._known: Known | None = None
        if below:
            blocks = [self._model.get_submodule(block.module) for block in below]
            output = output_of(blocks[-1], self._forward, self._beside())
            self._known = Known(blocks, output)

    def _beside(self) -> list[Hook]:
        return self._view.beside(self._alive_lasts, model=self._model).hooks()

    def _forward(self) -> Any:
        return self._model(**self._before.inputs(self._batch), use_cache=False)

    def logits(self, delta_AD: Tensor) -> Tensor:
        head = self._model.get_submodule(self._view.roles.head)
        hooks = [*self._beside(), *self._moving(self._model, self._batch, delta_AD)]
        with registered([*hooks, choosing(head, self._batch, self._places)]), torch.enable_grad():
            logits: Tensor = self._forward().logits
        return logits.float()

    def keep(self, rows: Sequence[int]) -> None:
        self._places = renumbered(self._places, rows)
        self._alive_lasts = [self._alive_lasts[row] for row in rows]
        self._before, self._batch = self._before.pick(rows), self._batch.pick(rows)
        if self._known is not None:
            self._known.pick(rows, self._batch.ids_BT.shape[1])

    def end(self, delta_ND: Tensor) -> None:
        self._read(self._pieces, self._lasts, list(delta_ND))


def lowest(view: ModelView, module: str) -> int:
    """The lowest block that a change of the module's output changes inside."""
    block = view.roles.block_of(module)
    # What a whole block puts out is what enters the next one.
    return block + (module == view.roles.blocks[block].module)
