"""Where a workspace is: the nearest `.knowpatch` folder."""

from __future__ import annotations

from pathlib import Path

from knowpatch.errors import InputError, ModelError

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


def model_named(model: str | None, root: Path) -> str | None:
    """A model as the workspace in `root` names it: a path below that from there, else whole.

    Raises:
        ModelError: an empty name, or a path that leads nowhere.
    """
    from knowpatch.models.origin import resolve

    if model is None:
        return None
    origin = resolve(model)
    if origin.kind not in ("folder", "gguf"):
        return model
    if not origin.path.exists():
        raise ModelError(f"{model}: no such GGUF file")
    path, base = origin.path.absolute().resolve(), root.absolute().resolve()
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)


def same_model(model: str | None, other: str | None, root: Path) -> bool:
    """Whether `model`, as `--model` takes it, is what the workspace in `root` names `other`."""
    from knowpatch.models.origin import BUNDLED

    names = (model_named(model, root), other)
    one, two = (None if name == BUNDLED else name for name in names)
    return one == two
