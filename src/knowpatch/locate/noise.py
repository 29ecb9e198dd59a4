"""Noise on a subject's embeddings, by which a prompt is corrupted (ROME, arXiv 2202.05262).

Each embedding of a subject's token gets scale * sigma * eps, eps ~ N(0, 1), where sigma is the
standard deviation of all entries of the embeddings of ordinary subjects' tokens: one number for a
model, the same for every prompt. Axes: S draws, K tokens of a subject, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knowpatch.models.passes import Tap
from knowpatch.models.view import ModelView
from knowpatch.parts.spans import tokens_of
from knowpatch.probes import subjects

SCALE, DRAWS = 3.0, 10
"""As published."""


@dataclass(frozen=True)
class Noise:
    """Gaussian noise.

    Attributes:
        sigma: standard deviation of embeddings' entries; scale: what it is multiplied by.
        draws: S, corrupted runs of a prompt.
        seed: of the draws, which are the same for every restoration and every prompt of a length.
    """

    sigma: float
    scale: float = SCALE
    draws: int = DRAWS
    seed: int = 0

    @classmethod
    def of(
        cls, view: ModelView, *, scale: float = SCALE, draws: int = DRAWS, seed: int = 0
    ) -> Noise:
        """Noise for a model, by the subjects that ship with the library."""
        return cls(spread(view, subjects()), scale, draws, seed)

    def drawn(self, tokens: int, width: int) -> Tensor:
        """(S, K, D) float32 for so many tokens and so wide embeddings."""
        made = np.random.RandomState(self.seed).standard_normal((self.draws, tokens, width))
        return torch.tensor(self.scale * self.sigma * made, dtype=torch.float32)

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def spread(view: ModelView, texts: Sequence[str]) -> float:
    """Standard deviation of all entries of the embeddings of the texts' own tokens."""
    encoded = [view.encode(text) for text in texts]
    places = [
        (row, i) for row, one in enumerate(encoded) for i in tokens_of(one, (0, len(one.text)))
    ]
    tap = Tap(view.roles.embedding, "output")
    run = view.run([one.ids for one in encoded], taps=[tap])
    return float(run.at(tap, places).double().std(correction=0))
