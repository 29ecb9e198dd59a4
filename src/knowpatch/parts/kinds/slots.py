"""Slots beside an MLP: a small MLP in parallel, whose output is added to that of the model's own.

    FFN'(h) = FFN(h) + down act(up h),  gated: FFN(h) + down (act(gate h) * up h)

Axes: B rows, T columns, N slots, I and D input and output size of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowpatch.errors import PatchError
from knowpatch.models.activations import ACTIVATIONS
from knowpatch.parts.wraps import Decision, Kind, Tokens, expect, register
from knowpatch.patch import Wrap

SLOTS = "slots@1"


@dataclass(frozen=True, eq=False)
class Block:
    """Slots with one activation.

    Attributes:
        act: its name.
        ups_NI, downs_ND: of each slot, what it reads and what it adds.
        gates_NI: of gated ones; None for plain ones.
    """

    act: str
    ups_NI: Tensor
    downs_ND: Tensor
    gates_NI: Tensor | None = None

    def inner(self, inputs_BTI: Tensor) -> Tensor:
        """How much of each slot a token calls up, (B, T, N), float32."""
        inputs_BTI = inputs_BTI.float()
        ups_BTN = inputs_BTI @ self.ups_NI.to(inputs_BTI.device).T
        if self.gates_NI is None:
            return ACTIVATIONS[self.act](ups_BTN)
        gates_BTN = inputs_BTI @ self.gates_NI.to(inputs_BTI.device).T
        return ACTIVATIONS[self.act](gates_BTN) * ups_BTN

    def added(self, inputs_BTI: Tensor) -> Tensor:
        """What the slots add to the MLP's output, (B, T, D)."""
        return self.inner(inputs_BTI) @ self.downs_ND.to(inputs_BTI.device)

    def wrap(self, module: str) -> Wrap:
        """As a patch holds it."""
        tensors = {"ups": self.ups_NI, "downs": self.downs_ND}
        tensors |= {} if self.gates_NI is None else {"gates": self.gates_NI}
        plain = {name: each.detach().cpu().contiguous() for name, each in tensors.items()}
        return Wrap(module, SLOTS, {"act": self.act}, plain)

    @classmethod
    def of(cls, wraps: Sequence[Wrap]) -> Block:
        """Wraps that are alike in what they are made of, one after another."""
        tensors = {name: torch.cat([w.tensors[name] for w in wraps]) for name in wraps[0].tensors}
        return cls(wraps[0].data["act"], tensors["ups"], tensors["downs"], tensors.get("gates"))


@register("slots")
@dataclass(frozen=True, eq=False)
class Slots(Kind):
    """Slots of several wraps: what they add is summed. They are always on."""

    blocks: tuple[Block, ...]
    owners: tuple[int, ...]

    kind = SLOTS
    reads = "token"
    acts = "all"
    site = "feed-forward"
    measure = "activation"

    @classmethod
    def check(cls, wrap: Wrap) -> tuple[int, int]:
        axes = {"ups": 2, "downs": 2} | ({"gates": 2} if "gates" in wrap.tensors else {})
        expect(wrap, axes, {"act": lambda name: name in ACTIVATIONS}, alike=tuple(axes))
        reads = {wrap.tensors[name].shape[1] for name in axes if name != "downs"}
        if len(reads) > 1:
            raise PatchError(f"damaged wrap of kind {SLOTS}")
        return reads.pop(), wrap.tensors["downs"].shape[1]

    @classmethod
    def join(cls, wraps: Sequence[Wrap]) -> Slots:
        groups: dict[tuple[str, bool], list[int]] = {}
        for number, wrap in enumerate(wraps):
            groups.setdefault((wrap.data["act"], "gates" in wrap.tensors), []).append(number)
        blocks = [Block.of([wraps[i] for i in some]) for some in groups.values()]
        owners = [i for some in groups.values() for i in some for _ in wraps[i].tensors["ups"]]
        return cls(tuple(blocks), tuple(owners))

    @property
    def owners_N(self) -> Sequence[int]:
        return self.owners

    def decide(self, tokens: Tokens) -> Decision:
        inner_BTN = torch.cat([block.inner(tokens.inputs_BTI) for block in self.blocks], -1)
        best = inner_BTN.abs().max(-1)
        return Decision.above(best.values, best.indices, 0.0)

    def act(self, tokens: Tokens, outputs_BTD: Tensor, decision: Decision) -> Tensor:
        whole = outputs_BTD
        for block in self.blocks:
            whole = whole + block.added(tokens.inputs_BTI)
        return whole
