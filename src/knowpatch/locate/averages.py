"""Effects averaged over facts, with 95 % intervals: first within a fact, then over facts.

Facts are drawn anew (those of one subject together), never tokens. Axes: R replicates, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from knowpatch.bench.statistics import Design, Floats, Resamples, Summary, bootstrap
from knowpatch.locate.overlap import spearman
from knowpatch.locate.rows import Row
from knowpatch.locate.token_roles import TOKEN_ROLES, by_role

Curves = Mapping[str, NDArray[np.float64]]
"""Of one fact: values (L) by name."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Means over facts at each layer, with their intervals (NaN where there is one fact only).

    Attributes:
        n: facts that have it.
        peak: the layer with the largest mean; peak_low, peak_high: 95 % interval of that layer.
    """

    n: int
    mean_L: Floats
    low_L: Floats
    high_L: Floats
    peak: int
    peak_low: int
    peak_high: int

    @classmethod
    def of(cls, replicates_RL: Floats, n: int) -> Curve:
        """From the means over the facts (first line) and over replicates of them."""
        drawn_RL = replicates_RL[1:][np.isfinite(replicates_RL[1:]).all(1)]
        mean_L = replicates_RL[0]
        low_L, high_L = np.percentile(drawn_RL, [2.5, 97.5], axis=0)
        peaks = np.percentile(drawn_RL.argmax(1), [2.5, 97.5], method="nearest")
        one = np.full_like(mean_L, np.nan)
        if n < 2:
            low_L = high_L = one
        return cls(n, mean_L, low_L, high_L, int(mean_L.argmax()), int(peaks[0]), int(peaks[1]))

    def at_peak(self) -> Summary:
        low, high = float(self.low_L[self.peak]), float(self.high_L[self.peak])
        known = self.n > 1
        mean = float(self.mean_L[self.peak])
        return Summary(mean, low if known else None, high if known else None, self.n)

    def facts(self) -> dict[str, Any]:
        known = self.n > 1
        return {
            "n": self.n,
            "mean": digits(self.mean_L),
            "low": digits(self.low_L) if known else None,
            "high": digits(self.high_L) if known else None,
            "peak_layer": self.peak,
            "peak_layer_low": self.peak_low,
            "peak_layer_high": self.peak_high,
        }


def digits(values: Floats) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def design_of(rows: Sequence[Row]) -> Design:
    """Facts of one subject hang together."""
    return Design(groups=tuple(row["subject"] for row in rows))


def curves(facts: Sequence[Curves], design: Design) -> dict[str, Curve]:
    """The mean of each curve over the facts that have it."""
    names = dict.fromkeys(name for fact in facts for name in fact)
    records = [
        {f"{name}\n{i}": float(x) for name in fact for i, x in enumerate(fact[name])}
        for fact in facts
    ]
    [means] = Resamples(len(facts), design).means(records)
    found = {}
    for name in names:
        layers = len(next(fact[name] for fact in facts if name in fact))
        replicates_RL = np.column_stack([means[f"{name}\n{i}"] for i in range(layers)])
        found[name] = Curve.of(replicates_RL, sum(name in fact for fact in facts))
    return found


def role_curves(rows: Sequence[Row]) -> dict[str, Curve]:
    """Effects by token role, in the order of the roles."""
    facts = [by_role(row["effects"], row["subject_tokens"]) for row in rows]
    found = curves(facts, design_of(rows))
    return {role: found[role] for role in TOKEN_ROLES if role in found}


def means(rows: Sequence[Row]) -> dict[str, Summary]:
    """Mean p(answer) in the clean runs and in the corrupted ones, and the total effect."""
    parts = {
        "high": [row["high"] for row in rows],
        "low": [row["low"] for row in rows],
        "total_effect": [row["high"] - row["low"] for row in rows],
    }
    design = design_of(rows)
    found = {
        name: bootstrap([{"value": value} for value in values], design=design)
        for name, values in parts.items()
    }
    return {name: summary for name, summary in found.items() if summary is not None}


def correlation(row: Row, other: Row) -> float:
    """Spearman's rank correlation of two maps of one prompt.

    Where both are zero nothing could be felt (before the subject, and above the last attention):
    these cells are left out.
    """
    one_TL, two_TL = (torch.tensor(each["effects"], dtype=torch.double) for each in (row, other))
    felt_TL = (one_TL != 0) | (two_TL != 0)
    return float(spearman(one_TL[felt_TL][None], two_TL[felt_TL][None]))
