"""Patch neurons in training: keys that fire on one state each and are silent on others.

Huang et al., "Transformer-Patcher" (arXiv 2301.09785), sections 3.2 and 3.3. A neuron is made for
the state q at which a token is predicted wrongly; it begins with the key q / |q|^2, so that q
excites it by 1. States are taken relative to the memory of ordinary ones (their mean, and the
spread of each channel), so that a few large channels do not decide and all rates are relative.
Axes: N neurons, M states that should leave them silent, I size of a state, D of a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BETA, GAMMA = -3.0, 3.0
"""How silent ordinary states are to leave a neuron; and by how much its own state leads them."""
FIRM = 0.5
"""By how much its own state always excites a neuron, whatever the memory asks for: one that is off
there would learn nothing more."""
LARGEST = 20.0
"""The highest exponent: above it float32 soon overflows."""


def first_key(query_I: Tensor) -> Tensor:
    """The key that `query_I` excites by 1, and a state at a right angle to it by 0."""
    return query_I / query_I.square().sum(-1, keepdim=True).clamp(min=1e-12)


def exponential(exponent: Tensor) -> Tensor:
    return exponent.clamp(max=LARGEST).exp()


def activation_loss(own_N: Tensor, margin: float = 0.0) -> Tensor:
    """Large where a neuron is not excited by its own state, one for each neuron (N)."""
    return exponential(margin - own_N)


def memory_losses(
    own_N: Tensor, others_NM: Tensor, most: int, beta: float = BETA, gamma: float = GAMMA
) -> tuple[Tensor, Tensor]:
    """Silence and separation (N each), over the `most` states that excite a neuron most.

    Args:
        own_N: by how much its own state excites each neuron.
        others_NM: by how much others do; -inf for a state that it may answer to.
        most: at most so many count, all where there are fewer.
        beta, gamma: see `BETA`.
    """
    top_NM = others_NM.topk(min(most, others_NM.shape[1]), dim=1).values
    silence_N = exponential(top_NM - beta).mean(1)
    return silence_N, exponential(top_NM - own_N[:, None] + gamma).mean(1)


@dataclass(frozen=True, eq=False)
class Scale:
    """What ordinary states are like: mean and spread of each channel."""

    mean_I: Tensor
    spread_I: Tensor

    @classmethod
    def of(cls, states_MI: Tensor) -> Scale:
        spread_I = states_MI.std(0)
        return cls(states_MI.mean(0), spread_I.clamp(min=1e-3 * float(spread_I.max())))

    def relative(self, states: Tensor) -> Tensor:
        """States (..., I) relative to ordinary ones."""
        mean_I, spread_I = self.mean_I.to(states.device), self.spread_I.to(states.device)
        return (states.float() - mean_I) / spread_I


class Cluster:
    """The neurons of one request: what Adam moves.

    Keys are trained in units of 1 / I, values in units of what the MLP puts out, so that one rate
    is right for both.

    Args:
        queries_NI: the states that they are for, relative.
        unit: of values.
        rate: of Adam.
    """

    def __init__(self, queries_NI: Tensor, out: int, unit: float, rate: float) -> None:
        self.queries_NI, self.unit = queries_NI, unit
        keys_NI = (first_key(queries_NI) * queries_NI.shape[1]).clone()
        biases_N = torch.zeros(len(queries_NI), device=queries_NI.device)
        values_ND = torch.zeros(len(queries_NI), out, device=queries_NI.device)
        keys_NI.requires_grad_()
        biases_N.requires_grad_()
        values_ND.requires_grad_()
        self._keys_NI, self._biases_N, self._values_ND = keys_NI, biases_N, values_ND
        self._adam = torch.optim.Adam([keys_NI, biases_N, values_ND], lr=rate)

    @property
    def keys_NI(self) -> Tensor:
        """For relative states."""
        return self._keys_NI / self._keys_NI.shape[1]

    @property
    def biases_N(self) -> Tensor:
        return self._biases_N.maximum(FIRM - (self.keys_NI * self.queries_NI).sum(1))

    @property
    def own_N(self) -> Tensor:
        """By how much its own state excites each neuron."""
        return (self.keys_NI * self.queries_NI).sum(1) + self.biases_N

    @property
    def values_ND(self) -> Tensor:
        return self._values_ND * self.unit

    @property
    def leaves(self) -> list[Tensor]:
        return [self._keys_NI, self._biases_N, self._values_ND]

    def excited(self, states_MI: Tensor) -> Tensor:
        """By how much relative states excite each neuron, (N, M)."""
        return self.keys_NI @ states_MI.T + self.biases_N[:, None]

    def step(self, grads: Sequence[Tensor | None], clip: float) -> None:
        """One step of Adam, with the gradients' common norm at most `clip`; without a gradient a
        leaf stays."""
        norm = torch.stack([grad.norm() for grad in grads if grad is not None]).norm()
        share = float((clip / norm.clamp(min=1e-12)).clamp(max=1.0))
        for leaf, grad in zip(self.leaves, grads, strict=True):
            leaf.grad = None if grad is None else grad * share
        self._adam.step()

    def settled(self, scale: Scale) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, biases and values for states as they are."""
        keys_NI = (self.keys_NI / scale.spread_I.to(self.queries_NI.device)).detach()
        biases_N = self.biases_N.detach() - keys_NI @ scale.mean_I.to(keys_NI.device)
        return keys_NI.cpu().contiguous(), biases_N.cpu(), self.values_ND.detach().cpu()
