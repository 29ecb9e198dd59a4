"""What a restoration is: outputs of a corrupted run that are put to what they were in another run.

Axes: S draws of noise, K noisy tokens, N rows (S for each restoration), C columns, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from knowpatch.models.passes import Ids, Shift
from knowpatch.models.roles import Roles

Kind = Literal["state", "mlp", "attn"]
"""What is restored: a block's whole output, or what its MLP or its attention adds to it."""
KINDS: tuple[Kind, ...] = get_args(Kind)
STATE, MLP, ATTENTION = KINDS


def outputs_of(roles: Roles, kind: Kind) -> tuple[str, ...]:
    """Path of the module in each block that puts out `kind`; ModelError if there is none."""
    if kind == STATE:
        return tuple(block.module for block in roles.blocks)
    role = "mlp.out" if kind == MLP else "attn.out"
    return tuple(roles.linear(role, layer).module for layer in range(len(roles.blocks)))


@dataclass(frozen=True)
class Put:
    """What the module at `module` puts out at `position`: what it put out in another run."""

    module: str
    position: int
    source: Literal["clean", "corrupted"] = "clean"


Restoration = tuple[Put, ...]
Placed = tuple[int, int, Put]
"""The number of a restoration in its batch, the column of a put, and the put."""


@dataclass(frozen=True, eq=False)
class Corrupted:
    """A prompt whose token embeddings from position `first` on are moved, S times in other ways."""

    ids: Ids
    first: int
    noise_SKD: Tensor

    @property
    def draws(self) -> int:
        return len(self.noise_SKD)

    def shift(self, module: str, before: int = 0) -> Shift:
        """The noise on the output of the embedding, in the S rows behind the first `before`."""
        draws, tokens, _ = self.noise_SKD.shape
        places = [(before + s, self.first + k) for s in range(draws) for k in range(tokens)]
        return Shift(module, places, self.noise_SKD.flatten(0, 1))


@dataclass(frozen=True, eq=False)
class Outputs:
    """What modules put out in the clean run (row 0) and in the S corrupted ones, (1 + S, T, D)."""

    by_module: Mapping[str, Tensor]

    def of(self, put: Put) -> Tensor:
        """What a put puts out in each draw, (S, D)."""
        found_BD = self.by_module[put.module][:, put.position]
        return found_BD[1:] if put.source == "corrupted" else found_BD[:1].expand_as(found_BD[1:])

    def put(self, states_NCD: Tensor, placed: Sequence[Placed]) -> Tensor:
        """`states_NCD` with the puts in their places."""
        if not placed:
            return states_NCD
        values_SD = [self.of(put) for _, _, put in placed]
        draws_S = torch.arange(len(values_SD[0]))
        rows = torch.cat([len(draws_S) * number + draws_S for number, _, _ in placed])
        columns = torch.tensor([column for _, column, _ in placed]).repeat_interleave(len(draws_S))
        index = rows.to(states_NCD.device), columns.to(states_NCD.device)
        return states_NCD.index_put(index, torch.cat(values_SD).to(states_NCD.dtype))


def logprobs_of(logits_NV: Tensor, token: int) -> Tensor:
    """log p(token) in each row, (N)."""
    return logits_NV[:, token] - logits_NV.logsumexp(-1)
