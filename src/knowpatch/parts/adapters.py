"""Low-rank adapters trained on answers: what the adapter methods share.

A change of a map's weight is a product of two narrow matrices, scale * B A, trained by Adam
(parts/tuned.py); while it is trained, the product is added to the weight, so that what is trained
is what merging gives. The patch holds the two factors. There is no dropout: an edit is a handful of
sentences, and the same request has to give the same bytes.
Axes: I and D width of the map's input and output, K rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor

from knowpatch.deltas import LowRank
from knowpatch.models.roles import LinearRole
from knowpatch.parts.depths import Layers, between
from knowpatch.parts.sparing import Sparing, SparingConfig
from knowpatch.parts.tuned import Module, TrainingConfig


def _from_text(given: Any) -> Any:
    """attn.q,attn.v as well as a list."""
    return [name.strip() for name in given.split(",")] if isinstance(given, str) else given


def _each_once(modules: tuple[str, ...]) -> tuple[str, ...]:
    if not modules or len(set(modules)) != len(modules):
        raise ValueError("names one map at least, each once")
    return modules


Modules = Annotated[tuple[Module, ...], BeforeValidator(_from_text), AfterValidator(_each_once)]
"""Linear maps of a block."""


class AdapterConfig(TrainingConfig, SparingConfig):
    """Options that adapters share."""

    modules: Modules = Field(("mlp.out",), description="which maps of a block, as attn.q,attn.v")
    layers: Layers | None = Field(
        None, description="blocks to edit, as 4-8; by default a few early ones"
    )
    alpha: float = Field(32.0, gt=0, description="the change is scaled by alpha / rank")
    eos: bool | None = Field(
        None, description="learn to stop after the answer; by default only in a chat"
    )


class Adapted(Sparing):
    """Trains low-rank changes of maps of some blocks."""

    family = "merged"
    exports = ("merged", "peft", "gguf", "gguf-lora")
    depths: ClassVar[tuple[float, float]]
    """The first and the last block by default, as shares of the depth."""

    def layers(self, count: int) -> tuple[int, ...]:
        chosen: tuple[int, ...] | None = self.config.layers
        return between(self.depths, count) if chosen is None else chosen

    def wanted_roles(self) -> tuple[str, ...]:
        return tuple(self.config.modules)

    def ends(self) -> bool:
        return bool(self.config.chat if self.config.eos is None else self.config.eos)

    def drawn(self, role: LinearRole) -> torch.Generator:
        """Where the first values of one map's adapter come from: the seed, and the map."""
        content = f"{self.seed} {role.address.model_dump_json()}".encode()
        number = int.from_bytes(hashlib.sha256(content).digest()[:7])
        return torch.Generator().manual_seed(number)


def leaf(values: Tensor, device: torch.device) -> Tensor:
    """A copy of these values, to be trained."""
    made = values.to(device).clone()
    made.requires_grad_()
    return made


class Adapter:
    """scale * B A of one map: A drawn uniformly from +-1 / sqrt(I), B from zero.

    Args:
        role: the map.
        like: its weight as stored.
        rank: K; no more than the map has.
        alpha: the scale is alpha / K.
        drawn: where A comes from.
    """

    def __init__(
        self, role: LinearRole, like: Tensor, rank: int, alpha: float, drawn: torch.Generator
    ) -> None:
        out, into = role.oriented(like).shape
        rank = min(rank, out, into)
        down_KI = (2 * torch.rand(rank, into, generator=drawn) - 1) / into**0.5
        self.down_KI = leaf(down_KI, like.device)
        self.up_DK = leaf(torch.zeros(out, rank), like.device)
        self.scale = alpha / rank
        self._role = role

    @property
    def leaves(self) -> Sequence[Tensor]:
        return self.down_KI, self.up_DK

    def delta(self) -> LowRank:
        return self._role.factored(self.scale * self.up_DK, self.down_KI)

    def settle(self) -> None:
        pass
