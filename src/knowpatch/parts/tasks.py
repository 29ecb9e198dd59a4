"""The facts whose values are optimised, as rows of a batch (parts/values.py).

Axes: N tasks, B rows, M wanted places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from knowpatch.models.passes import Row

TOGETHER = 1024
"""Tokens that are replayed in one batch at most, padding included."""
PADDING = 1.25
"""Times the tokens that a batch may take up with its padding, unless it is small."""
SMALL = 128
"""Tokens up to which a batch costs the same, whatever is in it."""


@dataclass(frozen=True)
class ValueTask:
    """One fact: its target, its contexts (the bare prompt first), and where the KL is read.

    The ids of a context end before the target's last token. Facts that one value must serve are one
    task (`merged`): then each context has an answer of its own.
    """

    target: tuple[int, ...]
    contexts: tuple[Row, ...]
    kl: Row | None = None
    own: tuple[tuple[int, ...], ...] | None = None

    @property
    def answers(self) -> tuple[tuple[int, ...], ...]:
        """What should follow in each context."""
        return self.own or (self.target,) * len(self.contexts)

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.contexts if self.kl is None else (*self.contexts, self.kl)

    @property
    def reach(self) -> int:
        """Columns from the changed position to the last predicted one."""
        return max(len(row.ids) - row.position for row in self.contexts)


def merged(tasks: Sequence[ValueTask]) -> ValueTask:
    """Facts that one value must serve, as one; its bare prompt, and its KL, are the first one's."""
    if len(tasks) == 1:
        return tasks[0]
    return replace(
        tasks[0],
        contexts=tuple(row for task in tasks for row in task.contexts),
        own=tuple(answer for task in tasks for answer in task.answers),
    )


def batches(tasks: Sequence[ValueTask]) -> list[list[int]]:
    """Numbers of tasks that run together: not too many tokens, and not too much padding."""
    batches: list[list[int]] = []
    for number in sorted(range(len(tasks)), key=lambda i: tasks[i].reach):
        together = [tasks[i] for i in (*(batches[-1] if batches else ()), number)]
        padded = sum(len(task.rows) for task in together) * tasks[number].reach
        tokens = sum(len(task.rows) * task.reach for task in together)
        if batches and padded <= TOGETHER and (padded <= SMALL or padded <= PADDING * tokens):
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


@dataclass(frozen=True, eq=False)
class Places:
    """The wanted places: whose they are, which token should follow (-1: the KL is read), weights.

    Also task_B, whose each row is. Tasks are counted among those that are left.
    """

    where: list[tuple[int, int]]
    task_M: Tensor
    label_M: Tensor
    weight_M: Tensor
    task_B: Tensor

    @classmethod
    def of(cls, tasks: Sequence[ValueTask], device: torch.device) -> Places:
        where: list[tuple[int, int]] = []
        owners: list[int] = []
        labels: list[int] = []
        weights: list[float] = []
        rows: list[int] = []
        for number, task in enumerate(tasks):
            for row, answer in zip(task.contexts, task.answers, strict=True):
                first = len(row.ids) - len(answer)
                where += [(len(rows), first + i) for i in range(len(answer))]
                labels += answer
                weights += [1 / (len(answer) * len(task.contexts))] * len(answer)
                rows.append(number)
            if task.kl is not None:
                where.append((len(rows), task.kl.position))
                labels.append(-1)
                weights.append(0.0)
                rows.append(number)
            owners += [number] * (len(where) - len(owners))
        flat = (torch.tensor(x, device=device) for x in (owners, labels, weights, rows))
        return cls(where, *flat)

    def keep(self, kept_A: Tensor) -> Places:
        number = kept_A.cumsum(0) - 1
        mine_M = kept_A[self.task_M]
        return Places(
            [],
            number[self.task_M[mine_M]],
            self.label_M[mine_M],
            self.weight_M[mine_M],
            number[self.task_B[kept_A[self.task_B]]],
        )
