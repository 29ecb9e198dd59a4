"""Optimise a value: what a module should have put out at one position for a target to follow.

Shared by the locate-then-edit family (ROME, arXiv 2202.05262, equation 4) and by codebooks. A
vector delta is added to the module's output at one position in every context, and is trained by
Adam on

    NLL(target) + kl_factor * KL(new || old at "{subject} is a") + decay * |delta| / |v0|^2

within the ball |delta| <= clamp * |v0|. The model itself is never trained. Several tasks are one
batch: their deltas are independent, their losses are summed, each stops by itself and leaves the
batch. Passes are replayed (models/replay.py).
Axes: N tasks, D width of the module's output, B rows, M wanted places, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowpatch.errors import EditError
from knowpatch.models.passes import Row, Tap
from knowpatch.models.replay import passes
from knowpatch.models.view import ModelView
from knowpatch.progress import Progress, silent

TOGETHER = 1024
"""Tokens that are replayed in one batch at most, padding included."""
PADDING = 1.25
"""Times the tokens that a batch may take up with its padding, unless it is small."""
SMALL = 128
"""Tokens up to which a batch costs the same, whatever is in it."""


@dataclass(frozen=True)
class ValueTask:
    """One fact: its target, its contexts (the bare prompt first), and where the KL is read.

    The ids of a context end before the target's last token.
    """

    target: tuple[int, ...]
    contexts: tuple[Row, ...]
    kl: Row | None = None

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.contexts if self.kl is None else (*self.contexts, self.kl)

    @property
    def reach(self) -> int:
        """Columns from the changed position to the last predicted one."""
        return max(len(row.ids) - row.position for row in self.contexts)


@dataclass(frozen=True)
class ValueSettings:
    """How the value is optimised.

    Attributes:
        steps: passes at most (one fewer updates).
        learning_rate: of Adam; None for r / (4 sqrt D), with which a length of r is reached in
            about four steps whatever the model's scale. r is the ball's radius, or |v0| / 2.
        clamp: radius of the ball, in |v0|; None for no ball.
        weight_decay, kl_factor: weights of the two terms.
        enough: a task is done when its NLL is below this. (The published code tests the whole
            loss, which the KL term of a small model may never let fall so far.)
        dtype: of the replayed passes; None for the model's own. Values stay in float32.
    """

    steps: int
    learning_rate: float | None
    clamp: float | None
    weight_decay: float
    kl_factor: float
    enough: float
    dtype: torch.dtype | None = None


@dataclass(frozen=True, eq=False)
class Value:
    """clean_D: the module's output on the bare prompt; delta_D: what to add; and how it went."""

    clean_D: Tensor
    delta_D: Tensor
    nll: float
    kl: float
    steps: int


def optimise(
    view: ModelView,
    module: str,
    tasks: Sequence[ValueTask],
    settings: ValueSettings,
    progress: Progress = silent,
) -> list[Value]:
    """The value of `module`'s output for each task.

    Raises:
        EditError: a loss that is not finite.
    """
    values: dict[int, Value] = {}
    for numbers in _batches(tasks):
        descent = _Descent(view, module, [tasks[i] for i in numbers], settings)
        for finished in descent.steps():
            progress("optimising values", len(values) + finished, len(tasks))
        values.update(zip(numbers, descent.values(), strict=True))
    return [values[i] for i in range(len(tasks))]


def _batches(tasks: Sequence[ValueTask]) -> list[list[int]]:
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


