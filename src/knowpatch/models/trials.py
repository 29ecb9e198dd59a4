"""Weight changes that are tried out: which ones are in force, in this thread or task alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

from knowpatch.deltas import WeightDelta

_TRIALS: ContextVar[tuple[tuple[object, Sequence[WeightDelta]], ...]] = ContextVar(
    "trials", default=()
)


def of(owner: object) -> list[WeightDelta]:
    """What is tried on `owner` in this context, oldest first."""
    return [delta for mine, deltas in _TRIALS.get() if mine is owner for delta in deltas]


@contextlib.contextmanager
def trying(owner: object, deltas: Sequence[WeightDelta]) -> Iterator[None]:
    """`deltas` are tried on `owner` within the block."""
    token = _TRIALS.set((*_TRIALS.get(), (owner, deltas)))
    try:
        yield
    finally:
        _TRIALS.reset(token)
