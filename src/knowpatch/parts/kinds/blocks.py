"""MELO's blocks: low-rank branches of some maps, of which each prompt is routed to one or none.

Yu et al., MELO (arXiv 2312.11795). A wrap holds one block beside one map, and the keys of the
prompts that it was trained for; what enters another map decides. Keys are folded into clusters in
their order: a key far from all begins one; near one with its label it joins, and moves the centre;
near one with another label it begins one, and the two share the distance between them, so that
points of the older one may be forgotten. A prompt in a cluster is answered by the block of the
nearest point there. Axes: B rows, T columns, N keys, P rank, I and D sizes of the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from knowpatch.errors import PatchError
from knowpatch.parts.memory import MARGIN, SAME, Label
from knowpatch.parts.readings import mean_behind_first
from knowpatch.parts.wraps import Decision, Kind, Tokens, expect, is_labels, register
from knowpatch.patch import Wrap

BLOCKS = "blocks@1"


def directions(inputs_BI: Tensor, background_I: Tensor) -> Tensor:
    """Where mean inputs lie, seen from the background: unit vectors."""
    return torch.nn.functional.normalize(inputs_BI - background_I, dim=1)


def gaps(queries_QI: Tensor, keys_NI: Tensor) -> Tensor:
    """Distances (Q, N), never through a matrix product: a row's do not depend on its neighbours."""
    return torch.cdist(queries_QI, keys_NI, compute_mode="donot_use_mm_for_euclid_dist")


@dataclass
class Cluster:
    """centre_I and radius of a ball, what is said in it, and the numbers of its keys."""

    centre_I: Tensor
    radius: float
    label: Label
    points: list[int] = field(default_factory=list)


def clustered(keys_NI: Tensor, radii: Sequence[float], labels: Sequence[Label]) -> list[Cluster]:
    """The clusters of keys that come in this order, each with a radius of its own to begin with."""
    found: list[Cluster] = []
    for number, (key_I, radius, label) in enumerate(zip(keys_NI, radii, labels, strict=True)):
        new = Cluster(key_I, radius, label, [number])
        centres_CI = torch.stack([each.centre_I for each in (*found, new)])
        least = (centres_CI[:-1] - key_I).norm(dim=1).min(dim=0) if found else None
        if least is None or float(least.values) > found[int(least.indices)].radius + radius:
            found.append(new)
            continue
        near, gap = int(least.indices), float(least.values)
        old = found[near]
        if old.label == label:
            points = [*old.points, number]
            centre_I = keys_NI[points].mean(0)
            reach = float((keys_NI[points] - centre_I).norm(dim=1).max()) * (1 + MARGIN)
            found[near] = Cluster(centre_I, max(reach, radius), label, points)
        elif gap <= SAME * radius:  # the same prompt, edited again
            found[near] = new
        else:
            old.radius, new.radius = gap / 2 - MARGIN, gap / 2 + MARGIN
            inside = (keys_NI[old.points] - old.centre_I).norm(dim=1) <= old.radius
            old.points = [n for n, stays in zip(old.points, inside.tolist(), strict=True) if stays]
            found.append(new)
    return found


def blocks(
    module: str,
    source: str,
    keys: tuple[Tensor, float, Sequence[Label]],
    background_I: Tensor,
    block: tuple[Tensor, Tensor],
) -> Wrap:
    """A wrap with one block beside `module`.

    Args:
        source: the module whose inputs decide.
        keys: directions (N, J) of prompts, the radius they begin with, and what is said to each.
        background_I: what directions are seen from.
        block: factors (I, P) and (P, D).
    """
    keys_NJ, radius, labels = keys
    return Wrap(
        module=module,
        kind=BLOCKS,
        data={"source": source, "labels": [list(label) for label in labels]},
        tensors={
            "keys": keys_NJ,
            "radii": torch.full((len(keys_NJ),), radius),
            "background": background_I,
            "into": block[0],
            "out": block[1],
        },
    )


