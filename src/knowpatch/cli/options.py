"""Options that several verbs share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from datetime import date

    from knowpatch.ledger import Note, Workspace
    from knowpatch.ledger.signing import Signer
    from knowpatch.patch import Patch

Model = Annotated[
    str | None,
    typer.Option(help="Hub id, folder or GGUF file; by default the bundled SmolLM2-135M-Instruct."),
]
Method = Annotated[str | None, typer.Option(help="See: knowpatch methods.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="An option of the method; repeatable."),
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything that is sampled.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and do nothing.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or 8bit.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Patches = Annotated[
    list[Path] | None,
    typer.Option("--patch", metavar="FILE", help="A patch, or a folder of them; repeatable."),
]
Reason = Annotated[
    str | None, typer.Option("--reason", "-m", metavar="TEXT", help="Why; it is recorded.")
]
Author = Annotated[
    str | None,
    typer.Option(help="Who; by default KNOWPATCH_AUTHOR, else the name of your account."),
]
Sign = Annotated[
    Path | None, typer.Option(metavar="KEYFILE", help="Sign it with this private key (ed25519).")
]
Day = Annotated[
    str | None, typer.Option("--on", metavar="DATE", help="As on that day (YYYY-MM-DD).")
]


def note_of(author: str | None, reason: str | None) -> Note:
    """Who and why, for the history; InputError if they are empty or cannot be stored."""
    from knowpatch.ledger import Note

    for name, text in (("author", author), ("reason", reason)):
        if text is not None:
            check_text(text, name)
    return Note(author or "", reason)


def check_text(text: str, name: str) -> None:
    """InputError unless it is text that a history can hold: found before the work, not after it."""
    from knowpatch.errors import InputError

    if not text.strip():
        raise InputError(f"the {name} is empty; give one, or leave the option away")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"the {name} is not text in UTF-8; give it in UTF-8") from None


def signer_of(path: Path | None) -> Signer | None:
    """The key to sign with, if one is named; InputError if it is none."""
    from knowpatch.ledger.signing import Signer

    return None if path is None else Signer.load(path)


def day_of(text: str | None, option: str) -> date | None:
    """The day that an option names; InputError if it names none."""
    from datetime import date

    from knowpatch.errors import InputError

    if text is None:
        return None
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise InputError(f"{option} {text!r} is no day; give it as YYYY-MM-DD") from None


def workspace_for(patch: list[Path] | None, on: str | None) -> Workspace | None:
    """The workspace whose live edits are meant; None where patches are named, or there is none."""
    from knowpatch.errors import OptionError
    from knowpatch.ledger import NOWHERE, Workspace

    if patch and on:
        raise OptionError("give either --patch or --on: a patch file has no dates")
    workspace = None if patch else Workspace.above()
    if on and workspace is None:
        raise OptionError(f"--on needs a workspace: {NOWHERE}")
    return workspace


def read_patches(paths: list[Path] | None) -> list[Patch]:
    """The patches of --patch, those of a folder by the names of their files."""
    from knowpatch.errors import PatchError
    from knowpatch.patch import Patch

    found = []
    for path in paths or []:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files:
            raise PatchError(f"{path}: a folder without patches (*.safetensors)")
        found += [Patch.load(file) for file in files]
    return found


def check_writable(out: Path | None, option: str = "--out") -> None:
    """Refuse an output place before the work, not after it.

    Args:
        out: the file; None where none is to be written.
        option: where it was named, for the message.
    """
    from knowpatch.errors import InputError

    if out is None:
        return
    folder = out.absolute().parent
    if out.is_dir():
        raise InputError(f"{out}: is a folder; name a file as {option}")
    if out.exists() and not out.is_file():
        raise InputError(f"{out}: is a device or a pipe; name an ordinary file as {option}")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, not a folder; name another place as {option}")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; make it first, or name another {option}")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder}: cannot be written to; name another place as {option}")
