"""AdaLoRA: low-rank adapters in SVD form, whose ranks go where they matter.

Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning" (arXiv 2303.10512):

    delta W = alpha / r0 * B diag(E) A,  E = 0 at first,
    loss = cross-entropy + orthogonal * mean over all P = A^T, B of ||P^T P - 1||_F.

After each of T steps every number p of an adapter has the importance |p dL/dp|, of which two
exponential averages are kept, the importance's and that of how far it is from its average; their
product is the number's score. A triplet's score is that of E_k plus the means over row k of A and
column k of B. While the budget falls, the triplets with the lowest scores of all maps together
lose their E, and may get it back; from step T - final on what was pruned stays so.

As in the authors' program and in PEFT, p in the importance is the number after the step, the
gradient that before it. Unlike there, exactly as many triplets are pruned as the budget says, where
scores are equal too, and there is no dropout. With compat=true this is what EasyEdit runs under
the name: all ranks stay. Axes: I and D width of a map's input and output, K rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from knowpatch.deltas import LowRank
from knowpatch.method import register
from knowpatch.models.roles import LinearRole
from knowpatch.models.view import ModelView
from knowpatch.parts.adapters import Adapted, AdapterConfig, leaf
from knowpatch.parts.descent import Passes
from knowpatch.parts.tuned import Trained

SPREAD = 0.02
"""Standard deviation of A's and B's first values."""
EASYEDIT: dict[str, Any] = {
    "others": 0,
    "modules": ["attn.q", "attn.v"],
    "initial_rank": 12,
    "alpha": 32.0,
    "learning_rate": 5e-3,
    "steps": 70,
    "batch_size": 1,
    "enough": 1e-9,
    "compat": True,
}


class AdaloraConfig(AdapterConfig):
    """Options of AdaLoRA."""

    initial_rank: int = Field(8, ge=1, description="of each map's change, before any is pruned")
    target_rank: int = Field(4, ge=0, description="mean over the maps in the end")
    alpha: float = Field(64.0, gt=0, description="the change is scaled by alpha / initial_rank")
    learning_rate: float = Field(1e-2, gt=0, le=1e30, description="of Adam; published: 5e-3")
    steps: int = Field(24, ge=1, description="passes over the requests, at most")
    initial: int = Field(4, ge=0, description="passes before ranks are pruned")
    final: int = Field(8, ge=0, description="last passes, in which ranks stay as they are")
    interval: int = Field(2, ge=1, description="steps from one pruning to the next")
    decays: tuple[float, float] = Field(
        (0.85, 0.85), description="of the averages of importance and of its uncertainty"
    )
    orthogonal: float = Field(0.5, ge=0, description="weight of the orthogonality penalty")
    compat: bool = Field(False, description="never prune, as EasyEdit's version of it")

    @model_validator(mode="after")
    def _possible(self) -> AdaloraConfig:
        if not self.compat and self.target_rank > self.initial_rank:
            raise ValueError("target_rank is above initial_rank")
        if not self.compat and self.initial >= self.steps - self.final:
            raise ValueError("steps has to be more than initial and final together")
        return self


class Triplets:
    """alpha / K * B diag(E) A of one map, while it is trained.

    Args:
        role: the map.
        like: its weight as stored.
        rank: K; no more than the map has.
        alpha: the scale is alpha / (K + 1e-5).
        drawn: where A and B come from.
    """

    def __init__(
        self, role: LinearRole, like: Tensor, rank: int, alpha: float, drawn: torch.Generator
    ) -> None:
        out, into = role.oriented(like).shape
        rank = min(rank, out, into)
        down_KI = SPREAD * torch.randn(rank, into, generator=drawn)
        up_DK = SPREAD * torch.randn(out, rank, generator=drawn)
        value_K = torch.zeros(rank, device=like.device)
        value_K.requires_grad_()
        self.down_KI, self.value_K = leaf(down_KI, like.device), value_K
        self.up_DK = leaf(up_DK, like.device)
        self.scale = alpha / (rank + 1e-5)
        self._role = role

    @property
    def leaves(self) -> Sequence[Tensor]:
        return self.down_KI, self.value_K, self.up_DK

    def delta(self) -> LowRank:
        """The scale is folded into B: an adapter as any other."""
        return self._role.factored(self.scale * self.up_DK * self.value_K, self.down_KI)

    def settle(self) -> None:
        pass

    def prune(self, kept_K: Tensor) -> None:
        """Takes the others' E away."""
        value_K = self.value_K
        with torch.no_grad():
            value_K.mul_(kept_K.to(value_K))

    def skew(self) -> Tensor:
        """How far A's rows and B's columns are from orthonormal: (2)."""
        one_KK = torch.eye(len(self.value_K), device=self.value_K.device)
        grams = (self.down_KI @ self.down_KI.T, self.up_DK.T @ self.up_DK)
        return torch.stack([torch.linalg.norm(gram_KK - one_KK) for gram_KK in grams])


