"""Training a few matrices on answers: what the fine-tuning editors share.

Each pass over the examples goes through all of them in shuffled batches (breadth first), so that no
fact is learned to the end before the next one is looked at. Adam moves float32 changes, whatever
precision the model has; only the blocks from the lowest trained one up are computed
(models/above.py). Axes: M predicted tokens, V vocabulary.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from knowpatch.deltas import Dense, WeightDelta
from knowpatch.errors import EditError
from knowpatch.method import Cost, EditMethod, MethodConfig, Shape
from knowpatch.models.above import Above
from knowpatch.models.load import fast_dtype
from knowpatch.models.roles import LinearRole
from knowpatch.models.view import ModelView
from knowpatch.parts.spans import continuation
from knowpatch.parts.text import find_text, packed_rows
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

SHOWN, KEPT = 8, 24
"""Tokens of a piece of ordinary text that are read, and that are to stay as likely as before."""
TOGETHER = 8
"""Pieces of ordinary text that are looked at in one step."""
DEPTH = 21 / 32
"""The published layer on 32-block models, as a share of the depth."""
Module = Literal["mlp.out", "mlp.up", "mlp.gate", "attn.out"]


class TunedConfig(MethodConfig):
    """Options that the fine-tuning editors share."""

    module: Module = Field("mlp.out", description="which matrix of a block")
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
        "model", description="of the passes: bfloat16 where that is fast (auto), or the model's"
    )


@dataclass(frozen=True)
class Example:
    """An answer to learn behind a prompt, as ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def row(self) -> tuple[int, ...]:
        """What is read to predict every token of the answer."""
        return (*self.prompt, *self.answer[:-1])


class Change(Protocol):
    """A change of one matrix while it is trained."""

    @property
    def leaf(self) -> Tensor:
        """What Adam moves."""

    def value(self) -> Tensor:
        """The change itself as the matrix is stored, float32; differentiable."""

    def settle(self) -> None:
        """Called after each step: bring the leaf back to where it may be."""


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
    def leaf(self) -> Tensor:
        return self._leaf

    def value(self) -> Tensor:
        return self._leaf

    def settle(self) -> None:
        if self._low is not None or self._high is not None:
            leaf = self._leaf
            with torch.no_grad():
                leaf.clamp_(self._low, self._high)


class Passes:
    """Passes over examples with matrices as trained so far.

    Args:
        view: the model.
        maps: the trained matrices, with their changes.
        examples: what is learned.
        besides: what is read besides, numbered after them.
        dtype: of the passes; None for the model's own.
    """

    def __init__(
        self,
        view: ModelView,
        maps: Sequence[tuple[LinearRole, Change]],
        examples: Sequence[Example],
        besides: Sequence[Example] = (),
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.examples, self.learned = [*examples, *besides], len(examples)
        self._looked = 0
        self._maps = maps
        self._bases = {
            role.address.parameter: view.values(role.address.parameter).float() for role, _ in maps
        }
        self._device = view.device
        lowest = min(view.roles.block_of(role.module) for role, _ in maps)
        rows, prompts = [e.row for e in self.examples], [len(e.prompt) for e in self.examples]
        self._above = Above(view, lowest, rows, prompts=prompts, dtype=dtype)

    def logits(self, numbers: Sequence[int], *, forced: bool = True) -> Tensor:
        """Logits (M, V) where the answers of these examples are predicted, one after another.

        Args:
            numbers: of the examples.
            forced: each token behind those before it; else all at the prompt's last token.
        """
        return self._logits(numbers, self._weights(), forced=forced)

    def drift(self) -> Tensor:
        """KL(before || now), mean over tokens, on the next few of what is read besides."""
        first = range(self.learned, len(self.examples), TOGETHER)[self._looked]
        numbers = range(first, min(first + TOGETHER, len(self.examples)))
        self._looked = 0 if numbers.stop == len(self.examples) else self._looked + 1
        # Not kept from one round to the next: distributions over the vocabulary are large.
        with torch.no_grad():
            before_MV = self._logits(numbers, {}, forced=True).detach().log_softmax(-1)
        now_MV = self.logits(numbers).log_softmax(-1)
        apart_M: Tensor = (before_MV.exp() * (before_MV - now_MV)).sum(-1)
        return apart_M.mean()

    def _logits(
        self, numbers: Sequence[int], weights: Mapping[str, Tensor], *, forced: bool
    ) -> Tensor:
        places = [
            (row, len(self.examples[number].prompt) - 1 + (i if forced else 0))
            for row, number in enumerate(numbers)
            for i in range(len(self.examples[number].answer))
        ]
        return self._above.run(numbers, weights=weights, logits_at=places).logits_MV

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

    def _weights(self) -> dict[str, Tensor]:
        found = dict(self._bases)
        for role, change in self._maps:
            name = role.address.parameter
            found[name] = WeightDelta(role.address, Dense(change.value())).added_to(found[name])
        return found


class Tuned(EditMethod):
    """Trains one matrix of a block, or of a few."""

    family = "intrinsic"
    roles: ClassVar[tuple[str, ...]] = ("mlp.out",)
    exports = ("merged", "gguf")
    Config: ClassVar[type[TunedConfig]] = TunedConfig

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
        return [view.roles.linear(self.config.module, layer) for layer in layers]

    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: Any, state: Any
    ) -> Patch:
        examples = [part for request in requests for part in self.examples(view, request)]
        roles = self.trained(view, requests)
        maps = [(role, self.change(view, role, prepared, state)) for role in roles]
        dtype = fast_dtype(view.device) if self.config.precision == "auto" else None
        passes = Passes(view, maps, examples, self.besides(view), dtype=dtype)
        self.train([change for _, change in maps], passes)
        deltas = [
            self.delta(view, role.address, Dense(change.value().detach().cpu().contiguous()))
            for role, change in maps
        ]
        return self.patch(view, requests, deltas=deltas, traces=self.traces(view, passes, roles))

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

    def train(self, changes: Sequence[Change], passes: Passes) -> None:
        """Adam on the changes until the mean loss over the examples is small enough."""
        config = self.config
        leaves = [change.leaf for change in changes]
        adam = torch.optim.AdamW(leaves, lr=config.learning_rate, weight_decay=config.weight_decay)
        order = random.Random(self.seed)
        everything = range(passes.learned)
        for step in range(config.steps):
            self.progress("fine-tuning", step, config.steps)
            shuffled = order.sample(everything, len(everything))
            losses = []
            for start in range(0, len(shuffled), config.batch_size):
                loss = self.loss(passes, shuffled[start : start + config.batch_size])
                losses.append(float(loss.detach()))
                if not losses[-1] < float("inf"):
                    raise EditError(
                        f"the loss is not finite at step {step} of {config.steps}: use a smaller "
                        "learning_rate, or load the model in float32"
                    )
                if losses[-1] >= config.enough:
                    if config.keep:
                        loss = loss + config.keep * passes.drift()
                    for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                        leaf.grad = grad
                    adam.step()
                for change in changes:
                    change.settle()
            if sum(losses) / len(losses) < config.enough:
                break
        self.progress("fine-tuning", config.steps, config.steps)

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
        blocks = len(self.layers(shape.layers))
        return Cost(tokens, tokens, extra_bytes=4 * 4 * blocks * shape.hidden * shape.inner)
