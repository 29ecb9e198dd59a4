"""Which blocks to edit: as an option, and as shares of the depth."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator


def _from_text(given: Any) -> Any:
    """4-8 and 4 as well as a list."""
    if isinstance(given, int) and not isinstance(given, bool):
        return (given,)
    if span := re.fullmatch(r"\s*(\d{1,4})\s*-\s*(\d{1,4})\s*", str(given)):
        first, last = map(int, span.groups())
        if first > last:
            raise ValueError("blocks are given from low to high")
        return tuple(range(first, last + 1))
    return given


def _rising(layers: tuple[int, ...]) -> tuple[int, ...]:
    if not layers:
        raise ValueError("names no block")
    if min(layers) < 0 or sorted(set(layers)) != list(layers):
        raise ValueError("blocks are counted from 0 and given from low to high, each once")
    return layers


Layers = Annotated[tuple[int, ...], BeforeValidator(_from_text), AfterValidator(_rising)]
"""Numbers of blocks, from low to high."""


def between(depths: tuple[float, float], count: int) -> tuple[int, ...]:
    """The blocks between two shares of the depth of a model that has `count`, both included."""
    first, last = (min(count - 1, round(share * count)) for share in depths)
    return tuple(range(first, last + 1))
