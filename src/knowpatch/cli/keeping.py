"""Where `knowpatch edit` keeps what it makes: patch files, or the history of a workspace."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from knowpatch.cli.options import check_writable
from knowpatch.errors import InputError, OptionError
from knowpatch.ledger import Circumstances, Edit, Note, Workspace, blobs
from knowpatch.ledger.workspace import NOWHERE, today

if TYPE_CHECKING:
    from knowpatch.method import EditMethod
    from knowpatch.patch import Patch
    from knowpatch.request import EditRequest

FOLDER = Path("patches")
"""Where the patches of a sequence go by default."""


class Keeper(Protocol):
    """What becomes of the patches of one edit."""

    @property
    def model(self) -> str | None:
        """What to load."""

    def check(self, requests: Sequence[EditRequest], method: EditMethod) -> None:
        """Refuse, before the work, what could not be kept after it."""

    def standing(self, fingerprint: str) -> list[Patch]:
        """The patches on top of which the edit is made."""

    def turns(self, requests: Sequence[EditRequest], method: EditMethod) -> Path:
        """The folder in which the patches of a sequence are as they come."""

    def keep(self, patches: Sequence[Patch], measured: Mapping[str, Any]) -> list[Path]:
        """Keep them; returns the file of each."""

    def told(self) -> dict[str, Any]:
        """What the JSON says beside."""

    @property
    def wrote(self) -> str:
        """What was written, in words."""

    def next(self, patches: Sequence[Mapping[str, Any]], *, merges: bool) -> list[str]:
        """What one may do next: commands."""


@dataclass
class InFiles:
    """Patch files where the user wants them."""

    model: str | None
    out: Path | None
    sequential: bool

    def check(self, requests: Sequence[EditRequest], method: EditMethod) -> None:
        if not self.sequential:
            check_writable(self.out)
            return
        folder = self.out or FOLDER
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file; with --sequential name a folder with --out")
        check_writable(folder / "patch" if folder.exists() else folder)

    def standing(self, fingerprint: str) -> list[Patch]:
        return []

    def turns(self, requests: Sequence[EditRequest], method: EditMethod) -> Path:
        return self.out or FOLDER

    def keep(self, patches: Sequence[Patch], measured: Mapping[str, Any]) -> list[Path]:
        if self.sequential:  # whose patches are in their files already
            from knowpatch.editing import numbered

            return numbered(self.out or FOLDER, len(patches))
        (patch,) = patches
        return [patch.save(self.out or Path(f"patch-{patch.id[:12]}.safetensors"))]

    def told(self) -> dict[str, Any]:
        return {}

    @property
    def wrote(self) -> str:
        return "nothing but patch files was written"

    def next(self, patches: Sequence[Mapping[str, Any]], *, merges: bool) -> list[str]:
        place = Path(patches[0]["file"])
        rest = f"--patch {shlex.quote(str(place if len(patches) == 1 else place.parent))}"
        rest += "" if self.model is None else f" --model {shlex.quote(self.model)}"
        saves = [f"knowpatch save DIR {rest}"] if merges else []
        return [f"knowpatch ask PROMPT {rest}", *saves]


@dataclass
class InWorkspace:
    """The history of a workspace, on top of what is live in it.

    Attributes:
        workspace: which.
        asked: the model that was asked for, if one was.
        out: where a copy goes, if one is wanted.
        sequential: whether there is a patch for each request.
        note: who and why.
        source: where the facts are from.
        valid_from, valid_until: first and last day on which the edit is live.
        run: names the sequence, once it has been begun.
        edits: what was recorded.
    """

    workspace: Workspace
    asked: str | None
    out: Path | None
    sequential: bool
    note: Note
    source: str | None
    valid_from: date | None
    valid_until: date | None
    run: str | None = None
    edits: Sequence[Edit] = ()

    def __post_init__(self) -> None:
        self.over = self.workspace.history.number
        self.day = max(today(), self.valid_from or date.min)
        self.day = min(self.day, self.valid_until or date.max)

    @property
    def model(self) -> str | None:
        return self.workspace.model if self.asked is None else self.asked

    def check(self, requests: Sequence[EditRequest], method: EditMethod) -> None:
        if self.sequential and self.out is not None:
            raise OptionError("in a workspace a sequence is recorded: leave --out away")
        check_writable(self.out)
        if self.valid_from and self.valid_until and self.valid_until < self.valid_from:
            raise InputError(
                f"--valid-until {self.valid_until} is before --valid-from {self.valid_from}"
            )
        history = self.workspace.history
        if self.asked not in (None, history.model) and history.fingerprint is None:
            raise InputError(
                f"this workspace is for {history.model or 'the bundled model'}; "
                "run knowpatch init --model elsewhere for another one"
            )

    def standing(self, fingerprint: str) -> list[Patch]:
        self.workspace.check_model(fingerprint)
        return self.workspace.patches(self.workspace.live(self.day))

    def turns(self, requests: Sequence[EditRequest], method: EditMethod) -> Path:
        """A folder of its own for each sequence, so that one that was stopped goes on."""
        live = [edit.id for edit in self.workspace.live(self.day)]
        made = [method.name, method.config.model_dump(mode="json"), method.seed, live]
        made += [request.model_dump(mode="json") for request in requests]
        self.run = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:32]
        return self.workspace.folder / blobs.WORK / self.run

    def keep(self, patches: Sequence[Patch], measured: Mapping[str, Any]) -> list[Path]:
        taken, turns = measured["took_each"], range(len(patches))
        made = [
            Circumstances(
                over=self.over,
                on=self.day,
                source=self.source,
                took=taken if self.run is None else [taken[turn]],
                report=measured,
                valid_from=self.valid_from,
                valid_until=self.valid_until,
                sequence=self.run,
                turn=None if self.run is None else turn,
            )
            for turn in turns
        ]
        self.edits = self.workspace.record(list(zip(patches, made, strict=True)), note=self.note)
        if self.out is not None:
            patches[0].save(self.out)
        if self.run is not None:
            shutil.rmtree(self.workspace.folder / blobs.WORK / self.run, ignore_errors=True)
        return [blobs.patch_path(self.workspace.folder, patch.id) for patch in patches]

    def told(self) -> dict[str, Any]:
        live = [edit.id for edit in self.workspace.live()]
        return {
            "workspace": {
                "folder": str(self.workspace.folder),
                "recorded": [edit.id for edit in self.edits],
                "live": live,
                "head": self.workspace.history.head,
            }
        }

    @property
    def wrote(self) -> str:
        live = len(self.workspace.live())
        names = ", ".join(edit.short for edit in self.edits[:4])
        names += ", ..." if len(self.edits) > 4 else ""
        days = "" if self.day == today() else f"; live on {self.day}"
        return f"recorded {names} in {self.workspace.folder} ({live} live today{days})"

    def next(self, patches: Sequence[Mapping[str, Any]], *, merges: bool) -> list[str]:
        return ["knowpatch ask PROMPT", f"knowpatch revert {patches[-1]['id'][:12]}"]


def keeper(
    *,
    model: str | None,
    out: Path | None,
    sequential: bool,
    note: Note,
    source: str | None,
    file: Path | None,
    valid_from: date | None,
    valid_until: date | None,
) -> InFiles | InWorkspace:
    """The workspace of the current folder, or files where there is none.

    Args:
        source: where the facts are from; by default the name of `file`, if they are from one.

    Raises:
        InputError: an option that only a workspace can follow.
    """
    workspace = Workspace.above()
    if workspace is not None:
        named = source or (file.name if file else None)
        return InWorkspace(workspace, model, out, sequential, note, named, valid_from, valid_until)
    wanted = {
        "--reason": note.reason,
        "--author": note.author,
        "--source": source,
        "--valid-from": valid_from,
        "--valid-until": valid_until,
    }
    if given := [name for name, value in wanted.items() if value]:
        raise OptionError(f"{given[0]} needs a workspace: {NOWHERE}")
    return InFiles(model, out, sequential)
