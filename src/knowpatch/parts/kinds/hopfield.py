"""HoReN's codebook: a value is added at a prompt's end where the prompt as a whole is recognised.

A prompt's query is the mean of what enters the module over the last 60 % of its tokens, centred, on
the unit sphere; so are the keys. One damped step of a Hopfield network moves the query towards the
keys it is near to,

    p = softmax(beta K q),   x = K' p / |K' p|,   q <- normalise((1 - a) q + a x)

and the nearest key to where it arrives answers, if its cosine is above the entry's threshold. The
step looks at the NEAR nearest keys (all others' weights are small), so that its cost, and what it
comes to, do not grow with the memory, and a row's result is its own, bit for bit. Of keys that are
one, another edit of the same prompt, the newest answers. Axes: B rows, N entries, K near ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from knowpatch.errors import PatchError
from knowpatch.parts.nearest import Index
from knowpatch.parts.wraps import Decision, Kind, Tokens, by_tensor, expect, register
from knowpatch.patch import Wrap

HOPFIELD = "hopfield@1"
SHARE = 0.6
"""Of a prompt's tokens, from its end, that its query is the mean of."""
BETA, STEP = 20.0, 0.1
NEAR = 64
SAME = 1e-4
"""Difference of cosines below which two keys are one: another rounding of the same prompt."""


def hopfield(
    module: str, keys_NI: Tensor, values_ND: Tensor, mean_I: Tensor, threshold: float
) -> Wrap:
    """A wrap that adds to a module's output at the end of a prompt that it knows.

    Args:
        module: path of a linear map.
        keys_NI, values_ND: entries, one at least; keys as `query` makes them.
        mean_I: what queries are centred by.
        threshold: cosine above which an entry answers.
    """
    return Wrap(
        module=module,
        kind=HOPFIELD,
        data={},
        tensors={
            "keys": keys_NI.float(),
            "values": values_ND.float(),
            "thresholds": torch.full((len(keys_NI),), threshold),
            "mean": mean_I.float(),
        },
    )


def query(means_BI: Tensor, mean_I: Tensor) -> Tensor:
    """What stands for prompts: the means of their last tokens, centred, on the unit sphere."""
    return normalize(means_BI.float() - mean_I, dim=-1)


def ending(inputs_TI: Tensor) -> Tensor:
    """The mean (I) of what enters over a prompt's last tokens."""
    yes_1T = torch.ones(1, len(inputs_TI), dtype=torch.bool)
    return Tokens(inputs_TI[None], yes_1T.long(), yes_1T, yes_1T).mean_BI(SHARE)[0]


def refined(queries_BI: Tensor, index: Index) -> Tensor:
    """Queries (B, I) after one damped step towards the keys near to each."""
    _, near_BK = index.nearest(queries_BI, NEAR)
    return _drawn(queries_BI, index.keys_NI[near_BK])


def recalled(queries_BI: Tensor, index: Index) -> tuple[Tensor, Tensor]:
    """Cosines (B, K) of the refined queries with the keys near to each, and their numbers."""
    _, near_BK = index.nearest(queries_BI, NEAR)
    keys_BKI = index.keys_NI[near_BK]
    return _products(keys_BKI, _drawn(queries_BI, keys_BKI)), near_BK


def _drawn(queries_BI: Tensor, keys_BKI: Tensor) -> Tensor:
    weights_BK = (BETA * _products(keys_BKI, queries_BI)).softmax(1)
    drawn_BI = normalize((weights_BK[:, :, None] * keys_BKI).sum(1), dim=-1)
    return normalize((1 - STEP) * queries_BI + STEP * drawn_BI, dim=-1)


def _products(keys_BKI: Tensor, queries_BI: Tensor) -> Tensor:
    """Not as a matrix product: a row's numbers must not depend on the rows beside it."""
    return (keys_BKI * queries_BI[:, None]).sum(-1)


@register("hopfield")
class Hopfield(Kind):
    """The entry that the refined query of the whole prompt is nearest to adds at its end."""

    kind = HOPFIELD
    reads = "prompt"
    acts = "last"
    measure = "similarity"

    def __init__(
        self, banks: Sequence[tuple[Index, Tensor]], wraps: Sequence[Wrap], owners: Sequence[int]
    ) -> None:
        self.banks = list(banks)
        self.values_ND = torch.cat([wrap.tensors["values"] for wrap in wraps])
        self.thresholds_N = torch.cat([wrap.tensors["thresholds"] for wrap in wraps])
        self._owners = owners

    @classmethod
    def check(cls, wrap: Wrap) -> tuple[int, int]:
        axes = {"keys": 2, "values": 2, "thresholds": 1, "mean": 1}
        expect(wrap, axes, {}, alike=("keys", "values", "thresholds"))
        into, out = wrap.tensors["keys"].shape[1], wrap.tensors["values"].shape[1]
        if len(wrap.tensors["mean"]) != into:
            raise PatchError(f"damaged wrap of kind {wrap.kind}")
        return into, out

    @classmethod
    def join(cls, wraps: Sequence[Wrap]) -> Hopfield:
        groups = by_tensor(wraps, "mean")
        ordered = [wraps[number] for group in groups for number in group]
        banks = [
            (
                Index(torch.cat([wraps[number].tensors["keys"] for number in group])),
                wraps[group[0]].tensors["mean"],
            )
            for group in groups
        ]
        owners = [n for group in groups for n in group for _ in wraps[n].tensors["keys"]]
        return cls(banks, ordered, owners)

    @property
    def owners_N(self) -> Sequence[int]:
        return self._owners

    def decide(self, tokens: Tokens) -> Decision:
        means_BI = tokens.mean_BI(SHARE)
        self._to(means_BI.device)
        found: list[Tensor] = []
        first = 0
        for index, mean_I in self.banks:
            cosines_BK, near_BK = recalled(query(means_BI, mean_I), index)
            best_B1 = cosines_BK.amax(1, keepdim=True)
            newest_B = torch.where(cosines_BK >= best_B1 - SAME, near_BK, -1).amax(1)
            found.append(torch.stack([best_B1[:, 0].double(), (newest_B + first).double()]))
            first += len(index.keys_NI)
        scores_NB, numbers_NB = torch.stack(found, dim=1)
        best = scores_NB.max(0)
        numbers_B = numbers_NB.gather(0, best.indices[None])[0].long()
        return Decision.above(best.values.float(), numbers_B, self.thresholds_N[numbers_B])

    def act(self, tokens: Tokens, outputs_BTD: Tensor, decision: Decision) -> Tensor:
        values_BD = self.values_ND[decision.entries.clamp(min=0)].to(outputs_BTD)
        fires_B11 = (decision.entries >= 0)[:, None, None]
        return torch.where(fires_B11, outputs_BTD + values_BD[:, None], outputs_BTD)

    def _to(self, device: torch.device) -> None:
        if self.values_ND.device != device:
            self.banks = [(index.to(device), mean_I.to(device)) for index, mean_I in self.banks]
            self.values_ND = self.values_ND.to(device)
            self.thresholds_N = self.thresholds_N.to(device)
