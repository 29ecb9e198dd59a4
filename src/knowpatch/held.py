"""Which patches a row of a session carries: given whole, or by the id of one that is held."""

from __future__ import annotations

from collections.abc import Sequence

from knowpatch.errors import OptionError, PatchError
from knowpatch.patch import Patch

Carried = Patch | str | Sequence[Patch | str] | None
"""What one row of a session carries: a patch or its id, several, or nothing."""


def resolved(row: Carried, held: Sequence[Patch], live: Sequence[Patch]) -> tuple[Patch, ...]:
    """The patches of one row.

    Raises:
        OptionError: an unknown id; PatchError: a patch that would act twice.
    """
    items = () if row is None else (row,) if isinstance(row, Patch | str) else row
    found: list[Patch] = []
    for item in items:
        patch = one_of(held, item, "held") if isinstance(item, str) else item
        if patch in live or patch in found:
            where = "already applied" if patch in live else "twice in one row"
            raise PatchError(f"patch {patch.id[:12]} is {where}: it would act twice")
        found.append(patch)
    return tuple(found)


def one_of(patches: Sequence[Patch], patch_id: str, what: str) -> Patch:
    """The one of `patches` whose id begins so; OptionError if there is not just one."""
    found = [patch for patch in patches if patch.id.startswith(patch_id)]
    if len(found) != 1 or not patch_id:
        ids = ", ".join(patch.id[:12] for patch in patches) or "none"
        raise OptionError(f"no single {what} patch has id {patch_id!r}; {what}: {ids}")
    return found[0]
