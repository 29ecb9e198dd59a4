"""Training a few matrices on answers: what the fine-tuning editors share.

Adam (parts/descent.py) moves float32 changes, whatever precision the model has.
Axes: M predicted tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from knowpatch.deltas import Delta, Dense, LowRank, WeightDelta
from knowpatch.method import Cost, EditMethod, Export, Family, MethodConfig, Shape
from knowpatch.models.load import fast_dtype
from knowpatch.models.roles import LinearRole
from knowpatch.models.view import ModelView
from knowpatch.parts.descent import Example, Pace, Passes, descend
from knowpatch.parts.spans import continuation
from knowpatch.parts.text import find_text, packed_rows
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

SHOWN, KEPT = 8, 24
"""Tokens of a piece of ordinary text that are read, and that are to stay as likely as before."""
Module = Literal["mlp.out", "mlp.up", "mlp.gate", "attn.out", "attn.q", "attn.k", "attn.v"]


class TrainingConfig(MethodConfig):
    """Options of training on answers, whatever is trained."""

    steps: int = Field(40, ge=1, description="passes over the requests, at most")
    learning_rate: float = Field(
        1e-3, gt=0, le=1e30, description="of Adam; published: 5e-4 on 7B models"
    )
    batch_size: int = Field(16, ge=1, description="rows per step")
    weight_decay: float = Field(
        0.0, ge=0, description="pulls the change towards zero: its share per step and learning rate"
    )
    enough: float = Field(1e-2, gt=0, description="stop when the mean loss is below this")
    rephrases: bool = Field(False, description="learn from the requests' rephrases as well")
    keep: float = Field(
        0.0, ge=0, description="weight of KL(before || now) on ordinary text, beside the answers"
    )
    pieces: int = Field(256, ge=1, description="pieces of that text, taken eight at a time")
    text: str | None = Field(
        None, description="ordinary text: file, folder, hub dataset, or self (the model's own)"
    )
    precision: Literal["auto", "model"] = Field(
        "auto", description="of the passes: bfloat16 where that is fast, or the model's"
    )


class TunedConfig(TrainingConfig):
    """Options of the editors that train one matrix of a block."""

    module: Module = Field("mlp.out", description="which matrix of a block")


class Trained(Protocol):
    """Something while it is trained."""

    @property
    def leaves(self) -> Sequence[Tensor]:
        """What Adam moves."""

    def settle(self) -> None:
        """Called after each step: bring the leaves back to where they may be."""


class Change(Trained, Protocol):
    """A change of one matrix while it is trained."""

    def delta(self) -> Delta:
        """The change itself as the matrix is stored, float32; differentiable."""


class Free:
    """Any change, or one of which no entry leaves a box.

    Args:
        like: the matrix as stored (float32 or narrower).
        low, high: bounds of the change's entries; None for no limit.
    """

    def __init__(self, like: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> None:
        leaf = torch.zeros_like(like, dtype=torch.float32)
        leaf.requires_grad_()
        self._leaf = leaf
        self._low, self._high = low, high

    @property
    def leaves(self) -> Sequence[Tensor]:
        return (self._leaf,)

    def delta(self) -> Delta:
        return Dense(self._leaf)

    def settle(self) -> None:
        if self._low is not None or self._high is not None:
            leaf = self._leaf
            with torch.no_grad():
                leaf.clamp_(self._low, self._high)


def settled(delta: Delta) -> Delta:
    """A trained change as a patch holds it."""
    tensors = {name: each.detach().cpu().contiguous() for name, each in delta.tensors().items()}
    found = type(delta)(**tensors)
    return found.trimmed() if isinstance(found, LowRank) else found


@dataclass(frozen=True, eq=False)
class Trial:
    """A matrix with its change while it is trained.

    Attributes:
        role: the matrix.
        change: of it.
        spared_IK: orthonormal inputs that the change adds nothing to; None for none.
    """

    role: LinearRole
    change: Change
    spared_IK: Tensor | None = None

    def delta(self) -> Delta:
        """The change of the matrix as stored; differentiable."""
        delta, oriented = self.change.delta(), self.role.oriented
        if self.spared_IK is None:
            return delta
        if isinstance(delta, Dense):
            return Dense(oriented(self._without(oriented(delta.delta))))
        assert isinstance(delta, LowRank)
        if self.role.stored_in_out:
            return LowRank(self._without(delta.left.T).T, delta.right)
        return LowRank(delta.left, self._without(delta.right))

    def _without(self, rows_NI: Tensor) -> Tensor:
        assert self.spared_IK is not None
        return rows_NI - rows_NI @ self.spared_IK @ self.spared_IK.T


def passes_over(
    view: ModelView,
    maps: Sequence[Trial],
    examples: Sequence[Example],
    besides: Sequence[Example] = (),
    *,
    dtype: torch.dtype | None = None,
) -> Passes:
    """Passes with matrices as trained so far."""
    places = [each.role.address for each in maps]
    bases = {at.parameter: view.values(at.parameter).float() for at in places}

    def weights() -> dict[str, Tensor]:
        found = dict(bases)
        for at, each in zip(places, maps, strict=True):
            found[at.parameter] = WeightDelta(at, each.delta()).added_to(found[at.parameter])
        return found

    lowest = min(view.roles.block_of(each.role.module) for each in maps)
    return Passes(view, examples, besides, lowest=lowest, weights=weights, dtype=dtype)


class Tuned(EditMethod):
    """Trains matrices of some blocks."""

    family: ClassVar[Family] = "intrinsic"
    roles: ClassVar[tuple[str, ...]] = ("mlp.out",)
    exports: ClassVar[tuple[Export, ...]] = ("merged", "gguf")
    Config: ClassVar[type[TrainingConfig]] = TunedConfig

    @abstractmethod
    def layers(self, count: int) -> tuple[int, ...]:
        """The blocks to train of a model that has `count`."""

    @abstractmethod
    def ends(self) -> bool:
        """Whether the end is learned as a part of the answer."""

    def change(self, view: ModelView, role: LinearRole, prepared: Any, state: Any) -> Change:
        """What is trained of one matrix."""
        return Free(role.address.narrow(view.values(role.address.parameter)))

    def examples(self, view: ModelView, request: EditRequest) -> list[Example]:
        """What is learned of a request."""
        return self.answers(view, request, request.target)

    def loss(self, passes: Passes, numbers: Sequence[int]) -> Tensor:
        """The objective over the examples of these numbers: FT-M's cross-entropy on the answer."""
        return -passes.mean(passes.logprobs(numbers), numbers)

    def trained(self, view: ModelView, requests: Sequence[EditRequest]) -> list[LinearRole]:
        """The matrices to train."""
        layers = self.layers(len(view.roles.blocks))
        return [view.roles.linear(role, layer) for layer in layers for role in self.wanted_roles()]

    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: Any, state: Any
    ) -> Patch:
        examples = [part for request in requests for part in self.examples(view, request)]
        roles = self.trained(view, requests)
        spared = self.spared(view, requests, roles, prepared)
        maps = [
            Trial(role, self.change(view, role, prepared, state), spared.get(role.module))
            for role in roles
        ]
        dtype = fast_dtype(view.device) if self.config.precision == "auto" else None
        passes = passes_over(view, maps, examples, self.besides(view), dtype=dtype)
        self.train([each.change for each in maps], passes)
        found = [(each.role.address, settled(each.delta())) for each in maps]
        deltas = [self.delta(view, at, change) for at, change in found if change.rank != 0]
        return self.patch(view, requests, deltas=deltas, traces=self.traces(view, passes, roles))

    def spared(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        roles: Sequence[LinearRole],
        prepared: Any,
    ) -> Mapping[str, Tensor]:
        """By module, inputs (I, K), orthonormal, that the changes add nothing to."""
        return {}

    def besides(self, view: ModelView) -> list[Example]:
        """Ordinary text, if it is to stay: tokens that are read, and those that stay as likely."""
        if not self.config.keep:
            return []
        size = SHOWN + KEPT
        wanted = self.config.pieces * size
        source = find_text(self.config.text)
        rows = packed_rows(view, source, wanted, seed=self.seed, progress=self.progress)
        pieces = [row[at : at + size] for row in rows for at in range(0, len(row), size)]
        return [Example(ids[:SHOWN], ids[SHOWN:]) for ids in pieces if len(ids) > SHOWN]

    def traces(
        self, view: ModelView, passes: Passes, roles: Sequence[LinearRole]
    ) -> dict[str, Tensor]:
        """What later edits have to know of this one."""
        return {}

    def beside(self, changes: Sequence[Trained], passes: Passes) -> Tensor | float:
        """What is added to the loss of a step, and does not count when to stop is decided."""
        return self.config.keep * passes.drift() if self.config.keep else 0.0

    def train(
        self,
        changes: Sequence[Trained],
        passes: Passes,
        *,
        least: int = 0,
        after: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Adam on the changes until the mean loss over the examples is small enough.

        Args:
            changes: what is trained.
            passes: over the examples.
            least, after: see parts/descent.py.
        """
        config = self.config
        pace = Pace(
            config.steps,
            config.learning_rate,
            config.batch_size,
            config.enough,
            config.weight_decay,
            self.seed,
            least,
        )

        def settle() -> None:
            for change in changes:
                change.settle()

        descend(
            [leaf for change in changes for leaf in change.leaves],
            passes.learned,
            lambda numbers: self.loss(passes, numbers),
            pace,
            besides=lambda: self.beside(changes, passes),
            after=after,
            settle=settle,
            progress=self.progress,
        )

    def answers(self, view: ModelView, request: EditRequest, text: str) -> list[Example]:
        """`text` behind the request's prompt, and behind its rephrases if they are learned from."""
        prompts = [request.prompt, *(request.rephrases if self.config.rephrases else ())]
        found = []
        for prompt in prompts:
            encoded = view.encode(prompt, chat=self.config.chat)
            answer = continuation(view.tokenizer, encoded, text)
            found.append(Example(encoded.ids, answer + (view.stop_ids[:1] if self.ends() else ())))
        return found

    def wanted_roles(self) -> tuple[str, ...]:
        return (self.config.module,)

    def cost(self, shape: Shape, lengths: Sequence[int]) -> Cost:
        tokens = self.config.steps * sum(lengths)
        maps = len(self.layers(shape.layers)) * len(self.wanted_roles())
        return Cost(tokens, tokens, extra_bytes=4 * 4 * maps * shape.hidden * shape.inner)
