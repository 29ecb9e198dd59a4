"""Severed tracing: does a restored state act through the MLPs above it, or through attention?

Meng et al. (arXiv 2202.05262): a state at the subject's last token is restored, and the MLPs (or
the attentions) of the layers above put out at that token what they put out in the corrupted run.
What is left of the effect does not pass through them. Where MLP and attention read the same input
(GPT-J), severing one leaves the other untouched within a block. Axes: L layers, S draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from knowpatch.bench.statistics import Resamples, Summary
from knowpatch.locate.averages import Curve, curves, design_of
from knowpatch.locate.facts import Fact
from knowpatch.locate.noise import Noise
from knowpatch.locate.rows import Row
from knowpatch.locate.tracing import Tracing, rounded
from knowpatch.models.restorations import ATTENTION, MLP, Put, Restoration, outputs_of
from knowpatch.models.view import ModelView
from knowpatch.progress import Progress, silent

NOTHING = "nothing"
CUT: tuple[str, ...] = (NOTHING, MLP, ATTENTION)
"""What is severed."""


class Severed(Tracing):
    """A prompt whose states at the subject's last token are restored with something severed."""

    def __init__(self, view: ModelView, fact: Fact, noise: Noise) -> None:
        self._paths = {str(kind): outputs_of(view.roles, kind) for kind in (MLP, ATTENTION)}
        besides = [path for paths in self._paths.values() for path in paths]
        super().__init__(view, fact, noise, besides=besides)

    def severed(self, *, progress: Progress = silent) -> dict[str, Tensor]:
        """For each of CUT the effect of restoring each layer's state, (L, S)."""
        layers = len(self.modules)
        restorations = [self._restoration(cut, layer) for cut in CUT for layer in range(layers)]
        effects_CLS = self.effects(restorations, progress=progress).view(len(CUT), layers, -1)
        return dict(zip(CUT, effects_CLS, strict=True))

    def _restoration(self, cut: str, layer: int) -> Restoration:
        """The state restored at a layer, and what is severed above it."""
        position = self.runs.corruption.subject[1] - 1
        above = () if cut == NOTHING else self._paths[cut][layer + 1 :]
        severed = tuple(Put(path, position, "corrupted") for path in above)
        return (Put(self.modules[layer], position), *severed)

    def facts(self, *, progress: Progress = silent) -> dict[str, Any]:
        """The prompt and the mean effects as plain data."""
        effects = self.severed(progress=progress)
        means = {cut: rounded(effects_LS.mean(-1)) for cut, effects_LS in effects.items()}
        return {**self.runs.about(), "effects": means}


@dataclass(frozen=True, eq=False)
class Shares:
    """Averages over facts.

    Attributes:
        effects: the effect of restoring each layer's state with each of CUT severed.
        lost: what severing takes away at each layer, paired by fact.
        share: of the effect summed over the lower half of the layers, the share that is lost.
    """

    effects: dict[str, Curve]
    lost: dict[str, Curve]
    share: dict[str, Summary | None]


def shares(rows: Sequence[Row]) -> Shares:
    """What passes through MLPs and through attention, over facts."""
    design = design_of(rows)
    effects = [{cut: np.array(row["effects"][cut]) for cut in CUT} for row in rows]
    lost = [{cut: one[NOTHING] - one[cut] for cut in CUT[1:]} for one in effects]
    resamples = Resamples(len(rows), design)
    share: dict[str, Summary | None] = {}
    for cut in CUT[1:]:
        half = len(effects[0][NOTHING]) // 2
        records = [
            {"lost": float(gone[cut][:half].sum()), "whole": float(one[NOTHING][:half].sum())}
            for gone, one in zip(lost, effects, strict=True)
        ]
        share[cut] = resamples.summary(records, lambda means: means["lost"] / means["whole"])
    return Shares(curves(effects, design), curves(lost, design), share)
