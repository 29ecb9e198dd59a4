"""`knowpatch export`: patches as merged weights, an adapter, a GGUF file or text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from knowpatch.cli import screen
from knowpatch.cli.options import (
    Day,
    Device,
    Json,
    Model,
    Patches,
    day_of,
    read_patches,
    workspace_for,
)

if TYPE_CHECKING:
    from knowpatch.export.ship import Shipped
    from knowpatch.export.target import Target
    from knowpatch.patch import Patch

LOST = 1
"""Exit code where an edit is no longer answered."""


def run(
    patch: Patches = None,
    to: Annotated[
        tuple[str, Path] | None,
        typer.Option(
            "--to",
            metavar="TARGET PATH",
            help="merged DIR, peft DIR, gguf FILE, gguf-lora FILE or context FILE (.jsonl: texts "
            "to be retrieved; else a system prompt).",
        ),
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Say what can go where: each method, or the patches.")
    ] = False,
    model: Model = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Largest rank of an adapter; else what it takes."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option("--type", help="Type of the changed tensors of a GGUF: F16, Q8_0, ..."),
    ] = None,
    tied: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A tied parameter that may be changed; repeatable."),
    ] = None,
    on: Day = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what an earlier export wrote there.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Ship patches for use without knowpatch; what was written is loaded back and asked.

    In a workspace, without --patch, its live edits.
    """
    from knowpatch.editing import load
    from knowpatch.errors import InputError
    from knowpatch.export.places import check_place
    from knowpatch.export.ship import pack, target_called

    if table:
        _tell_table(read_patches(patch), as_json=as_json)
        return
    if to is None:
        raise InputError("nothing to do; give --to TARGET PATH, or see: knowpatch export --table")
    name, path = to
    target = target_called(name, {"rank": rank, "type": kind})
    check_place(path, folder=target.folder, force=force)
    workspace, patches = workspace_for(patch, on), read_patches(patch)
    if workspace is not None:
        patches = workspace.patches(workspace.live(day_of(on, "--on")))
        if not patches:
            when = f" on {on}" if on else ""
            raise InputError(
                f"nothing to ship: no edit is live in this workspace{when}; see knowpatch log, or "
                "give --patch FILE"
            )
        model = workspace.model if model is None else model
    if not patches:
        raise InputError("nothing to ship; give at least one --patch FILE")
    target.check(patches)
    with screen.reporting() as report:
        dtype = "stored" if target.stored else "auto"
        edited = load(model, device=device, dtype=dtype, progress=report)
        if workspace is not None:
            workspace.check_model(edited.view.fingerprint)
        packed = pack(edited, patches, target, path, tied=tied or (), force=force, progress=report)
        del edited  # what is loaded back takes its room
        shipped = packed.check(report)
    if as_json:
        screen.print_json(facts(shipped))
    else:
        _show(shipped, target)
    if shipped.parity.lost:
        raise typer.Exit(LOST)


def facts(shipped: Shipped) -> dict[str, Any]:
    """An export as plain data."""
    parity = shipped.parity
    return {
        "to": shipped.to,
        "path": str(shipped.path),
        "bytes": shipped.size,
        "model": shipped.source,
        "patches": list(shipped.patches),
        "notes": list(shipped.notes),
        "parity": {**vars(parity), "lost": list(parity.lost), "exact": parity.exact},
    }


def _show(shipped: Shipped, target: Target) -> None:
    console, parity = screen.out(), shipped.parity
    against = "the patched model" if target.weights else "the model without it"

    def line(name: str, text: str) -> None:
        console.print(f"{name:<9} {escape(text)}", soft_wrap=True)

    line("wrote", f"{shipped.path}  ({screen.human_bytes(shipped.size)}, {shipped.to})")
    line("of", f"{shipped.source} with {', '.join(patch[:12] for patch in shipped.patches)}")
    for note in shipped.notes:
        line("", note)
    line("back", f"loaded by {target.reader}, and asked, beside {against} ({parity.form})")
    line(
        "edits",
        f"{parity.after} of {parity.edits} answered ({against}: {parity.before}); largest logit "
        f"difference {parity.edits_difference:.2g}",
    )
    line(
        "controls",
        f"{parity.moved} of {parity.controls} go on otherwise; largest logit difference "
        f"{parity.controls_difference:.2g}",
    )
    if parity.exact:
        line("", "the same logits, bit for bit")
    for prompt in parity.lost:
        line("lost", prompt)


def _tell_table(patches: Sequence[Patch], *, as_json: bool) -> None:
    from knowpatch.export import table as tables
    from knowpatch.method import METHODS

    if patches:
        rows = [
            (f"{p.id[:12]} ({p.provenance.method})", tables.of_patch(p), tables.reason(p))
            for p in patches
        ]
    else:
        rows = [(name, tables.of_method(METHODS.get(name)), None) for name in METHODS.names()]
    if as_json:
        screen.print_json([{"name": n, "to": how, "reason": why} for n, how, why in rows])
        return
    console = screen.out()
    drawn = Table(box=None, pad_edge=False)
    drawn.add_column("patch" if patches else "method")
    for name in rows[0][1]:
        drawn.add_column(name)
    for name, how, _ in rows:
        drawn.add_row(escape(name), *how.values())
    console.print(drawn)
    for name, _, why in rows:
        if why:
            console.print(f"{name} {why}", markup=False, soft_wrap=True)
    for word in dict.fromkeys(way for _, how, _ in rows for way in how.values()):
        text = f"{word:<10} {tables.MEANING[word]}"
        console.print(text, style="dim", markup=False, soft_wrap=True)
