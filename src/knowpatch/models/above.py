"""Above: passes over the same rows with other weights, from the lowest changed block up.

What enters a block does not depend on the weights from there on, so it is computed once for each
row; every further pass runs that block and those above it, and the head at wanted places. Training
one matrix is dozens of such passes. A probe says whether it gives what the full pass gives; where
it does not, or where the rows are too many to keep, all blocks run.
Axes: B rows of a pass, T columns, D hidden size, M wanted places, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from knowpatch.models.batch import Batch, Place, gathered
from knowpatch.models.hooks import (
    Hook,
    Reached,
    acting,
    choosing,
    registered,
    shifting,
    tapping,
)
from knowpatch.models.known import Known, output_of
from knowpatch.models.passes import Act, Run, Shift, Tap
from knowpatch.models.sites import sources
from knowpatch.models.twin import twin
from knowpatch.models.view import ModelView

log = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Largest relative difference of logits at which a probe says that it holds."""
TOGETHER = 2048
"""Tokens that are read in one batch, padding included."""
HELD = 2 << 30
"""Bytes of states that are kept at most."""


class Above:
    """Passes over some of `rows` that run block `block` and what is above it.

    Args:
        view: the model, with trials in force now.
        block: the lowest block whose weights, or whose input, will change.
        rows: token ids.
        prompts: how many of each row's ids are its prompt; by default all.
        dtype: of the passes; None for the model's own.
    """

    def __init__(
        self,
        view: ModelView,
        block: int,
        rows: Sequence[Sequence[int]],
        *,
        prompts: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        probe: bool = True,
    ) -> None:
        view.limits.check(max(len(row) for row in rows), view.source)
        self._view, self._rows = view, [tuple(row) for row in rows]
        self._ends = [len(row) for row in rows] if prompts is None else list(prompts)
        self._twin = twin(view.model, attention=None, weight=view.stand_in(dtype))
        self._head = self._twin.get_submodule(view.roles.head)
        self._states: list[Tensor] | None = None
        bytes_ = 4 * view.roles.hidden_size * sum(map(len, self._rows))
        deciding = [view.roles.block_of(path) for path in sources(view.carried)]
        fits = bytes_ <= HELD and block <= min(deciding, default=block)
        if block > 0 and fits and (not probe or _holds(view, block)):
            below = [self._twin.get_submodule(part.module) for part in view.roles.blocks[:block]]
            self._states, self._known = self._read(below)

    @property
    def skips(self) -> bool:
        """Whether what is below the block is known, and does not run."""
        return self._states is not None

    def _read(self, below: Sequence[torch.nn.Module]) -> tuple[list[Tensor], Known]:
        """What enters the block, row by row (T, D); and what stands for the blocks below."""
        found: dict[int, Tensor] = {}
        output = None
        for numbers in gathered([len(row) for row in self._rows], TOGETHER):
            batch = self._batch(numbers)
            forward = partial(self._twin, **batch.inputs(), use_cache=False)
            output = output_of(below[-1], forward, self._beside(numbers))
            states_BTD = output[0] if isinstance(output, tuple) else output
            for number, states_TD in zip(numbers, states_BTD, strict=True):
                found[number] = states_TD[: len(self._rows[number])].clone()
        return [found[number] for number in range(len(self._rows))], Known(below, output)

    def _batch(self, numbers: Sequence[int]) -> Batch:
        rows = [self._rows[number] for number in numbers]
        return Batch.of(rows, pad=0, side="right", device=self._view.device)

    def _beside(self, numbers: Sequence[int]) -> list[Hook]:
        lasts = [self._ends[number] - 1 for number in numbers]
        return self._view.beside(lasts, model=self._twin).hooks()

    def run(
        self,
        numbers: Sequence[int],
        *,
        weights: Mapping[str, Tensor] | None = None,
        logits_at: Sequence[Place] = (),
        taps: Sequence[Tap] = (),
        shifts: Sequence[Shift] = (),
        acts: Sequence[Act] = (),
    ) -> Run:
        """One pass over the rows of these numbers, with a graph for what requires grad.

        Args:
            weights: whole parameters that stand for those of the model, by name.
            logits_at: places, by (index in `numbers`, index in the row), whose logits are wanted;
                with none the pass ends as soon as every tap has been seen.
            taps, shifts: as `ModelView.run` takes them. A shift of the block below the lowest one
                moves what enters that.
            acts: what modules in the blocks that run put out instead.
        """
        batch = self._batch(numbers)
        tapped: dict[Tap, Tensor] = {}
        part = self._twin.get_submodule
        hooks = [shifting(part(shift.module), batch, shift) for shift in shifts]
        hooks += [acting(part(act.module), batch, act, numbers) for act in acts]
        last = None if logits_at else len(taps)
        hooks += [tapping(part(tap.module), batch, tap, tapped, last) for tap in taps]
        hooks.append(choosing(self._head, batch, logits_at))
        if self._states is not None:
            states = [self._states[number] for number in numbers]
            self._known.give(pad_sequence(states, batch_first=True))
        logits = torch.empty(0)
        hooks = [*self._beside(numbers), *hooks]
        weighed = self._weighed(weights or {})
        with registered(hooks), weighed, torch.enable_grad(), contextlib.suppress(Reached):
            logits = self._twin(**batch.inputs(), use_cache=False).logits.float()
        return Run(batch, logits, tapped)

    @contextlib.contextmanager
    def _weighed(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Other parameters in the twin, within the block."""
        owners = {}
        for name, value in weights.items():
            path, _, short = name.rpartition(".")
            parameters = self._twin.get_submodule(path)._parameters
            owners[name] = parameters, short, parameters[short]
            parameters[short] = value.to(parameters[short].dtype)
        try:
            yield
        finally:
            for parameters, short, before in owners.values():
                parameters[short] = before


def _holds(view: ModelView, block: int) -> bool:
    """Whether running from a block up gives what running all of the model gives; tried once."""
    known = ("above", block)
    if known not in view.probed:
        view.probed[known] = fault = _fault(view, block)
        if fault is not None:
            log.warning(
                "%s is run whole where the blocks above would do, since these give other numbers "
                "(%s)",
                view.source,
                fault,
            )
    return view.probed[known] is None


def _fault(view: ModelView, block: int) -> str | None:
    """What is wrong with a pass that begins at a block; None if nothing is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = torch.randint(min(view.vocabulary, 1000), (2, 9)).tolist()
    rows, places = [ids[0], ids[1][:6]], [(0, 8), (0, 2), (1, 5)]
    try:
        part = Above(view, block, rows, probe=False).run([0, 1], logits_at=places).logits_MV
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    whole = view.run(rows, logits_at=places).logits_MV
    apart = float((part - whole).norm() / whole.norm().clamp(min=1e-30))
    return None if apart <= view.limits.slack(TOLERANCE) else f"logits differ by {apart:.1e}"
