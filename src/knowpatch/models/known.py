"""Blocks of a twin whose output is known, so that they need not run. Axes: B rows, T columns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from knowpatch.models.hooks import Hook, Reached, registered


class Known:
    """Stands for the blocks of a twin below one: called in their place, it gives what is known.

    Only the blocks' own forward is replaced: paths below them still lead somewhere, and hooks on
    what does not run are never called.
    """

    def __init__(self, blocks: Iterable[nn.Module], output: Any) -> None:
        self._output = output
        for block in blocks:
            own = vars(block)
            own["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._output

    @property
    def states_BTD(self) -> Tensor:
        """The hidden states among what is known."""
        states: Tensor = self._output[0] if isinstance(self._output, tuple) else self._output
        return states

    def give(self, states_BTD: Tensor) -> None:
        """From now on these hidden states."""
        rest = self._output[1:] if isinstance(self._output, tuple) else None
        self._output = states_BTD if rest is None else (states_BTD, *rest)

    def pick(self, rows: Sequence[int], columns: int) -> None:
        """From now on the states of these rows, up to a column."""
        self.give(self.states_BTD[list(rows), :columns])


def output_of(block: nn.Module, forward: Callable[[], Any], hooks: Sequence[Hook] = ()) -> Any:
    """What `block` puts out in a pass that ends there, without a graph."""
    kept: list[Any] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept.append(output)
        raise Reached

    mine = [*hooks, lambda: block.register_forward_hook(keep)]
    with registered(mine), torch.no_grad(), contextlib.suppress(Reached):
        forward()
    return kept[0]
