"""Optimise a value: what a module should have put out at one position for a target to follow.

Shared by the locate-then-edit family (ROME, arXiv 2202.05262, equation 4) and by codebooks. A
vector delta is added to the module's output at one position in every context, and is trained by
Adam on

    NLL(target) + kl_factor * KL(new || old at "{subject} is a") + decay * |delta| / |v0|^2

and a term of the method's own, if it has one, within the ball |delta| <= clamp * |v0|. The model
itself is never trained. Several tasks are one batch: their deltas are independent, their losses are
summed, each stops by itself and leaves the batch. Several modules may be changed at once, each with
a vector and a ball of its own (PMET, arXiv 2308.08742). Passes are replayed (models/replay.py).
Axes: N tasks, S modules, D width of their outputs, B rows, M wanted places, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowpatch.errors import EditError
from knowpatch.models.passes import Tap
from knowpatch.models.replay import passes
from knowpatch.models.view import ModelView
from knowpatch.parts.tasks import Places, ValueTask, batches
from knowpatch.progress import Progress, silent

EASED, EASY_KL = 0.1, 0.01
Term = Callable[[Tensor, Tensor], Tensor]
"""From the task's NLL and what enters the head at its changed positions, context by context
(C, D), to what its loss is raised by. Neither early stop looks at it."""


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
        hits: a task is done, too, when its target has been the likeliest in every context in this
            many steps (ENCORE's early stop, arXiv 2502.01636); None for never.
        easing: as long as the target is the likeliest in every context its NLL weighs a tenth, and
            the task is done when KL is at most EASY_KL then (PMET).
        dtype: of the replayed passes; None for the model's own. Values stay in float32.
    """

    steps: int
    learning_rate: float | None
    clamp: float | None
    weight_decay: float
    kl_factor: float
    enough: float
    hits: int | None = None
    easing: bool = False
    dtype: torch.dtype | None = None


@dataclass(frozen=True, eq=False)
class Value:
    """clean_SD: the modules' outputs on the bare prompt; delta_SD: what to add; how it went."""

    clean_SD: Tensor
    delta_SD: Tensor
    nll: float
    kl: float
    steps: int

    @property
    def clean_D(self) -> Tensor:
        """Of the first module."""
        return self.clean_SD[0]

    @property
    def delta_D(self) -> Tensor:
        """Of the first module."""
        return self.delta_SD[0]


def optimise(
    view: ModelView,
    modules: Sequence[str],
    tasks: Sequence[ValueTask],
    settings: ValueSettings,
    progress: Progress = silent,
    terms: Sequence[Term] | None = None,
) -> list[Value]:
    """The values of the outputs of `modules` for each task.

    Args:
        terms: what each task's loss is raised by, if by anything more.

    Raises:
        EditError: a loss that is not finite.
    """
    values: dict[int, Value] = {}
    for numbers in batches(tasks):
        mine = None if terms is None else [terms[i] for i in numbers]
        descent = _Descent(view, modules, [tasks[i] for i in numbers], settings, mine)
        for finished in descent.steps():
            progress("optimising values", len(values) + finished, len(tasks))
        values.update(zip(numbers, descent.values(), strict=True))
    return [values[i] for i in range(len(tasks))]


