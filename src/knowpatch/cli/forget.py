"""`knowpatch forget`: a memory of facts without some of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from knowpatch.cli import screen
from knowpatch.cli.options import Json, check_writable


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A patch that holds many facts.")],
    ids: Annotated[
        list[str],
        typer.Argument(metavar="ID", help="What goes: ids of requests; of those without, prompts."),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The new patch file.")],
    as_json: Json = False,
) -> None:
    """Take single facts out of a memory patch, by id; the others stay bit for bit."""
    from knowpatch.errors import InputError
    from knowpatch.forgetting import called, without
    from knowpatch.patch import Patch

    check_writable(out)
    patch = Patch.load(file)
    try:
        left = without(patch, ids)
    except InputError as error:
        raise type(error)(f"{file}: {error}") from None
    left.save(out)
    names = {called(request) for request in left.provenance.requests}
    gone = [r for r in patch.provenance.requests if called(r) not in names]
    facts = {
        "file": str(out),
        "patch": left.id,
        "forgotten": [called(request) for request in gone],
        "left": len(left.provenance.requests),
    }
    if as_json:
        screen.print_json(facts)
        return
    for request in gone:
        screen.out().print(f"forgotten: {escape(request.prompt)} {escape(request.target)}")
    screen.out().print(f"{escape(str(out))}: {left.id[:12]}, {facts['left']} left", soft_wrap=True)