@register("blocks")
@dataclass(frozen=True, eq=False)
class Blocks(Kind):
    """The blocks, the keys' clusters, and whose each key is."""

    blocks: tuple[tuple[Tensor, Tensor], ...]
    backgrounds: tuple[Tensor, ...]
    keys_NI: Tensor
    clusters: tuple[Cluster, ...]
    owners: tuple[int, ...]

    kind = BLOCKS
    reads = "prompt"
    acts = "all"
    measure = "distance"

    @classmethod
    def check(cls, wrap: Wrap) -> tuple[int, int]:
        count = len(wrap.tensors.get("keys", ()))
        expect(
            wrap,
            {"keys": 2, "radii": 1, "background": 1, "into": 2, "out": 2},
            {
                "source": lambda value: isinstance(value, str),
                "labels": lambda value: is_labels(value) and len(value) == count,
            },
            alike=("keys", "radii"),
        )
        into_IP, out_PD = wrap.tensors["into"], wrap.tensors["out"]
        whole = wrap.tensors["keys"].shape[1] == len(wrap.tensors["background"])
        if not whole or into_IP.shape[1] != len(out_PD):
            raise PatchError(f"damaged wrap of kind {wrap.kind}")
        return into_IP.shape[0], out_PD.shape[1]

    @classmethod
    def source(cls, wrap: Wrap) -> str:
        return str(wrap.data["source"])

    @classmethod
    def join(cls, wraps: Sequence[Wrap]) -> Blocks:
        keys_NI = torch.cat([wrap.tensors["keys"] for wrap in wraps])
        radii = torch.cat([wrap.tensors["radii"] for wrap in wraps]).tolist()
        labels = [tuple(label) for wrap in wraps for label in wrap.data["labels"]]
        return cls(
            tuple((wrap.tensors["into"], wrap.tensors["out"]) for wrap in wraps),
            tuple(wrap.tensors["background"] for wrap in wraps),
            keys_NI,
            tuple(clustered(keys_NI, radii, labels)),
            tuple(n for n, wrap in enumerate(wraps) for _ in wrap.tensors["keys"]),
        )

    @property
    def owners_N(self) -> Sequence[int]:
        return self.owners

    def decide(self, tokens: Tokens) -> Decision:
        inputs_BI = mean_behind_first(tokens)
        # Directions are those that the newest block's prompts were seen in.
        queries_BI = directions(inputs_BI, self.backgrounds[-1].to(inputs_BI.device))
        centres_CI = torch.stack([each.centre_I for each in self.clusters]).to(inputs_BI.device)
        radii_C = torch.tensor([each.radius for each in self.clusters], device=inputs_BI.device)
        scores_B, cluster_B = gaps(queries_BI, centres_CI).min(dim=1)
        limits_B = radii_C[cluster_B]
        gaps_BN = gaps(queries_BI, self.keys_NI.to(inputs_BI.device))
        nearest_B = gaps_BN.argmin(1)
        entries_B = torch.full_like(nearest_B, -1)
        for row, number in enumerate(cluster_B.tolist()):
            points = self.clusters[number].points
            if points:
                nearest_B[row] = points[int(gaps_BN[row, points].argmin())]
                entries_B[row] = nearest_B[row] if scores_B[row] <= limits_B[row] else -1
        return Decision(entries_B, scores_B, limits_B, nearest_B)

    def act(self, tokens: Tokens, outputs_BTD: Tensor, decision: Decision) -> Tensor:
        owner_B = [self.owners[n] if n >= 0 else -1 for n in decision.entries.tolist()]
        for owner in sorted({*owner_B} - {-1}):
            rows = torch.tensor([n for n, one in enumerate(owner_B) if one == owner])
            rows = rows.to(outputs_BTD.device)
            into_IP, out_PD = (factor.to(rows.device) for factor in self.blocks[owner])
            added_BTD = tokens.inputs_BTI[rows].float() @ into_IP @ out_PD
            outputs = outputs_BTD[rows] + added_BTD.to(outputs_BTD.dtype)
            outputs_BTD = outputs_BTD.index_put((rows,), outputs)
        return outputs_BTD
