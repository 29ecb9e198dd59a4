"""The hooks of a pass, each as something that registers itself when called.

Axes: B rows, T columns, D width of a module's output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from knowpatch.models.batch import Batch, Place
from knowpatch.models.passes import Act, Shift, Tap

Hook = Callable[[], Any]
"""Registers a hook and returns its handle."""


class Reached(Exception):
    """Ends a pass once everything asked for has been seen."""


@contextlib.contextmanager
def registered(hooks: Iterable[Hook]) -> Iterator[None]:
    """`hooks` within the block; whatever ends it, none is left behind."""
    handles: list[Any] = []
    try:
        handles.extend(hook() for hook in hooks)
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def as_found(model: nn.Module, hooks: Iterable[Hook]) -> Iterator[None]:
    """Evaluation mode and hooks for the block; everything as it was after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with registered(hooks):
            yield
    finally:
        for module in training:
            module.training = True


def shifting(module: nn.Module, batch: Batch, shift: Shift) -> Hook:
    """Add a shift's rows to the module's output at its places."""
    rows, columns = batch.at(shift.places)

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        moved = _by_row(first, batch).index_put(
            (rows, columns), shift.delta_MD.to(first.dtype), accumulate=True
        )
        moved = moved.reshape(first.shape)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    return lambda: module.register_forward_hook(add)


def acting(module: nn.Module, batch: Batch, act: Act, rows: Sequence[int]) -> Hook:
    """Let an act say what the module puts out."""

    def put(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        acted = act.function(_by_row(args[0], batch), _by_row(first, batch), rows)
        acted = acted.to(first.dtype).reshape(first.shape)
        return (acted, *output[1:]) if isinstance(output, tuple) else acted

    return lambda: module.register_forward_hook(put)


def tapping(
    module: nn.Module, batch: Batch, tap: Tap, tapped: dict[Tap, Tensor], last: int | None
) -> Hook:
    """Keep what a tap sees in `tapped`; end the pass when that holds `last` taps."""

    def keep(value: Any) -> None:
        tapped[tap] = _by_row(value[0] if isinstance(value, tuple) else value, batch)
        if len(tapped) == last:
            raise Reached

    if tap.side == "input":
        return lambda: module.register_forward_pre_hook(lambda m, args: keep(args))
    return lambda: module.register_forward_hook(lambda m, args, output: keep(output))


def choosing(head: nn.Module, batch: Batch, places: Sequence[Place]) -> Hook:
    """Let the head see only the asked places: it is a third of a small model's work."""
    rows, columns = batch.at(places)
    return lambda: head.register_forward_pre_hook(lambda m, args: (args[0][rows, columns],))


def seeing_nothing(head: nn.Module) -> Hook:
    """Let the head see no place at all."""
    return lambda: head.register_forward_pre_hook(lambda m, args: (args[0][:0, 0],))


def _by_row(tensor: Tensor, batch: Batch) -> Tensor:
    """(B, T, .), also where a model runs its MLP on flattened rows (OPT)."""
    return tensor.reshape(*batch.ids_BT.shape, -1) if tensor.ndim == 2 else tensor
