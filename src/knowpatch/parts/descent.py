"""Descent: Adam on whatever changes what a model puts out, until its answers are learned.

Each pass over the examples goes through all of them in shuffled batches (breadth first), so that no
fact is learned to the end before the next one is looked at. What is trained may be whole matrices
(parts/tuned.py) or what wraps add to modules; only the blocks from the lowest changed one up are
computed (models/above.py). Axes: M predicted tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowpatch.errors import EditError
from knowpatch.models.above import Above
from knowpatch.models.passes import Act
from knowpatch.models.view import ModelView
from knowpatch.progress import Progress, silent

TOGETHER = 8
"""Pieces of ordinary text that are looked at in one step."""


@dataclass(frozen=True)
class Example:
    """An answer to learn behind a prompt, as ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def row(self) -> tuple[int, ...]:
        """What is read to predict every token of the answer."""
        return (*self.prompt, *self.answer[:-1])


class Passes:
    """Passes over examples with what is trained as it is so far.

    Args:
        view: the model.
        examples: what is learned.
        besides: what is read besides, numbered after them.
        lowest: the lowest block in which something is trained.
        weights: whole parameters, by name, as trained so far.
        acts: what modules put out instead, as trained so far.
        dtype: of the passes; None for the model's own.
    """

    def __init__(
        self,
        view: ModelView,
        examples: Sequence[Example],
        besides: Sequence[Example] = (),
        *,
        lowest: int,
        weights: Callable[[], Mapping[str, Tensor]] = dict,
        acts: Sequence[Act] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        self.examples, self.learned = [*examples, *besides], len(examples)
        self._looked = 0
        self._weights, self._acts = weights, acts
        self._device = view.device
        rows, prompts = [e.row for e in self.examples], [len(e.prompt) for e in self.examples]
        self._above = Above(view, lowest, rows, prompts=prompts, dtype=dtype)

    def logits(self, numbers: Sequence[int], *, forced: bool = True) -> Tensor:
        """Logits (M, V) where the answers of these examples are predicted, one after another.

        Args:
            numbers: of the examples.
            forced: each token behind those before it; else all at the prompt's last token.
        """
        return self._logits(numbers, self._weights(), self._acts, forced=forced)

    def drift(self) -> Tensor:
        """KL(before || now), mean over tokens, on the next few of what is read besides."""
        first = range(self.learned, len(self.examples), TOGETHER)[self._looked]
        numbers = range(first, min(first + TOGETHER, len(self.examples)))
        self._looked = 0 if numbers.stop == len(self.examples) else self._looked + 1
        # Not kept from one round to the next: distributions over the vocabulary are large.
        with torch.no_grad():
            before_MV = self._logits(numbers, {}, (), forced=True).detach().log_softmax(-1)
        now_MV = self.logits(numbers).log_softmax(-1)
        apart_M: Tensor = (before_MV.exp() * (before_MV - now_MV)).sum(-1)
        return apart_M.mean()

    def _logits(
        self,
        numbers: Sequence[int],
        weights: Mapping[str, Tensor],
        acts: Sequence[Act],
        *,
        forced: bool,
    ) -> Tensor:
        places = [
            (row, len(self.examples[number].prompt) - 1 + (i if forced else 0))
            for row, number in enumerate(numbers)
            for i in range(len(self.examples[number].answer))
        ]
        run = self._above.run(numbers, weights=weights, logits_at=places, acts=acts)
        return run.logits_MV

    def logprobs(self, numbers: Sequence[int], *, forced: bool = True) -> Tensor:
        """Log-probability (M) of each token of the answers."""
        logits_MV = self.logits(numbers, forced=forced)
        return logits_MV.log_softmax(-1).gather(1, self.labels(numbers)[:, None])[:, 0]

    def labels(self, numbers: Sequence[int]) -> Tensor:
        """The answers' tokens (M)."""
        answers = [i for number in numbers for i in self.examples[number].answer]
        return torch.tensor(answers, device=self._device)

    def mean(self, each_M: Tensor, numbers: Sequence[int]) -> Tensor:
        """The mean over each answer's tokens and then over answers."""
        lengths = [len(self.examples[number].answer) for number in numbers]
        weights = [1 / (length * len(lengths)) for length in lengths for _ in range(length)]
        return (each_M * torch.tensor(weights, device=each_M.device)).sum()


@dataclass(frozen=True)
class Pace:
    """How fast and how long to descend.

    Attributes:
        steps: passes over the examples, at most.
        learning_rate, weight_decay: of Adam.
        batch_size: examples per step.
        enough: stop when the mean loss is below this; batches below it are not learned from.
        seed: of the order.
        least: steps that are made in any case, however small the loss is.
    """

    steps: int
    learning_rate: float
    batch_size: int
    enough: float
    weight_decay: float = 0.0
    seed: int = 0
    least: int = 0


def descend(
    leaves: Sequence[Tensor],
    count: int,
    loss_of: Callable[[Sequence[int]], Tensor],
    pace: Pace,
    *,
    besides: Callable[[], Tensor | float] = lambda: 0.0,
    before: Callable[[int], None] = lambda step: None,
    after: Callable[[int], None] = lambda step: None,
    settle: Callable[[], None] = lambda: None,
    judge: Callable[[], bool] = lambda: False,
    progress: Progress = silent,
) -> None:
    """Adam on `leaves` until the mean loss over examples 0 to count - 1 is small enough.

    Args:
        leaves: float32, requiring grad.
        count: of examples.
        loss_of: the mean loss over the examples of these numbers, which decides when to stop.
        pace: see there.
        besides: what is added to the loss of a step.
        before: called with the number of a step when its gradients are there, before Adam moves.
        after: called with the same number when it has moved, the gradients still there.
        settle: called after each step: brings leaves back to where they may be.
        judge: called after each pass over the examples: whether that was the last one.
        progress: told pass by pass.

    Raises:
        EditError: a loss that is not finite.
    """
    adam = torch.optim.AdamW(leaves, lr=pace.learning_rate, weight_decay=pace.weight_decay)
    order, done = random.Random(pace.seed), 0
    for step in range(pace.steps):
        progress("fine-tuning", step, pace.steps)
        shuffled = order.sample(range(count), count)
        losses = []
        for start in range(0, count, pace.batch_size):
            loss = loss_of(shuffled[start : start + pace.batch_size])
            losses.append(float(loss.detach()))
            if not losses[-1] < float("inf"):
                raise EditError(
                    f"the loss is not finite at step {step} of {pace.steps}: use a smaller "
                    "learning_rate, or load the model in float32"
                )
            if losses[-1] >= pace.enough or done < pace.least:
                grads = torch.autograd.grad(loss + besides(), leaves)
                for leaf, grad in zip(leaves, grads, strict=True):
                    leaf.grad = grad
                before(done)
                adam.step()
                after(done)
                done += 1
            settle()
        if (sum(losses) / len(losses) < pace.enough and done >= pace.least) or judge():
            break
    progress("fine-tuning", pace.steps, pace.steps)
