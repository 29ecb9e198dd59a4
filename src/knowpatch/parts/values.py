"""Optimise a value: what a module should have put out at one position for a target to follow.

Shared by the locate-then-edit family (ROME, arXiv 2202.05262, equation 4). A vector delta is added
to the module's output at the subject's last token in every context, and is trained by Adam on

    NLL(target) + kl_factor * KL(new || old at "{subject} is a") + decay * |delta| / |v0|^2

within the ball |delta| <= clamp * |v0|. The model itself is never trained. Several tasks are one
batch: their deltas are independent, their losses are summed, and each stops by itself.
Axes: N tasks, D width of the module's output, M places where a target token is predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowpatch.errors import EditError
from knowpatch.models.batch import Place
from knowpatch.models.passes import Shift, Tap
from knowpatch.models.view import ModelView
from knowpatch.progress import Progress, silent


@dataclass(frozen=True)
class Row:
    """One context: ids of prompt and all but the last target token, and the edited position."""

    ids: tuple[int, ...]
    position: int


@dataclass(frozen=True)
class ValueTask:
    """One fact: its target, its contexts (the bare prompt first), and where the KL is read."""

    target: tuple[int, ...]
    contexts: tuple[Row, ...]
    kl: Row


@dataclass(frozen=True)
class ValueSettings:
    """How the value is optimised.

    Attributes:
        steps: passes at most (one fewer updates).
        learning_rate: of Adam; None for clamp * |v0| / (4 sqrt D), which reaches the ball's edge
            in about four steps whatever the model's scale.
        clamp: radius of the ball, in |v0|.
        weight_decay, kl_factor: weights of the two terms.
        enough: a task is done when its NLL is below this. (The published code tests the whole
            loss, which the KL term of a small model may never let fall so far.)
    """

    steps: int
    learning_rate: float | None
    clamp: float
    weight_decay: float
    kl_factor: float
    enough: float


@dataclass(frozen=True, eq=False)
class Value:
    """clean_D: the module's output on the bare prompt; delta_D: what to add; and how it went."""

    clean_D: Tensor
    delta_D: Tensor
    nll: float
    kl: float
    steps: int


@dataclass(frozen=True)
class _Layout:
    """Where everything sits in the batch; task_M and so on say which task each place belongs to."""

    rows: list[tuple[int, ...]]
    shifted: list[Place]
    shifted_task: Tensor
    label_places: list[Place]
    labels_M: Tensor
    label_task: Tensor
    label_weight: Tensor
    kl_places: list[Place]


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
    layout = _lay_out(tasks, view.device)
    clean_ND = _clean_outputs(view, module, tasks)
    norm_N = clean_ND.norm(dim=1)
    radius_N = settings.clamp * norm_N
    rate_N = radius_N / (4 * clean_ND.shape[1] ** 0.5)
    if settings.learning_rate is not None:
        rate_N = torch.full_like(rate_N, settings.learning_rate)
    delta_ND = torch.zeros_like(clean_ND, requires_grad=True)
    adam = _Adam(delta_ND)
    done_N = torch.zeros(len(tasks), dtype=torch.bool, device=view.device)
    steps_N = [0] * len(tasks)
    old_NV: Tensor | None = None
    for step in range(settings.steps):
        progress("optimising values", step, settings.steps)
        nll_N, kl_N, new_NV = _losses(view, module, layout, delta_ND, old_NV, len(tasks))
        old_NV = new_NV if old_NV is None else old_NV
        decay_N = settings.weight_decay * delta_ND.norm(dim=1) / norm_N**2
        loss_N = nll_N + settings.kl_factor * kl_N + decay_N
        if not bool(torch.isfinite(loss_N).all()):
            raise EditError(
                f"the loss is not finite at step {step} of {settings.steps}: use a smaller "
                "learning_rate or clamp, or load the model in float32"
            )
        done_N |= nll_N.detach() < settings.enough
        if bool(done_N.all()) or step == settings.steps - 1:
            break
        (grad_ND,) = torch.autograd.grad(loss_N.sum(), delta_ND)
        with torch.no_grad():
            moved_ND = delta_ND - rate_N[:, None] * adam.direction(grad_ND)
            shrink_N = (radius_N / moved_ND.norm(dim=1).clamp(min=1e-12)).clamp(max=1)
            delta_ND.copy_(torch.where(done_N[:, None], delta_ND, moved_ND * shrink_N[:, None]))
        steps_N = [n + (not finished) for n, finished in zip(steps_N, done_N.tolist(), strict=True)]
    progress("optimising values", settings.steps, settings.steps)
    final = zip(clean_ND, delta_ND.detach(), nll_N.tolist(), kl_N.tolist(), steps_N, strict=True)
    return [Value(*parts) for parts in final]


