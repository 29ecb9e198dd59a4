"""Neurons beside an MLP: each adds its value, as strongly as a token excites its key.

    FFN'(q) = FFN(q) + sum_n v_n relu(k_n q + b_n)

ReLU whatever the model's own activation is: a silent neuron adds exactly nothing.
Axes: B rows, T columns, N neurons, I and D input and output size of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowpatch.parts.wraps import Decision, Kind, Tokens, expect, is_number, register
from knowpatch.patch import Wrap

NEURONS = "neurons@1"


def neurons(
    module: str, keys_NI: Tensor, biases_N: Tensor, values_ND: Tensor, against: int
) -> Wrap:
    """A wrap that adds neurons to an MLP.

    Args:
        module: the MLP.
        keys_NI, biases_N, values_ND: of each.
        against: how many states at a time each was trained to be silent at.
    """
    tensors = {"keys": keys_NI, "biases": biases_N, "values": values_ND}
    return Wrap(module, NEURONS, {"against": against}, tensors)


@register("neurons")
@dataclass(frozen=True, eq=False)
class Neurons(Kind):
    """Neurons of several wraps, one after another: what they add is summed."""

    keys_NI: Tensor
    biases_N: Tensor
    values_ND: Tensor
    owners: tuple[int, ...]

    kind = NEURONS
    reads = "token"
    acts = "all"
    site = "feed-forward"
    measure = "activation"

    @classmethod
    def check(cls, wrap: Wrap) -> tuple[int, int]:
        axes = {"keys": 2, "biases": 1, "values": 2}
        expect(wrap, axes, {"against": is_number}, alike=tuple(axes))
        return wrap.tensors["keys"].shape[1], wrap.tensors["values"].shape[1]

    @classmethod
    def join(cls, wraps: Sequence[Wrap]) -> Neurons:
        keys, biases, values = (
            torch.cat([wrap.tensors[name] for wrap in wraps])
            for name in ("keys", "biases", "values")
        )
        owners = [i for i, wrap in enumerate(wraps) for _ in wrap.tensors["biases"]]
        return cls(keys, biases, values, tuple(owners))

    @property
    def owners_N(self) -> Sequence[int]:
        return self.owners

    def excited(self, inputs_BTI: Tensor) -> Tensor:
        """How strongly each token excites each neuron, (B, T, N), float32."""
        keys_NI, biases_N = (each.to(inputs_BTI.device) for each in (self.keys_NI, self.biases_N))
        return inputs_BTI.float() @ keys_NI.T + biases_N

    def decide(self, tokens: Tokens) -> Decision:
        best = self.excited(tokens.inputs_BTI).max(-1)
        return Decision.above(best.values, best.indices, 0.0)

    def act(self, tokens: Tokens, outputs_BTD: Tensor, decision: Decision) -> Tensor:
        fires_BTN = self.excited(tokens.inputs_BTI).relu()
        return outputs_BTD + fires_BTN @ self.values_ND.to(fires_BTN.device)