class _Descent:
    """Adam on the deltas of a few tasks; what is done leaves."""

    def __init__(
        self, view: ModelView, module: str, tasks: Sequence[ValueTask], settings: ValueSettings
    ) -> None:
        self.settings = settings
        self.places = _Places.of(tasks, view.device)
        self.passes = passes(
            view,
            module,
            [row for task in tasks for row in task.rows],
            self.places.where,
            dtype=settings.dtype,
        )
        self.clean_ND = _clean_outputs(view, module, tasks)
        norm_N = self.clean_ND.norm(dim=1)
        clamp = settings.clamp
        self.radius_N = norm_N * (torch.inf if clamp is None else clamp)
        self.rate_N = norm_N * (clamp or 0.5) / (4 * self.clean_ND.shape[1] ** 0.5)
        if settings.learning_rate is not None:
            self.rate_N = torch.full_like(norm_N, settings.learning_rate)
        self.decay_N = settings.weight_decay / norm_N**2
        self.delta_ND = torch.zeros_like(self.clean_ND)
        self.adam = _Adam(self.delta_ND)
        self.alive = torch.arange(len(tasks), device=view.device)
        self.old_NV: Tensor | None = None
        self.found: list[Value | None] = [None] * len(tasks)

    def steps(self) -> Iterator[int]:
        """Step until every task is done; after each step, how many are."""
        for step in range(self.settings.steps):
            self._step(step)
            yield len(self.found) - len(self.alive)
            if not len(self.alive):
                break

    def values(self) -> list[Value]:
        return [value for value in self.found if value is not None]

    def _step(self, step: int) -> None:
        alive = self.alive
        delta_AD = self.delta_ND[alive].clone()
        delta_AD.requires_grad_()
        nll_A, kl_A = self._losses(delta_AD)
        decay_A = self.decay_N[alive] * delta_AD.norm(dim=1)
        loss_A = nll_A + self.settings.kl_factor * kl_A + decay_A
        if not bool(torch.isfinite(loss_A).all()):
            raise EditError(
                f"the loss is not finite at step {step} of {self.settings.steps}: use a smaller "
                "learning_rate or clamp, or load the model in float32"
            )
        last = step == self.settings.steps - 1
        done_A = (nll_A.detach() < self.settings.enough) | last
        for i in done_A.nonzero()[:, 0].tolist():
            task, nll, kl = int(alive[i]), float(nll_A[i].detach()), float(kl_A[i].detach())
            self.found[task] = Value(self.clean_ND[task], self.delta_ND[task], nll, kl, step)
        if bool(done_A.all()):
            self.alive = alive[:0]
            return
        (grad_AD,) = torch.autograd.grad(loss_A.sum(), delta_AD)
        self._move(alive[~done_A], grad_AD[~done_A])
        if bool(done_A.any()):
            self._keep(~done_A)

    def _move(self, tasks: Tensor, grad_AD: Tensor) -> None:
        """One step of Adam, and back into the ball."""
        direction_AD = self.adam.direction(tasks, grad_AD)
        moved_AD = self.delta_ND[tasks] - self.rate_N[tasks, None] * direction_AD
        shrink_A = (self.radius_N[tasks] / moved_AD.norm(dim=1).clamp(min=1e-12)).clamp(max=1)
        self.delta_ND[tasks] = moved_AD * shrink_A[:, None]

    def _losses(self, delta_AD: Tensor) -> tuple[Tensor, Tensor]:
        """NLL and KL of each task that is left."""
        places = self.places
        logprobs_MV = self.passes.logits(delta_AD[places.task_B]).log_softmax(-1)
        labelled = places.label_M >= 0
        picked = logprobs_MV[labelled].gather(1, places.label_M[labelled, None])[:, 0]
        none = torch.zeros(len(self.alive), device=delta_AD.device)
        owner, weight = places.task_M[labelled], places.weight_M[labelled]
        nll_A = none.index_add(0, owner, -picked * weight)
        new_KV = logprobs_MV[~labelled]
        if self.old_NV is None:
            self.old_NV = new_KV.detach()
        kl_K = (new_KV.exp() * (new_KV - self.old_NV)).sum(-1)
        return nll_A, none.index_add(0, places.task_M[~labelled], kl_K)

    def _keep(self, kept_A: Tensor) -> None:
        """Only these of the tasks that are left go on."""
        if self.old_NV is not None:
            owner = self.places.task_M[self.places.label_M < 0]
            self.old_NV = self.old_NV[kept_A[owner]]
        self.passes.keep(kept_A[self.places.task_B].nonzero()[:, 0].tolist())
        self.places = self.places.keep(kept_A)
        self.alive = self.alive[kept_A]


@dataclass(frozen=True, eq=False)
class _Places:
    """The wanted places: whose they are, which token should follow (-1: the KL is read), weights.

    Also task_B, whose each row is. Tasks are counted among those that are left.
    """

    where: list[tuple[int, int]]
    task_M: Tensor
    label_M: Tensor
    weight_M: Tensor
    task_B: Tensor

    @classmethod
    def of(cls, tasks: Sequence[ValueTask], device: torch.device) -> _Places:
        where: list[tuple[int, int]] = []
        owners: list[int] = []
        labels: list[int] = []
        weights: list[float] = []
        rows: list[int] = []
        for number, task in enumerate(tasks):
            share = 1 / (len(task.target) * len(task.contexts))
            for row in task.contexts:
                first = len(row.ids) - len(task.target)
                where += [(len(rows), first + i) for i in range(len(task.target))]
                labels += task.target
                weights += [share] * len(task.target)
                rows.append(number)
            if task.kl is not None:
                where.append((len(rows), task.kl.position))
                labels.append(-1)
                weights.append(0.0)
                rows.append(number)
            owners += [number] * (len(where) - len(owners))
        flat = (torch.tensor(x, device=device) for x in (owners, labels, weights, rows))
        return cls(where, *flat)

    def keep(self, kept_A: Tensor) -> _Places:
        number = kept_A.cumsum(0) - 1
        mine_M = kept_A[self.task_M]
        return _Places(
            [],
            number[self.task_M[mine_M]],
            self.label_M[mine_M],
            self.weight_M[mine_M],
            number[self.task_B[kept_A[self.task_B]]],
        )


class _Adam:
    """Adam's direction, row by row, with its default betas and without a step of its own."""

    def __init__(self, like_ND: Tensor) -> None:
        self.first_ND, self.second_ND = torch.zeros_like(like_ND), torch.zeros_like(like_ND)
        self.count = 0

    def direction(self, rows: Tensor, grad_AD: Tensor) -> Tensor:
        self.count += 1
        self.first_ND[rows] = first = 0.9 * self.first_ND[rows] + 0.1 * grad_AD
        self.second_ND[rows] = second = 0.999 * self.second_ND[rows] + 0.001 * grad_AD**2
        first, second = first / (1 - 0.9**self.count), second / (1 - 0.999**self.count)
        return first / (second.sqrt() + 1e-8)


def _clean_outputs(view: ModelView, module: str, tasks: Sequence[ValueTask]) -> Tensor:
    tap = Tap(module, "output")
    rows = [task.contexts[0] for task in tasks]
    run = view.run([row.ids for row in rows], taps=[tap], prompts=[row.end for row in rows])
    return run.at(tap, [(row, task.contexts[0].position) for row, task in enumerate(tasks)])
