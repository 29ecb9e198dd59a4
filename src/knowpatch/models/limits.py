"""What a model's config and dtype allow: how long a text may be, how far attention sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from knowpatch.errors import RequestError


@dataclass(frozen=True)
class Limits:
    """Limits of one model.

    Attributes:
        positions: tokens of a text at most; None where the config does not say.
        window: tokens that the narrowest attention sees; None where all see everything.
        steady: tokens up to which a position does not depend on the text's length; None for all.
        coarse: whether its numbers are shorter than float32.
    """

    positions: int | None
    window: int | None
    steady: int | None
    coarse: bool

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype) -> Limits:
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        positions = getattr(config, "max_position_embeddings", None)
        window = getattr(config, "sliding_window", None)
        rope = getattr(config, "rope_parameters", None) or {}
        changing = isinstance(rope, dict) and rope.get("rope_type") in ("longrope", "dynamic")
        original = rope.get("original_max_position_embeddings") if changing else None
        original = original or getattr(config, "original_max_position_embeddings", None) or 0
        return cls(
            positions if isinstance(positions, int) and positions > 0 else None,
            window if isinstance(window, int) else None,
            int(original) if changing else None,
            dtype != torch.float32,
        )

    def check(self, length: int, source: str) -> None:
        """RequestError for more tokens than there are positions: the text never fits."""
        if self.positions is not None and length > self.positions:
            raise RequestError(
                f"{length} tokens are more than {source} has positions for ({self.positions}): "
                "use a shorter text or a shorter answer"
            )

    def slack(self, float32: float) -> float:
        """A tolerance for the model's numbers, from one for float32."""
        return 100 * float32 if self.coarse else float32

    def reads_in_pieces(self, longest: int, pieces: int) -> bool:
        """Whether rows of this length may be read in so many pieces, each padded.

        The padding would count in a sliding window.
        """
        steady = self.steady is None or longest <= self.steady
        return steady and (self.window is None or pieces * longest < self.window)