@dataclass(frozen=True)
class Schedule:
    """How many triplets may be there after each step, counted from 1.

    Attributes:
        begin, end: triplets of all maps at first, and in the end.
        steps, initial, final, interval: see the method's options.
    """

    begin: int
    end: int
    steps: int
    initial: int
    final: int
    interval: int

    @property
    def last(self) -> int:
        """The step of the last allocation."""
        return self.steps - self.final

    def budget(self, step: int) -> int:
        if step <= self.initial:
            return self.begin
        left = max(1 - (step - self.initial) / (self.last - self.initial), 0)
        return int((self.begin - self.end) * left**3 + self.end)

    def due(self, step: int) -> bool:
        """Whether ranks are allocated after this step."""
        return step == self.last or (self.initial < step < self.last and step % self.interval == 0)


class Allocator:
    """Scores the triplets of all maps, and prunes those that matter least.

    Args:
        triplets: of each map, trained together.
        schedule: the budget.
        decays: of the two averages.
    """

    def __init__(
        self, triplets: Sequence[Triplets], schedule: Schedule, decays: tuple[float, float]
    ) -> None:
        self._triplets, self._schedule, self._decays = triplets, schedule, decays
        trained = [each for one in triplets for each in one.leaves]
        self._means = {each: torch.zeros_like(each) for each in trained}
        self._spreads = {each: torch.zeros_like(each) for each in trained}
        self.kept_N = torch.ones(schedule.begin, dtype=torch.bool)

    @torch.no_grad()
    def after(self, step: int) -> None:
        """What follows a step (counted from 1), with its gradients still there."""
        if step < self._schedule.last:
            self._weigh()
        if self._schedule.due(step):
            self._allocate(self._schedule.budget(step))
        if self._schedule.due(step) or step > self._schedule.last:
            self._prune()

    def _weigh(self) -> None:
        slow, wide = self._decays
        for each, before in self._means.items():
            assert each.grad is not None
            now = (each * each.grad).abs()
            mean = slow * before + (1 - slow) * now
            self._means[each] = mean
            self._spreads[each] = wide * self._spreads[each] + (1 - wide) * (now - mean).abs()

    def scores(self) -> Tensor:
        """Of all triplets (N), map after map."""
        found = []
        for each in self._triplets:
            down_KI, value_K, up_DK = (self._means[x] * self._spreads[x] for x in each.leaves)
            found.append(value_K + (down_KI.mean(1) + up_DK.mean(0)))
        return torch.cat(found)

    def _allocate(self, budget: int) -> None:
        order_N = self.scores().sort(stable=True).indices.cpu()
        self.kept_N = torch.ones_like(self.kept_N)
        self.kept_N[order_N[: max(len(order_N) - budget, 0)]] = False

    def _prune(self) -> None:
        counts = [len(each.value_K) for each in self._triplets]
        for each, kept_K in zip(self._triplets, self.kept_N.split(counts), strict=True):
            each.prune(kept_K)


@register("adalora")
class Adalora(Adapted):
    """Trains triplets and shares the ranks out among the maps."""

    name = "adalora"
    paper = "Zhang et al. 2023, arXiv 2303.10512"
    summary = "low-rank adapters in SVD form; training moves ranks to the maps that need them"
    choose = "as lora, where it is not known which maps should change"
    Config = AdaloraConfig
    depths = (3 / 30, 6 / 30)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "llama-2-7b": {**EASYEDIT, "layers": list(range(32))},
        "gpt2-xl": {**EASYEDIT, "layers": list(range(48)), "steps": 30},
    }

    def change(self, view: ModelView, role: LinearRole, prepared: Any, state: Any) -> Triplets:
        like = role.address.narrow(view.values(role.address.parameter))
        return Triplets(role, like, self.config.initial_rank, self.config.alpha, self.drawn(role))

    def beside(self, changes: Sequence[Trained], passes: Passes) -> Tensor | float:
        skews = torch.cat([each.skew() for each in _triplets(changes)])
        penalty: Tensor = self.config.orthogonal * skews.mean()
        return penalty + super().beside(changes, passes)

    def train(
        self,
        changes: Sequence[Trained],
        passes: Passes,
        *,
        least: int = 0,
        after: Callable[[int], None] = lambda step: None,
    ) -> None:
        """All steps are made up to the last allocation, however well the answers are known."""
        if self.config.compat:
            super().train(changes, passes, least=least, after=after)
            return
        triplets = _triplets(changes)
        schedule = self.schedule(triplets, passes.learned)
        allocator = Allocator(triplets, schedule, self.config.decays)
        super().train(
            changes,
            passes,
            least=schedule.last,
            after=lambda done: allocator.after(done + 1),
        )

    def schedule(self, triplets: Sequence[Triplets], examples: int) -> Schedule:
        """The budget over the steps; a pass over the examples takes one for each batch."""
        config, batches = self.config, -(-examples // self.config.batch_size)
        return Schedule(
            sum(len(each.value_K) for each in triplets),
            config.target_rank * len(triplets),
            config.steps * batches,
            config.initial * batches,
            config.final * batches,
            config.interval,
        )


def _triplets(changes: Sequence[Trained]) -> list[Triplets]:
    return [each for each in changes if isinstance(each, Triplets)]
