"""`knowpatch save`: the merged model as a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from knowpatch.cli import screen
from knowpatch.cli.options import Json, Model, Patches, read_patches


def run(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that does not exist yet.")
    ],
    patch: Patches = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Write the model with patches merged into its weights as a safetensors folder."""
    from knowpatch.editing import load
    from knowpatch.errors import InputError

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not an empty folder; name a new one")
    if not patch:
        raise InputError("nothing to merge; give at least one --patch FILE")
    patches = read_patches(patch)
    with screen.reporting() as report:
        edited = load(model, dtype="stored", progress=report)
        for item in patches:
            edited.apply(item)
        written = edited.save(folder, progress=report)
    size = sum(file.stat().st_size for file in written.iterdir())
    ids = [item.id for item in patches]
    if as_json:
        screen.print_json(
            {"folder": str(written), "bytes": size, "model": edited.view.source, "patches": ids}
        )
        return
    screen.out().print(
        f"{written}: {edited.view.source} with {', '.join(i[:12] for i in ids)} merged, "
        f"{screen.human_bytes(size)}; load it with transformers, or: "
        f"knowpatch ask ... --model {written}",
        soft_wrap=True,
    )
