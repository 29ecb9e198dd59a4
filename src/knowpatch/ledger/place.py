"""Where a workspace is: the nearest `.knowpatch` folder."""

from __future__ import annotations

from pathlib import Path

from knowpatch.errors import InputError

FOLDER = ".knowpatch"
NOWHERE = "no .knowpatch here or above; run knowpatch init"


def folder_above(start: Path | None = None) -> Path | None:
    """The `.knowpatch` of a folder (by default the current one) or of the nearest one above it."""
    place = (start or Path.cwd()).absolute()
    found = (folder / FOLDER for folder in (place, *place.parents))
    return next((folder for folder in found if folder.is_dir()), None)


def folder_here() -> Path:
    """As `folder_above`; InputError where there is none."""
    if (found := folder_above()) is None:
        raise InputError(NOWHERE)
    return found
