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
        coarse: whether its numbers are shorter than float32.
    """

    positions: int | None
    window: int | None
    coarse: bool

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype) -> Limits:
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        positions = getattr(config, "max_position_embeddings", None)
        window = getattr(config, "sliding_window", None)
        return cls(
            positions if isinstance(positions, int) and positions > 0 else None,
            window if isinstance(window, int) else None,
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

    def reads_in_pieces(self, longest: int) -> bool:
        """Whether padding between pieces of rows of this length stays out of a sliding window."""
        return self.window is None or 2 * longest < self.window
