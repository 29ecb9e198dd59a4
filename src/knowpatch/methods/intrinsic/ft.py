"""FT: constrained fine-tuning of one matrix.

Objective `masked` is FT-M (arXiv 2401.01286): cross-entropy on the target's tokens behind the
prompt. `last-token` is FT-L (Zhu et al., arXiv 2012.00363, in the form of arXiv 2202.05262): all
target tokens from the one distribution at the prompt's last token, a bag of tokens by definition.
`unlikelihood` unlearns the old answer: mean of -log(1 - p(old token)). A bound keeps each entry
within that distance of where it was. Axes: M predicted tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from knowpatch.deltas import Dense, WeightDelta
from knowpatch.errors import EditError, OptionError, RequestError
from knowpatch.method import Cost, EditMethod, MethodConfig, Shape, register
from knowpatch.models.roles import at_depth
from knowpatch.models.view import ModelView
from knowpatch.parts.spans import continuation
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

DEPTH = 21 / 32
"""The published layer on 32-block models, as a share of the depth."""


class FtConfig(MethodConfig):
    """Options of FT."""

    objective: Literal["masked", "last-token", "unlikelihood"] = Field(
        "masked", description="masked (FT-M), last-token (FT-L), unlikelihood (erase requests)"
    )
    layer: int | None = Field(
        None, ge=0, description="block to edit; by default 21/32 of the depth"
    )
    module: Literal["mlp.out", "mlp.up", "mlp.gate", "attn.out"] = Field(
        "mlp.out", description="which matrix of the block"
    )
    steps: int = Field(40, ge=1, description="passes over the requests, at most")
    learning_rate: float = Field(
        1e-3, gt=0, le=1e30, description="of Adam; published: 5e-4 on 7B models"
    )
    batch_size: int = Field(16, ge=1, description="rows per step")
    bound: float | None = Field(
        None, gt=0, description="largest change of any entry; none: no limit"
    )
    enough: float = Field(1e-2, gt=0, description="stop when the mean loss is below this")
    eos: bool | None = Field(
        None, description="masked: learn to stop after the answer; by default only in a chat"
    )
    rephrases: bool = Field(False, description="learn from the requests' rephrases as well")


@dataclass(frozen=True)
class _Example:
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@register("ft")
class Ft(EditMethod):
    """Trains one matrix on the answer."""

    name = "ft"
    family = "intrinsic"
    paper = "Zhang et al. 2024 (FT-M), arXiv 2401.01286; Zhu et al. 2020 (FT-L), arXiv 2012.00363"
    summary = "fine-tunes one MLP matrix on the answer (FT-M), or with the FT-L objective"
    choose = "the default: nothing to prepare, no subject needed, learns almost any answer"
    roles = ("mlp.out",)
    exports = ("merged", "gguf")
    Config = FtConfig

    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: Any, state: Any
    ) -> Patch:
        examples = [part for request in requests for part in self._examples(view, request)]
        role = view.roles.linear(
            self.config.module, at_depth(DEPTH, len(view.roles.blocks), self.config.layer)
        )
        whole = view.values(role.address.parameter)
        leaf = torch.zeros_like(role.address.narrow(whole), dtype=torch.float32)
        leaf.requires_grad_()
        draft = [WeightDelta(role.address, Dense(leaf))]
        with view.trying(draft):
            self._train(view, leaf, examples)
        change = Dense(leaf.detach().cpu())
        return self.patch(view, requests, deltas=[self.delta(view, role.address, change)])

    def check_requests(self, requests: Sequence[EditRequest]) -> None:
        super().check_requests(requests)
        if self.config.objective == "unlikelihood":
            for request in requests:
                if request.kind != "erase":
                    raise OptionError(
                        f"objective=unlikelihood only erases; {request.prompt!r} is to be learned "
                        "(kind=erase, or objective=masked)"
                    )
                if request.old is None:
                    raise RequestError(
                        f"objective=unlikelihood needs the old answer to {request.prompt!r}"
                    )

    def wanted_roles(self) -> tuple[str, ...]:
        return (self.config.module,)

    def expected(self, request: EditRequest) -> str | None:
        return None if self.config.objective == "unlikelihood" else request.target

    def cost(self, shape: Shape, lengths: Sequence[int]) -> Cost:
        tokens = self.config.steps * sum(lengths)
        return Cost(tokens, tokens, extra_bytes=4 * 4 * shape.hidden * shape.inner)

    def _examples(self, view: ModelView, request: EditRequest) -> list[_Example]:
        text = request.old if self.config.objective == "unlikelihood" else request.target
        prompts = [request.prompt, *(request.rephrases if self.config.rephrases else ())]
        examples = []
        for prompt in prompts:
            encoded = view.encode(prompt, chat=self.config.chat)
            answer = continuation(view.tokenizer, encoded, text or "")
            if self._stops():
                answer += view.stop_ids[:1]
            examples.append(_Example(encoded.ids, answer))
        return examples

    def _stops(self) -> bool:
        """Whether the end is part of the answer: of a turn it is; after a text it costs locality.

        On SmolLM2 one fact learned with an end behind it changed 38 of 101 control prompts,
        without it 7.
        """
        wanted = self.config.chat if self.config.eos is None else self.config.eos
        return bool(self.config.objective == "masked" and wanted)

    def _train(self, view: ModelView, leaf: Tensor, examples: Sequence[_Example]) -> None:
        """Adam on `leaf` until the mean loss over the examples is small enough."""
        config = self.config
        adam = torch.optim.Adam([leaf], lr=config.learning_rate)
        order = random.Random(self.seed)
        for step in range(config.steps):
            self.progress("fine-tuning", step, config.steps)
            shuffled = order.sample(examples, len(examples))
            losses = []
            for start in range(0, len(shuffled), config.batch_size):
                loss = self._loss(view, shuffled[start : start + config.batch_size])
                losses.append(float(loss.detach()))
                if not losses[-1] < float("inf"):
                    raise EditError(
                        f"the loss is not finite at step {step} of {config.steps}: use a smaller "
                        "learning_rate, or load the model in float32"
                    )
                if losses[-1] >= config.enough:
                    (leaf.grad,) = torch.autograd.grad(loss, leaf)
                    adam.step()
                if config.bound is not None:
                    with torch.no_grad():
                        leaf.clamp_(-config.bound, config.bound)
            if sum(losses) / len(losses) < config.enough:
                break
        self.progress("fine-tuning", config.steps, config.steps)

    def _loss(self, view: ModelView, examples: Sequence[_Example]) -> Tensor:
        """The objective, mean over each row's tokens and then over rows."""
        forced = self.config.objective != "last-token"
        rows = [(*e.prompt, *e.answer[:-1]) if forced else e.prompt for e in examples]
        places = [
            (row, len(e.prompt) - 1 + (i if forced else 0))
            for row, e in enumerate(examples)
            for i in range(len(e.answer))
        ]
        labels = torch.tensor([i for e in examples for i in e.answer], device=view.device)
        weights = [1 / (len(e.answer) * len(examples)) for e in examples for _ in e.answer]
        prompts = [len(e.prompt) for e in examples]
        logits_MV = view.run(rows, logits_at=places, grad=True, prompts=prompts).logits_MV
        picked = logits_MV.log_softmax(-1).gather(1, labels[:, None])[:, 0]
        if self.config.objective == "unlikelihood":
            picked = torch.log1p(-picked.exp().clamp(max=1 - 1e-6))
        return -(picked * torch.tensor(weights, device=view.device)).sum()
