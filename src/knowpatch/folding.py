"""The fold: what a parameter becomes under patches, one after the other, in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from knowpatch.deltas import is_finite
from knowpatch.errors import PatchError
from knowpatch.patch import Patch


def touched(patches: Sequence[Patch], canonical: Mapping[str, str]) -> list[str]:
    """The parameters that patches change, each once.

    Args:
        patches: in order.
        canonical: each parameter's name to the first name of the same parameter.
    """
    names = (canonical[d.address.parameter] for patch in patches for d in patch.deltas)
    return list(dict.fromkeys(names))


def folded(
    start: Tensor, patches: Sequence[Patch], name: str, canonical: Mapping[str, str]
) -> Tensor:
    """The parameter `name` under patches, float32, from `start` on; arguments as in `touched`.

    Raises:
        PatchError: the result is not finite.
    """
    wide = start.float()
    for patch in patches:
        for delta in patch.deltas:
            if canonical[delta.address.parameter] == name:
                wide = delta.added_to(wide)
    if not is_finite(wide):
        raise PatchError(f"applying the patch would make {name} not finite")
    return wide
