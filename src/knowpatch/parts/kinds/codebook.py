"""GRACE's codebook: a module's output is replaced where its input lies in an entry's ball."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowpatch.parts.memory import Label, Memory, grown
from knowpatch.parts.wraps import Decision, Kind, Tokens, expect, is_labels, register
from knowpatch.patch import Wrap

CODEBOOK = "codebook@1"


def codebook(module: str, entries: Sequence[Memory]) -> Wrap:
    """A wrap that overwrites a module's output where its input is near a key."""
    return Wrap(
        module=module,
        kind=CODEBOOK,
        data={"labels": [list(label) for memory in entries for label in memory.labels]},
        tensors={
            "keys": torch.cat([memory.keys_NI for memory in entries]),
            "values": torch.cat([memory.values_ND for memory in entries]),
            "radii": torch.cat([memory.radii_N for memory in entries]),
        },
    )


@register("codebook")
@dataclass(frozen=True, eq=False)
class Codebook(Kind):
    """An entry whose ball holds what enters at the prompt's last token gives the output there."""

    memory: Memory

    kind = CODEBOOK
    reads = "last"
    acts = "last"
    measure = "distance"

    @classmethod
    def check(cls, wrap: Wrap) -> tuple[int, int]:
        tensors = {"keys": 2, "values": 2, "radii": 1}
        count = len(wrap.tensors.get("keys", ()))
        labels = {"labels": lambda value: is_labels(value) and len(value) == count}
        expect(wrap, tensors, labels, alike=tuple(tensors))
        return wrap.tensors["keys"].shape[1], wrap.tensors["values"].shape[1]

    @classmethod
    def join(cls, wraps: Sequence[Wrap]) -> Codebook:
        return cls(grown([_entries(wrap) for wrap in wraps]))

    @property
    def owners_N(self) -> Sequence[int]:
        return self.memory.owners

    def decide(self, tokens: Tokens) -> Decision:
        memory = self.memory.to(tokens.inputs_BTI.device)
        scores_B, nearest_B = memory.nearest(tokens.last_BI)
        radii_B = memory.radii_N[nearest_B]
        return Decision(
            torch.where(scores_B <= radii_B, nearest_B, -1), scores_B, radii_B, nearest_B
        )

    def act(self, tokens: Tokens, outputs_BTD: Tensor, decision: Decision) -> Tensor:
        values_BD = self.memory.values_ND.to(outputs_BTD)[decision.entries.clamp(min=0)]
        fires_B11 = (decision.entries >= 0)[:, None, None]
        return torch.where(fires_B11, values_BD[:, None], outputs_BTD)


def _entries(wrap: Wrap) -> Memory:
    labels: tuple[Label, ...] = tuple(tuple(label) for label in wrap.data["labels"])
    tensors = wrap.tensors
    return Memory(tensors["keys"], tensors["values"], tensors["radii"], labels)
