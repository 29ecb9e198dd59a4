"""CaliNET: calibration slots beside an MLP, trained on many wordings of the right facts.

Dong et al., "Calibrating Factual Knowledge in Pretrained Language Models" (arXiv 2210.03329). A
small MLP of the model's own kind sits in parallel to one MLP, begins at zero, and is trained on all
requests and their rephrases at once; it is always on. `only_false` leaves out what contrastive
knowledge assessment finds the model to hold already (parts/contrast.py). Different from the
published code: slots begin at exactly zero, and ordinary text can be held as it is (`keep`).
Axes: N slots, I and D input and output size of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field

from knowpatch.errors import EditError
from knowpatch.method import Cost, Shape, register
from knowpatch.models.activations import activation_of
from knowpatch.models.load import fast_dtype
from knowpatch.models.passes import Act, Tap
from knowpatch.models.roles import at_depth
from knowpatch.models.view import ModelView
from knowpatch.parts.contrast import contrast
from knowpatch.parts.descent import Example, Passes
from knowpatch.parts.kinds.slots import Block
from knowpatch.parts.tuned import TrainingConfig, Tuned
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

DEPTH = 28 / 30


class CaliNetConfig(TrainingConfig):
    """Options of CaliNET."""

    layer: int | None = Field(None, ge=0, description="block; by default the last but one")
    slots: int = Field(64, ge=1, description="memory slots; published: 64 for 100 facts")
    learning_rate: float = Field(5e-3, gt=0, le=1e30, description="of Adam; published: 1e-2")
    rephrases: bool = Field(True, description="learn from the requests' rephrases as well")
    keep: float = Field(
        1.0,
        ge=0,
        description="weight of KL(before || now) on ordinary text: slots fire on everything",
    )
    pieces: int = Field(64, ge=1, description="pieces of that text, taken eight at a time")
    eos: bool | None = Field(
        None, description="learn where the answer ends, too; by default only in a chat"
    )
    only_false: bool = Field(False, description="leave out facts that the model holds already")


@register("calinet")
class CaliNet(Tuned):
    """Trains a few slots beside one MLP."""

    name = "calinet"
    family = "merged"
    paper = "Dong et al. 2022, arXiv 2210.03329"
    summary = "a small MLP in parallel to one of the model's, trained on all facts at once"
    choose = "a batch of facts with several wordings each, in a patch that is small"
    roles = ("mlp.out", "whole_mlp")
    exports = ()
    Config = CaliNetConfig

    def layers(self, count: int) -> tuple[int, ...]:
        return (at_depth(DEPTH, count, self.config.layer),)

    def ends(self) -> bool:
        return bool(self.config.chat if self.config.eos is None else self.config.eos)

    def wanted_roles(self) -> tuple[str, ...]:
        return self.roles

    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: Any, state: Any
    ) -> Patch:
        (layer,) = self.layers(len(view.roles.blocks))
        module = view.roles.whole_mlp(layer)
        learned = self._false(view, requests)
        examples = [part for request in learned for part in self.examples(view, request)]
        slots = _Slots(self._begin(view, module, layer, examples))
        act = Act(module, lambda into, out, rows: out + slots.block.added(into))
        dtype = fast_dtype(view.device) if self.config.precision == "auto" else None
        besides = self.besides(view)
        passes = Passes(view, examples, besides, lowest=layer, acts=[act], dtype=dtype)
        self.train([slots], passes)
        return self.patch(view, requests, wraps=[slots.block.wrap(module)])

    def _false(self, view: ModelView, requests: Sequence[EditRequest]) -> list[EditRequest]:
        """The requests to be learned."""
        if not self.config.only_false:
            return list(requests)
        held = contrast(view, requests, chat=self.config.chat)
        found = [request for request, how in zip(requests, held, strict=True) if how < 0]
        if not found:
            raise EditError(
                f"the model holds all {len(requests)} facts already: there is nothing to "
                "calibrate (only_false=false learns them all the same)"
            )
        return found

    def _begin(
        self, view: ModelView, module: str, layer: int, examples: Sequence[Example]
    ) -> Block:
        """Slots that add nothing yet, and that prompts call up by about 1."""
        tap = Tap(module, "input")
        rows = [example.prompt for example in examples[: self.config.batch_size]]
        ends_NI = view.run(rows, taps=[tap]).at(tap, [(i, len(r) - 1) for i, r in enumerate(rows)])
        size = 1 / float(ends_NI.norm(dim=1).mean())
        draw = torch.Generator().manual_seed(self.seed)
        slots, into = self.config.slots, ends_NI.shape[1]
        ups_NI, gates_NI = size * torch.randn(2, slots, into, generator=draw).to(view.device)
        downs_ND = torch.zeros(slots, view.roles.hidden_size, device=view.device)
        gated = view.roles.lacks("mlp.gate") is None
        return Block(activation_of(view.model), ups_NI, downs_ND, gates_NI if gated else None)

    def cost(self, shape: Shape, lengths: Sequence[int]) -> Cost:
        tokens = self.config.steps * sum(lengths)
        return Cost(tokens, tokens, extra_bytes=4 * 4 * 3 * shape.hidden * self.config.slots)


class _Slots:
    """Slots while they are trained."""

    def __init__(self, block: Block) -> None:
        ups_NI = block.ups_NI.clone()
        downs_ND = block.downs_ND.clone()
        ups_NI.requires_grad_()
        downs_ND.requires_grad_()
        gates_NI = None
        if block.gates_NI is not None:
            gates_NI = block.gates_NI.clone()
            gates_NI.requires_grad_()
        self.block = Block(block.act, ups_NI, downs_ND, gates_NI)
        self.leaves = [leaf for leaf in (ups_NI, downs_ND, gates_NI) if leaf is not None]

    def settle(self) -> None:
        """Slots may be anywhere."""
