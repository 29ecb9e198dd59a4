"""WISE's side memories: a copy of a map, used where its output differs enough from the map's own.

Wang et al., WISE (arXiv 2405.14768). A copy is held as its difference from the map. Edits that were
trained on the same copy are a shard; a wrap holds its own edit's change of some entries, and which
shard it belongs to. What is used is folded from all wraps: a shard is the sum of its edits; so many
full shards become one memory by TIES, the later ones stand for themselves. For each prompt the
memory counts whose distance exceeds its threshold most, in proportion; a threshold is the least of
those of its edits. Axes: B rows, T columns or tokens, P changed entries, M memories, N edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowpatch.errors import PatchError
from knowpatch.parts.readings import mean_behind_first, prompts_of
from knowpatch.parts.ties import ties
from knowpatch.parts.wraps import Decision, Kind, Tokens, expect, is_number, register
from knowpatch.patch import Wrap

SIDE = "side@1"


@dataclass(frozen=True)
class Sharing:
    """How edits share copies.

    Attributes:
        shard: number of the copy that an edit was trained on.
        full: edits that a copy takes.
        merged: copies that become one memory; 1 for none.
        density: share of each copy's change that is kept when they do.
        threshold: the distance from which on the edit is recognised.
    """

    shard: int
    full: int
    merged: int
    density: float
    threshold: float


def side(
    module: str,
    index_P: Tensor,
    values_P: Tensor,
    keys_NI: Tensor,
    width: int,
    sharing: Sharing,
) -> Wrap:
    """A wrap that changes entries `index_P` of a copy of a map, (I, D) flattened.

    Args:
        keys_NI: mean inputs of the edited prompts, which tell edits of one copy apart for people.
        width: D.
    """
    tensors = {"entries.index": index_P, "values": values_P, "keys": keys_NI}
    return Wrap(module, SIDE, {**vars(sharing), "width": width}, tensors)


def distances(prompts: Sequence[Tensor], side_ID: Tensor) -> Tensor:
    """How far a copy's output is from the map's, mean over each prompt's tokens; differentiable.

    Args:
        prompts: what enters at the tokens of each, (T, I).
    """
    apart_T = (torch.cat(list(prompts)) @ side_ID).norm(dim=1)
    return torch.stack([part.mean() for part in apart_T.split([len(each) for each in prompts])])


def shard_of(wraps: Sequence[Wrap], number: int) -> Tensor | None:
    """What the edits of one shard have changed in its copy together, (I, D)."""
    mine = [wrap for wrap in wraps if wrap.data["shard"] == number]
    if not mine:
        return None
    width = mine[0].data["width"]
    total = torch.zeros(mine[0].tensors["keys"].shape[1] * width)
    for wrap in mine:
        total.index_add_(0, wrap.tensors["entries.index"], wrap.tensors["values"])
    return total.reshape(-1, width)


def next_shard(wraps: Sequence[Wrap], full: int) -> int:
    """The shard that the next edit belongs to."""
    if not wraps:
        return 0
    last: int = max(wrap.data["shard"] for wrap in wraps)
    return last + 1 if _edits(wraps, last) >= full else last


def _edits(wraps: Sequence[Wrap], shard: int) -> int:
    return sum(len(wrap.tensors["keys"]) for wrap in wraps if wrap.data["shard"] == shard)


def memories(wraps: Sequence[Wrap]) -> list[tuple[Tensor, list[int]]]:
    """Each memory's difference from the map (I, D), and the numbers of its shards.

    The last wrap says how many shards are merged, and how.
    """
    last = wraps[-1].data
    shards = sorted({wrap.data["shard"] for wrap in wraps})
    groups: dict[int, list[int]] = {}
    for shard in shards:
        groups.setdefault(shard // last["merged"], []).append(shard)
    found = []
    for group, mine in groups.items():
        ended = (group + 1) * last["merged"] - 1
        whole = shards[-1] > ended or (shards[-1] == ended and _edits(wraps, ended) >= last["full"])
        changes = [change for n in mine if (change := shard_of(wraps, n)) is not None]
        if whole and len(mine) > 1:
            found.append((ties(changes, last["density"]), mine))
        else:
            found += [(change, [shard]) for change, shard in zip(changes, mine, strict=True)]
    return found


@register("side")
@dataclass(frozen=True, eq=False)
class Side(Kind):
    """The memories, the edits' keys, and which memory and wrap each edit is of."""

    sides: tuple[Tensor, ...]
    thresholds_M: Tensor
    keys_NI: Tensor
    memory_N: Tensor
    owners: tuple[int, ...]

    kind = SIDE
    reads = "prompt"
    acts = "all"
    measure = "activation"

    @classmethod
    def check(cls, wrap: Wrap) -> tuple[int, int]:
        def count(least: int) -> object:
            return lambda value: type(value) is int and value >= least

        data = {"shard": count(0), "full": count(1), "merged": count(1), "width": count(1)}
        numbers = {"density": is_number, "threshold": is_number}
        expect(wrap, {"entries.index": 1, "values": 1, "keys": 2}, {**data, **numbers})
        index_P, width = wrap.tensors["entries.index"], wrap.data["width"]
        into = wrap.tensors["keys"].shape[1]
        inside = len(index_P) and 0 <= int(index_P.min()) <= int(index_P.max()) < into * width
        alike = len(index_P) == len(wrap.tensors["values"]) and len(wrap.tensors["keys"])
        if not (inside and alike):
            raise PatchError(f"damaged wrap of kind {wrap.kind}")
        return into, width

    @classmethod
    def join(cls, wraps: Sequence[Wrap]) -> Side:
        found = memories(wraps)
        of = {shard: number for number, (_, shards) in enumerate(found) for shard in shards}
        owners = [n for n, wrap in enumerate(wraps) for _ in wrap.tensors["keys"]]
        limits = [float("inf")] * len(found)
        for wrap in wraps:
            number = of[wrap.data["shard"]]
            limits[number] = min(limits[number], wrap.data["threshold"])
        return cls(
            tuple(change for change, _ in found),
            torch.tensor(limits),
            torch.cat([wrap.tensors["keys"] for wrap in wraps]),
            torch.tensor([of[wraps[n].data["shard"]] for n in owners]),
            tuple(owners),
        )

    @property
    def owners_N(self) -> Sequence[int]:
        return self.owners

    def decide(self, tokens: Tokens) -> Decision:
        device = tokens.inputs_BTI.device
        # Row by row: what a row decides by is the same beside other rows.
        prompts = prompts_of(tokens)
        sides = [each.to(device) for each in self.sides]
        scores_BM = torch.stack(
            [torch.cat([distances([prompt], each) for each in sides]) for prompt in prompts]
        )
        limits_M = self.thresholds_M.to(device)
        best_B = (scores_BM / limits_M).argmax(1)
        scores_B = scores_BM.gather(1, best_B[:, None])[:, 0]
        nearest_B = self._nearest(mean_behind_first(tokens), best_B)
        return Decision.above(scores_B, nearest_B, limits_M[best_B])

    def _nearest(self, inputs_BI: Tensor, memory_B: Tensor) -> Tensor:
        """The edit of each row's memory whose prompt is nearest, of equals the newest."""
        keys_NI, memory_N = self.keys_NI.to(inputs_BI.device), self.memory_N.to(memory_B.device)
        gaps_BN = torch.cdist(inputs_BI, keys_NI, compute_mode="donot_use_mm_for_euclid_dist")
        gaps_BN = torch.where(memory_N == memory_B[:, None], gaps_BN, float("inf"))
        return len(keys_NI) - 1 - gaps_BN.flip(1).argmin(1)

    def act(self, tokens: Tokens, outputs_BTD: Tensor, decision: Decision) -> Tensor:
        entries_B = decision.entries
        memory_B = self.memory_N.to(entries_B.device)[entries_B.clamp(min=0)]
        memory_B = torch.where(entries_B >= 0, memory_B, -1)
        for number in memory_B.unique().tolist():
            if number >= 0:
                rows = (memory_B == number).nonzero()[:, 0]
                added_BTD = tokens.inputs_BTI[rows].float() @ self.sides[number].to(rows.device)
                outputs = outputs_BTD[rows] + added_BTD.to(outputs_BTD.dtype)
                outputs_BTD = outputs_BTD.index_put((rows,), outputs)
        return outputs_BTD
