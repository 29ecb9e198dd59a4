"""Replay: of a pass through a model, only what a change at one place can change.

A vector added to the output of a module in block l at position p changes nothing before p, nor at
or below block l's input. So each row's tokens before p are read once (their keys and values are
kept), and so is what enters block l from p on; a replayed pass then runs blocks l and above, from p
on, and the head at the wanted places. The mathematics is that of the full pass: a probe per model
says whether it holds, and where it does not, the full pass runs.
Axes: B rows, S changed modules, T columns from the changed position on, D hidden size, M wanted
places, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from knowpatch.models.batch import Batch, Place
from knowpatch.models.hooks import (
    Hook,
    choosing,
    registered,
    seeing_nothing,
    shifting,
    tapping,
)
from knowpatch.models.known import Known, output_of
from knowpatch.models.passes import Row, Shift, Tap
from knowpatch.models.past import read_shared
from knowpatch.models.twin import twin
from knowpatch.models.view import ModelView

log = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Largest relative difference, in logits and gradients, at which a probe says that it holds."""


@dataclass(frozen=True, eq=False)
class Seen:
    """logits_MV at the wanted places, and states_BD, what enters the head at the changed positions.

    Both float32.
    """

    logits_MV: Tensor
    states_BD: Tensor


class Pass(Protocol):
    """Passes over the same rows with different vectors added."""

    def run(self, shift_BSD: Tensor) -> Seen:
        """One pass with shift_BSD[i, s] added to module s at row i's changed position."""

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all rows but these; wanted places stay in their order."""


def passes(
    view: ModelView,
    modules: Sequence[str],
    rows: Sequence[Row],
    places: Sequence[Place],
    *,
    dtype: torch.dtype | None = None,
) -> Pass:
    """Passes over `rows` that can be repeated with different changes of `modules`' outputs.

    Args:
        view: the model, with trials in force now.
        modules: paths of modules in the blocks.
        rows: ids, and the position that is changed.
        places: where logits are wanted, (row, position), at the changed position or behind it.
        dtype: of the replayed part; None for the model's own.
    """
    view.limits.check(max(len(row.ids) for row in rows), view.source)
    modules = tuple(modules)
    attention = holding(view, modules)
    fits = view.reads_in_pieces(max(len(row.ids) for row in rows), 3)
    if attention is None or not fits:
        return Whole(view, modules, rows, places)
    return Replay(view, modules, rows, places, dtype=dtype, attention=attention)


class Whole:
    """The plain way: the full pass each time."""

    def __init__(
        self,
        view: ModelView,
        modules: Sequence[str],
        rows: Sequence[Row],
        places: Sequence[Place],
    ) -> None:
        self.view, self.modules, self.rows, self.places = view, modules, list(rows), list(places)

    def run(self, shift_BSD: Tensor) -> Seen:
        where = [(i, row.position) for i, row in enumerate(self.rows)]
        head = Tap(self.view.roles.head, "input")
        run = self.view.run(
            [row.ids for row in self.rows],
            logits_at=self.places,
            taps=[head],
            shifts=_shifts(self.modules, where, shift_BSD),
            grad=True,
            prompts=[row.end for row in self.rows],
        )
        return Seen(run.logits_MV, run.at(head, where))

    def keep(self, rows: Sequence[int]) -> None:
        self.places = renumbered(self.places, rows)
        self.rows = [self.rows[row] for row in rows]


class Replay:
    """Blocks from the changed one up, from the changed position on."""

    def __init__(
        self,
        view: ModelView,
        modules: Sequence[str],
        rows: Sequence[Row],
        places: Sequence[Place],
        *,
        dtype: torch.dtype | None,
        attention: str,
    ) -> None:
        self._twin = twin(view.model, attention=attention, weight=view.stand_in(dtype))
        self._head = self._twin.get_submodule(view.roles.head)
        self._places = [(row, i - rows[row].position) for row, i in places]
        self._view = view
        before = [row.ids[: row.position] for row in rows]
        with registered([seeing_nothing(self._head), *self._beside(None)]):
            self._past = read_shared(self._twin, before, view.device)
        self._past.freeze()
        self._lasts = [self._past.columns + row.end - 1 - row.position for row in rows]
        # What stands behind the last wanted place changes nothing there.
        ends = [max((i for r, i in places if r == row), default=0) for row in range(len(rows))]
        wanted = [row.ids[row.position : end + 1] for row, end in zip(rows, ends, strict=True)]
        self._piece = Batch.of(wanted, pad=0, side="right", device=view.device)
        self._known = self._skip_below(view, min(map(view.roles.block_of, modules)))
        self._modules = modules

    def _skip_below(self, view: ModelView, block: int) -> Known | None:
        """Run once what is below `block`, and put what it gives in its place."""
        if block == 0:
            return None
        below = [self._twin.get_submodule(part.module) for part in view.roles.blocks[:block]]
        return Known(below, output_of(below[-1], self._forward, self._beside(self._lasts)))

    def _beside(self, lasts: Sequence[int] | None) -> list[Hook]:
        """What this context carries beside the model, on the twin."""
        return self._view.beside(lasts, model=self._twin).hooks()

    def _forward(self) -> Any:
        return self._twin(**self._past.inputs(self._piece), use_cache=False)

    def run(self, shift_BSD: Tensor) -> Seen:
        where = [(row, 0) for row in range(len(self._lasts))]
        shifts = _shifts(self._modules, where, shift_BSD)
        head, tapped = Tap(self._view.roles.head, "input"), dict[Tap, Tensor]()
        part = self._twin.get_submodule
        hooks = [
            *self._beside(self._lasts),
            *(shifting(part(shift.module), self._piece, shift) for shift in shifts),
            tapping(self._head, self._piece, head, tapped, None),
            choosing(self._head, self._piece, self._places),
        ]
        with registered(hooks), torch.enable_grad():
            logits: Tensor = self._forward().logits
        return Seen(logits.float(), tapped[head][self._piece.at(where)].float())

    def keep(self, rows: Sequence[int]) -> None:
        self._places = renumbered(self._places, rows)
        self._lasts = [self._lasts[row] for row in rows]
        self._past = self._past.pick(rows)
        self._piece = self._piece.pick(rows)
        if self._known is not None:
            self._known.pick(rows, self._piece.ids_BT.shape[1])


def _shifts(modules: Sequence[str], places: Sequence[Place], shift_BSD: Tensor) -> list[Shift]:
    return [Shift(module, places, shift_BSD[:, s]) for s, module in enumerate(modules)]


def renumbered(places: Sequence[Place], rows: Sequence[int]) -> list[Place]:
    """The places in `rows`, as if these were all rows there are."""
    number = {row: i for i, row in enumerate(rows)}
    return [(number[row], i) for row, i in places if row in number]


def holding(view: ModelView, modules: tuple[str, ...]) -> str | None:
    """The attention with which a replay of this model gives what the full pass gives, if any.

    Plain attention first: for so few positions it is fast forward and backward in every precision.
    """
    if modules not in view.probed:
        own = view.model.config._attn_implementation
        faults = []
        for attention in dict.fromkeys(("eager", own)):
            fault = _fault(view, modules, attention)
            if fault is None:
                view.probed[modules] = attention
                break
            faults.append(f"{attention}: {fault}")
        else:
            view.probed[modules] = None
            log.warning(
                "%s is run whole where a part would do, since replaying gives other numbers (%s)",
                view.source,
                "; ".join(faults),
            )
    return view.probed[modules]


def _fault(view: ModelView, modules: tuple[str, ...], attention: str) -> str | None:
    """What is wrong with a replay on a few rows; None if nothing is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = torch.randint(min(view.vocabulary, 1000), (3, 9)).tolist()
        shift = torch.randn(3, len(modules), view.roles.hidden_size)
    rows = [Row(tuple(ids[0]), 4), Row((*ids[0][:3], *ids[1][:3]), 5), Row(tuple(ids[2]), 1)]
    places = [(0, 4), (0, 8), (1, 5), (2, 3), (2, 7)]
    whole = Whole(view, modules, rows, places)
    try:
        part = Replay(view, modules, rows, places, dtype=None, attention=attention)
        found = [_probe(way, shift.to(view.device)) for way in (whole, part)]
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    for name, plain, fast in zip(("logits", "gradients"), *found, strict=True):
        apart = float((plain - fast).norm() / plain.norm().clamp(min=1e-30))
        if not apart <= view.limits.slack(TOLERANCE):
            return f"{name} differ by {apart:.1e}"
    return None


def _probe(way: Pass, shift_BSD: Tensor) -> tuple[Tensor, Tensor]:
    leaf = shift_BSD.clone()
    leaf.requires_grad_()
    logits = way.run(leaf).logits_MV
    (grad,) = torch.autograd.grad(logits.log_softmax(-1)[:, 0].sum(), leaf)
    return logits.detach(), grad
