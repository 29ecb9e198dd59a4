"""Values of long answers, window by window.

A long answer is cut into windows of some tokens. For each window, one after the other, a vector is
added to a module's output at the token before the window's first, and is trained by Adam on

    mean NLL of the window's tokens + decay * |delta| / |h0|^2        within |delta| <= clamp |h0|

while the vectors of all earlier windows act at their own places: an answer is produced token by
token, so what was put in for its beginning is there when its end is due (AnyEdit, arXiv 2502.05628,
section 4). An answer that is one window is the value of UnKE (arXiv 2405.15349, equation 5). What
the module itself puts out at the places does not depend on the vectors, since these come after all
that it reads. Several answers run together and stop each by itself.
Axes: N answers, J windows, M predicted tokens, D width of the module's output, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from knowpatch.errors import EditError
from knowpatch.models.batch import gathered
from knowpatch.models.passes import Tap
from knowpatch.models.view import ModelView
from knowpatch.parts.onward import LongAnswer, Passes, passes_over
from knowpatch.parts.values import ValueSettings
from knowpatch.progress import Progress, silent

TOGETHER = 2048
"""Tokens of answers that run together at most, padding included."""


def window_values(
    view: ModelView,
    module: str,
    answers: Sequence[LongAnswer],
    settings: ValueSettings,
    progress: Progress = silent,
) -> list[Tensor]:
    """What to add to the output of `module` at each window's place: (J, D) for each answer.

    Args:
        module: a block, or a module in one.
        settings: there are no KL term, no hits and no easing here.

    Raises:
        EditError: a loss that is not finite.
    """
    found: dict[int, Tensor] = {}
    for numbers in gathered([len(answer.ids) for answer in answers], TOGETHER):
        group = _Group(view, module, [answers[number] for number in numbers], settings)
        windows = max(len(answers[number].windows) for number in numbers)
        for window in range(windows):
            done = len(found) + len(numbers) * window / windows
            progress("optimising values", int(done), len(answers))
            group.advance(window)
        found.update(zip(numbers, map(torch.stack, group.deltas), strict=True))
    progress("optimising values", len(answers), len(answers))
    return [found[number] for number in range(len(answers))]


class _Group:
    """Answers that advance window by window together."""

    def __init__(
        self,
        view: ModelView,
        module: str,
        answers: Sequence[LongAnswer],
        settings: ValueSettings,
    ) -> None:
        self.view, self.module, self.settings = view, module, settings
        self.answers = list(answers)
        self.deltas: list[list[Tensor]] = [[] for _ in answers]
        self.norms = self._norms()
        self.passes: Passes = passes_over(view, module, self.answers, settings.dtype)

    def _norms(self) -> list[list[float]]:
        """|h0| at each place of each answer."""
        tap = Tap(self.module, "output")
        prompts = [len(answer.prompt) for answer in self.answers]
        run = self.view.run([a.ids for a in self.answers], taps=[tap], prompts=prompts)
        return [
            run.at(tap, [(row, position) for position in answer.positions]).norm(dim=1).tolist()
            for row, answer in enumerate(self.answers)
        ]

    def advance(self, window: int) -> None:
        """Find the vectors of one window of every answer that has so many."""
        mine = [i for i, answer in enumerate(self.answers) if window < len(answer.windows)]
        self.passes.begin(window, mine)
        leaves, adams = {}, {}
        for i in mine:
            leaf = torch.zeros(self.view.roles.hidden_size, device=self.view.device)
            leaf.requires_grad_()
            leaves[i] = leaf
            adams[i] = torch.optim.Adam([leaf], lr=self._rate(self.norms[i][window]))
        alive = mine
        for step in range(self.settings.steps):
            nll_A = self._nll(window, alive, torch.stack([leaves[i] for i in alive]))
            sizes = [self.norms[i][window] for i in alive]
            decays = [leaves[i].norm() / size**2 for i, size in zip(alive, sizes, strict=True)]
            loss = (nll_A + self.settings.weight_decay * torch.stack(decays)).sum()
            self._check(loss, step)
            going = [n for n, nll in enumerate(nll_A.tolist()) if nll >= self.settings.enough]
            if step == self.settings.steps - 1 or not going:
                break
            grads = torch.autograd.grad(loss, [leaves[i] for i in alive])
            for n in going:
                leaf = leaves[alive[n]]
                leaf.grad = grads[n]
                adams[alive[n]].step()
                self._into_ball(leaf, sizes[n])
            if len(going) < len(alive):
                self.passes.keep(going)
                alive = [alive[n] for n in going]
        for i in mine:
            self.deltas[i].append(leaves[i].detach())
        self.passes.end(torch.stack([leaves[i].detach() for i in mine]))

    def _rate(self, norm: float) -> float:
        """Of Adam: as given, or such that a few steps lead to the edge of the ball."""
        if self.settings.learning_rate is not None:
            return self.settings.learning_rate
        return norm * (self.settings.clamp or 0.5) / (4 * math.sqrt(self.view.roles.hidden_size))

    def _into_ball(self, leaf: Tensor, norm: float) -> None:
        if self.settings.clamp is not None:
            with torch.no_grad():
                length = leaf.norm().clamp(min=1e-12)
                leaf.mul_((self.settings.clamp * norm / length).clamp(max=1))

    def _check(self, loss: Tensor, step: int) -> None:
        if not bool(torch.isfinite(loss)):
            raise EditError(
                f"the loss is not finite at step {step} of {self.settings.steps}: use a smaller "
                "learning_rate or clamp, or load the model in float32"
            )

    def _nll(self, window: int, alive: Sequence[int], delta_AD: Tensor) -> Tensor:
        """Mean NLL of the window's tokens for each answer that is left (A)."""
        logits_MV = self.passes.logits(delta_AD)
        windows = [self.answers[i].windows[window] for i in alive]
        device = logits_MV.device
        label_M = torch.tensor([token for tokens in windows for token in tokens], device=device)
        size_A = torch.tensor([len(tokens) for tokens in windows], device=device)
        owner_M = torch.arange(len(alive), device=device).repeat_interleave(size_A)
        picked_M = logits_MV.log_softmax(-1).gather(1, label_M[:, None])[:, 0]
        none_A = torch.zeros(len(alive), device=device)
        return none_A.index_add(0, owner_M, -picked_M) / size_A