class _Adam:
    """Adam's direction for one tensor (default betas), without a step of its own."""

    def __init__(self, like: Tensor) -> None:
        self.first, self.second, self.count = torch.zeros_like(like), torch.zeros_like(like), 0

    def direction(self, grad: Tensor) -> Tensor:
        self.count += 1
        self.first = 0.9 * self.first + 0.1 * grad
        self.second = 0.999 * self.second + 0.001 * grad**2
        first = self.first / (1 - 0.9**self.count)
        second = self.second / (1 - 0.999**self.count)
        return first / (second.sqrt() + 1e-8)


def _lay_out(tasks: Sequence[ValueTask], device: torch.device) -> _Layout:
    rows: list[tuple[int, ...]] = []
    shifted, owners, kl_places = [], [], []
    places, labels, label_task, weight = [], [], [], []
    for number, task in enumerate(tasks):
        for context in task.contexts:
            first = len(context.ids) - len(task.target)
            for i, label in enumerate(task.target):
                places.append((len(rows), first + i))
                labels.append(label)
                label_task.append(number)
                weight.append(1 / (len(task.target) * len(task.contexts)))
            shifted.append((len(rows), context.position))
            owners.append(number)
            rows.append(context.ids)
        shifted.append((len(rows), task.kl.position))
        owners.append(number)
        kl_places.append((len(rows), task.kl.position))
        rows.append(task.kl.ids)
    return _Layout(
        rows,
        shifted,
        torch.tensor(owners, device=device),
        places,
        torch.tensor(labels, device=device),
        torch.tensor(label_task, device=device),
        torch.tensor(weight, device=device),
        kl_places,
    )


def _clean_outputs(view: ModelView, module: str, tasks: Sequence[ValueTask]) -> Tensor:
    tap = Tap(module, "output")
    run = view.run([task.contexts[0].ids for task in tasks], taps=[tap])
    return run.at(tap, [(row, task.contexts[0].position) for row, task in enumerate(tasks)])


def _losses(
    view: ModelView,
    module: str,
    layout: _Layout,
    delta_ND: Tensor,
    old_NV: Tensor | None,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """NLL and KL of each task with its delta added, and the log-probabilities the KL compares."""
    shift = Shift(module, layout.shifted, delta_ND[layout.shifted_task])
    run = view.run(
        layout.rows, logits_at=[*layout.label_places, *layout.kl_places], shifts=[shift], grad=True
    )
    logprobs = run.logits_MV.log_softmax(-1)
    labelled, new_NV = logprobs[: len(layout.labels_M)], logprobs[len(layout.labels_M) :]
    picked = labelled.gather(1, layout.labels_M[:, None])[:, 0]
    nll_N = torch.zeros(count, device=picked.device).index_add(
        0, layout.label_task, -picked * layout.label_weight
    )
    old = new_NV.detach() if old_NV is None else old_NV
    kl_N = (new_NV.exp() * (new_NV - old)).sum(-1)
    return nll_N, kl_N, new_NV.detach()
