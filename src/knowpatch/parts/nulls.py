"""The null space of key statistics: the directions in which keys over text have least energy.

Axes: I width of the map's input, J dimensions of the space.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from knowpatch.errors import EditError
from knowpatch.parts.keep import Null, for_gain
from knowpatch.parts.moments import eigen, kept_eigen
from knowpatch.parts.solve import Form, energies
from knowpatch.parts.space import Space
from knowpatch.parts.spread import SpreadConfig

log = logging.getLogger(__name__)


class NullConfig(SpreadConfig):
    """Options of the methods that write into a null space."""

    overruled: ClassVar[Mapping[str, str]] = {"gain": "weight", "null_share": "threshold"}

    null_share: float = Field(
        0.2, gt=0, lt=1, description="share of text's key energy that the null space may hold"
    )
    threshold: float | None = Field(
        None, gt=0, description="instead of null_share: largest eigenvalue in it (published: 0.02)"
    )


def weighed_null(second_II: Tensor, pilots_IN: Tensor, config: NullConfig) -> Null:
    """The null space with the ridge that gives pilot keys (I, N) their gain: AlphaEdit's L2."""
    space = null_space(second_II, config)
    even = Form.even(1.0, space.coordinates)
    found = for_gain(energies(space.inside(pilots_IN), even), config.gain)
    return Null(space, even.scaled(config.weight or found))


def null_space(second_II: Tensor, config: NullConfig, *, keep: bool = True) -> Space:
    """The null space of a second moment of keys (I, I), as the options want it.

    With `keep` its eigenvectors are kept on disk, for the next process.

    Raises:
        EditError: nothing is below the threshold.
    """
    values_I, vectors_II = kept_eigen(second_II) if keep else eigen(second_II)
    largest = config.threshold or below_share(values_I, config.null_share)
    space = Space.below(values_I, vectors_II, largest)
    held = float(values_I[values_I < largest].sum() / values_I.sum())
    if space.width == 0:
        raise EditError(
            "no direction of the key statistics is below the threshold: raise null_share, or "
            "threshold where it is given"
        )
    log.info(
        "null space: %d of %d dimensions, %.2g of the energy", space.width, len(values_I), held
    )
    return space


def below_share(values_I: Tensor, share: float) -> float:
    """The eigenvalue below which the least ones together hold at most `share` of all energy."""
    held_I = values_I.clamp(min=0).cumsum(0)
    count = int((held_I <= share * held_I[-1]).sum())
    return float(values_I[min(count, len(values_I) - 1)])