class _Descent:
    """Adam on the deltas of a few tasks; what is done leaves."""

    def __init__(
        self,
        view: ModelView,
        modules: Sequence[str],
        tasks: Sequence[ValueTask],
        settings: ValueSettings,
        terms: Sequence[Term] | None,
    ) -> None:
        self.settings, self.tasks, self.terms = settings, tasks, terms
        self.places = Places.of(tasks, view.device)
        self.passes = passes(
            view,
            modules,
            [row for task in tasks for row in task.rows],
            self.places.where,
            dtype=settings.dtype,
        )
        self.clean_NSD = _clean_outputs(view, modules, tasks)
        norm_NS = self.clean_NSD.norm(dim=2)
        clamp = settings.clamp
        self.radius_NS = norm_NS * (torch.inf if clamp is None else clamp)
        self.rate_NS = norm_NS * (clamp or 0.5) / (4 * self.clean_NSD.shape[2] ** 0.5)
        if settings.learning_rate is not None:
            self.rate_NS = torch.full_like(norm_NS, settings.learning_rate)
        self.decay_NS = settings.weight_decay / norm_NS**2
        self.delta_NSD = torch.zeros_like(self.clean_NSD)
        self.adam = _Adam(self.delta_NSD)
        self.hits_N = torch.zeros(len(tasks), device=view.device)
        self.eased_N = torch.zeros(len(tasks), device=view.device, dtype=torch.bool)
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
        delta_ASD = self.delta_NSD[alive].clone()
        delta_ASD.requires_grad_()
        nll_A, kl_A, led_A, states_BD = self._losses(delta_ASD)
        weight_A = torch.where(self.eased_N[alive], EASED, 1.0)
        decay_A = (self.decay_NS[alive] * delta_ASD.norm(dim=2)).sum(1)
        loss_A = weight_A * nll_A + self.settings.kl_factor * kl_A + decay_A
        loss_A = loss_A + self._terms(nll_A.detach(), states_BD)
        if not bool(torch.isfinite(loss_A).all()):
            raise EditError(
                f"the loss is not finite at step {step} of {self.settings.steps}: use a smaller "
                "learning_rate or clamp, or load the model in float32"
            )
        done_A = self._done(nll_A.detach(), kl_A.detach(), led_A)
        done_A = done_A | (step == self.settings.steps - 1)
        for i in done_A.nonzero()[:, 0].tolist():
            task, nll, kl = int(alive[i]), float(nll_A[i].detach()), float(kl_A[i].detach())
            self.found[task] = Value(self.clean_NSD[task], self.delta_NSD[task], nll, kl, step)
        if bool(done_A.all()):
            self.alive = alive[:0]
            return
        (grad_ASD,) = torch.autograd.grad(loss_A.sum(), delta_ASD)
        self._move(alive[~done_A], grad_ASD[~done_A])
        if bool(done_A.any()):
            self._keep(~done_A)

    def _done(self, nll_A: Tensor, kl_A: Tensor, led_A: Tensor) -> Tensor:
        """Which of the tasks that are left are done; led_A: target likeliest everywhere."""
        done_A = nll_A < self.settings.enough
        if self.settings.easing:
            self.eased_N[self.alive] = led_A
            done_A = done_A | (led_A & (kl_A <= EASY_KL))
        if self.settings.hits is not None:
            self.hits_N[self.alive] += led_A
            done_A = done_A | (self.hits_N[self.alive] >= self.settings.hits)
        return done_A

    def _move(self, tasks: Tensor, grad_ASD: Tensor) -> None:
        """One step of Adam, and back into the balls."""
        direction_ASD = self.adam.direction(tasks, grad_ASD)
        moved_ASD = self.delta_NSD[tasks] - self.rate_NS[tasks, :, None] * direction_ASD
        shrink_AS = (self.radius_NS[tasks] / moved_ASD.norm(dim=2).clamp(min=1e-12)).clamp(max=1)
        self.delta_NSD[tasks] = moved_ASD * shrink_AS[:, :, None]

    def _terms(self, nll_A: Tensor, states_BD: Tensor) -> Tensor | float:
        """What more the loss of each task that is left consists of."""
        if self.terms is None:
            return 0.0
        found, start = [], 0
        for i, nll in zip(self.alive.tolist(), nll_A, strict=True):
            found.append(self.terms[i](nll, states_BD[start : start + len(self.tasks[i].contexts)]))
            start += len(self.tasks[i].rows)
        return torch.stack(found)

    def _losses(self, delta_ASD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """NLL and KL of each task that is left, and whether its target leads in every context.

        And what enters the head at the changed position of each row.
        """
        places = self.places
        seen = self.passes.run(delta_ASD[places.task_B])
        logprobs_MV = seen.logits_MV.log_softmax(-1)
        labelled = places.label_M >= 0
        labels = places.label_M[labelled]
        picked = logprobs_MV[labelled].gather(1, labels[:, None])[:, 0]
        none = torch.zeros(len(self.alive), device=delta_ASD.device)
        owner, weight = places.task_M[labelled], places.weight_M[labelled]
        nll_A = none.index_add(0, owner, -picked * weight)
        behind = (logprobs_MV[labelled].argmax(-1) != labels).float()
        led_A = none.index_add(0, owner, behind) == 0
        new_KV = logprobs_MV[~labelled]
        if self.old_NV is None:
            self.old_NV = new_KV.detach()
        kl_K = (new_KV.exp() * (new_KV - self.old_NV)).sum(-1)
        kl_A = none.index_add(0, places.task_M[~labelled], kl_K)
        return nll_A, kl_A, led_A, seen.states_BD

    def _keep(self, kept_A: Tensor) -> None:
        """Only these of the tasks that are left go on."""
        if self.old_NV is not None:
            owner = self.places.task_M[self.places.label_M < 0]
            self.old_NV = self.old_NV[kept_A[owner]]
        self.passes.keep(kept_A[self.places.task_B].nonzero()[:, 0].tolist())
        self.places = self.places.keep(kept_A)
        self.alive = self.alive[kept_A]


class _Adam:
    """Adam's direction, task by task, with its default betas and without a step of its own."""

    def __init__(self, like: Tensor) -> None:
        self.first, self.second = torch.zeros_like(like), torch.zeros_like(like)
        self.count = 0

    def direction(self, tasks: Tensor, grad: Tensor) -> Tensor:
        self.count += 1
        self.first[tasks] = first = 0.9 * self.first[tasks] + 0.1 * grad
        self.second[tasks] = second = 0.999 * self.second[tasks] + 0.001 * grad**2
        first, second = first / (1 - 0.9**self.count), second / (1 - 0.999**self.count)
        return first / (second.sqrt() + 1e-8)


def _clean_outputs(view: ModelView, modules: Sequence[str], tasks: Sequence[ValueTask]) -> Tensor:
    """What the modules put out on the bare prompts (N, S, D)."""
    taps = [Tap(module, "output") for module in modules]
    rows = [task.contexts[0] for task in tasks]
    run = view.run([row.ids for row in rows], taps=taps, prompts=[row.end for row in rows])
    places = [(row, task.contexts[0].position) for row, task in enumerate(tasks)]
    return torch.stack([run.at(tap, places) for tap in taps], dim=1)
