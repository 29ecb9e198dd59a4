"""Where `knowpatch edit` keeps what it makes: patch files, or the history of a workspace."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from knowpatch.cli.options import check_text, check_writable
from knowpatch.cli.recording import Clash, InWorkspace
from knowpatch.errors import InputError, OptionError
from knowpatch.ledger import NOWHERE, Note, Workspace

if TYPE_CHECKING:
    from knowpatch.edited import EditedModel
    from knowpatch.ledger.signing import Signer
    from knowpatch.method import EditMethod
    from knowpatch.models.view import ModelView
    from knowpatch.patch import Patch
    from knowpatch.progress import Progress
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

    def standing(self, view: ModelView) -> list[Patch]:
        """The patches on top of which the edit is made."""

    def collided(
        self, edited: EditedModel, patches: Sequence[Patch], progress: Progress
    ) -> list[str]:
        """Refuse patches that write over what stands beneath; or the ids of what they replace."""

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
            check_writable(self.out or Path("patch"))
            return
        folder = self.out or FOLDER
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file; with --sequential name a folder with --out")
        check_writable(folder / "patch" if folder.exists() else folder)

    def standing(self, view: ModelView) -> list[Patch]:
        return []

    def collided(
        self, edited: EditedModel, patches: Sequence[Patch], progress: Progress
    ) -> list[str]:
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
        saves = [f"knowpatch export --to merged DIR {rest}"] if merges else []
        return [f"knowpatch ask PROMPT {rest}", *saves]


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
    signer: Signer | None,
    replace: bool,
    force: bool,
) -> InFiles | InWorkspace:
    """The workspace of the current folder, or files where there is none.

    Args:
        source: where the facts are from; by default the name of `file`, if they are from one.

    Raises:
        InputError: an option that only a workspace can follow, a source that is no text, or a place
        that holds the requests.
    """
    if replace and force:
        raise OptionError("give either --replace or --force")
    if source is not None:
        check_text(source, "source")
    if out and file and out.is_file() and out.samefile(file):
        raise InputError(f"{out}: holds the requests; name another file as --out")
    workspace = Workspace.above()
    if workspace is not None:
        named = source or (file.name if file else None)
        clash: Clash = "replace" if replace else "force" if force else "refuse"
        period = valid_from, valid_until
        return InWorkspace(workspace, model, out, sequential, note, named, period, clash, signer)
    wanted = {
        "--reason": note.reason,
        "--author": note.author,
        "--source": source,
        "--valid-from": valid_from,
        "--valid-until": valid_until,
        "--sign": signer,
        "--replace": replace,
        "--force": force,
    }
    if given := [name for name, value in wanted.items() if value]:
        raise OptionError(f"{given[0]} needs a workspace: {NOWHERE}")
    return InFiles(model, out, sequential)
