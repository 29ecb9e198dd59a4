"""The parts that tokens play in a prompt about a subject, by which effects are averaged.

ROME (arXiv 2202.05262), figure 2. Each token plays one part: a subject of one token is all "last";
the token behind the subject that ends the prompt is the prompt's last one; and a subject that ends
the prompt has a last token of its own kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from knowpatch.parts.spans import Span

FIRST, MIDDLE, LAST = "first subject token", "middle subject tokens", "last subject token"
AFTER, FURTHER, END = "first token after", "further tokens", "last token"
ENDING = "last subject token, at the end"
TOKEN_ROLES = (FIRST, MIDDLE, LAST, AFTER, FURTHER, END, ENDING)


def token_roles(subject: Span, tokens: int) -> list[str | None]:
    """The role of each of the prompt's tokens; None for those before the subject."""
    first, stop = subject
    roles: list[str | None] = [None] * first
    roles += [FIRST if i == first else MIDDLE for i in range(first, stop - 1)]
    if stop == tokens:
        return [*roles, ENDING]
    behind = [AFTER if i == stop else FURTHER for i in range(stop, tokens - 1)]
    return [*roles, LAST, *behind, END]


def by_role(effects_TL: ArrayLike, subject: Sequence[int]) -> dict[str, NDArray[np.float64]]:
    """A prompt's mean effects by role (L); tokens of one role within a prompt hang together."""
    values = np.asarray(effects_TL, dtype=float)
    roles = token_roles((subject[0], subject[1]), len(values))
    return {
        role: values[[i for i, mine in enumerate(roles) if mine == role]].mean(0)
        for role in TOKEN_ROLES
        if role in roles
    }
