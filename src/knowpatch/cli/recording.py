"""What `knowpatch edit` makes, as the next edit of a workspace."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from knowpatch.cli.options import check_writable
from knowpatch.errors import InputError, OptionError
from knowpatch.ledger import Circumstances, Edit, Note, Workspace, blobs
from knowpatch.ledger.conflicts import conflicts
from knowpatch.ledger.notes import today
from knowpatch.ledger.place import same_model

if TYPE_CHECKING:
    from knowpatch.edited import EditedModel
    from knowpatch.ledger import History
    from knowpatch.ledger.signing import Signer
    from knowpatch.method import EditMethod
    from knowpatch.models.view import ModelView
    from knowpatch.patch import Patch
    from knowpatch.progress import Progress
    from knowpatch.request import EditRequest

Clash = Literal["refuse", "replace", "force"]
ADVICE = "--replace takes it back, --force keeps both"


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
        period: first and last day on which the edit is live.
        clash: what becomes of a live edit that the new one meets.
        signer: signs the patch, if it is to be signed.
        replaced: the live edits that the new one takes the place of.
        run: names the sequence, once it has been begun.
        edits: what was recorded.
    """

    workspace: Workspace
    asked: str | None
    out: Path | None
    sequential: bool
    note: Note
    source: str | None
    period: tuple[date | None, date | None]
    clash: Clash
    signer: Signer | None
    replaced: list[Edit] = field(default_factory=list)
    run: str | None = None
    edits: Sequence[Edit] = ()

    def __post_init__(self) -> None:
        self.over = self.workspace.history.number
        start, end = self.period
        self.day = min(max(today(), start or date.min), end or date.max)

    @property
    def model(self) -> str | None:
        return self.workspace.model if self.asked is None else self.asked

    @property
    def beneath(self) -> list[Edit]:
        """The live edits on top of which the new one is made."""
        return [edit for edit in self.workspace.live(self.day) if edit not in self.replaced]

    def check(self, requests: Sequence[EditRequest], method: EditMethod) -> None:
        if self.sequential and self.out is not None:
            raise OptionError("in a workspace a sequence is recorded: leave --out away")
        check_writable(self.out)
        self.workspace.check_open()
        start, end = self.period
        if start and end and end < start:
            raise InputError(f"--valid-until {end} is before --valid-from {start}")
        if end and self.clash == "replace":
            raise OptionError(
                "with --valid-until the old answer would be gone afterwards: use --force, and the "
                "new edit stands above the old one on its days"
            )
        history = self.workspace.history
        if self.asked is not None and history.fingerprint is None and not self._same_model():
            raise InputError(
                f"this workspace is for {history.model or 'the bundled model'}; "
                "run knowpatch init --model elsewhere for another one"
            )
        self.workspace.check_signer(self.signer)
        self._facts = [request.model_dump(mode="json") for request in requests]
        self._method = method
        self._check_words(history)

    def _same_model(self) -> bool:
        """Whether the model that was asked for is the workspace's, as far as names tell."""
        workspace = self.workspace
        return same_model(self.asked, workspace.history.model, workspace.folder.parent)

    def _check_words(self, history: History) -> None:
        """Refuse, or replace, the live edits that say something of the same."""
        start, end = (None if day is None else day.isoformat() for day in self.period)
        live = [edit for edit in history.live() if edit not in self.replaced]
        met = conflicts(self._facts, live, chat=self._method.config.chat, period=(start, end))
        self._resolve([conflict.edit for conflict in met], [str(conflict) for conflict in met])

    def _resolve(self, met: Sequence[Edit], words: Sequence[str]) -> None:
        if met and self.clash == "refuse":
            more = f" (and {len(met) - 1} more)" if len(met) > 1 else ""
            raise InputError(f"{words[0]}{more}; {ADVICE}; nothing was recorded")
        if self.clash == "replace":
            self.replaced += met

    def standing(self, view: ModelView) -> list[Patch]:
        self.workspace.check_model(view.fingerprint)
        self._dtype = view.form
        return self.workspace.patches(self.beneath)

    def collided(
        self, edited: EditedModel, patches: Sequence[Patch], progress: Progress
    ) -> list[str]:
        """Refuse what would write over a live edit; or the ids of those that it replaces."""
        from knowpatch.ledger.collisions import collisions

        if self.clash == "force":
            return []
        ids = {edit.id: edit for edit in self.beneath}
        live = [(ids[patch.id], patch) for patch in edited.live if patch.id in ids]
        met = collisions(edited, patches, live, progress=progress)
        self._resolve([item.edit for item in met], [str(item) for item in met])
        return [item.edit.id for item in met]

    def turns(self, requests: Sequence[EditRequest], method: EditMethod) -> Path:
        """A folder of its own for each sequence, so that one that was stopped goes on."""
        live = [edit.id for edit in self.beneath]
        made = [method.name, method.config.model_dump(mode="json"), method.seed, live]
        made += [request.model_dump(mode="json") for request in requests]
        self.run = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:32]
        return self.workspace.folder / blobs.WORK / self.run

    def keep(self, patches: Sequence[Patch], measured: Mapping[str, Any]) -> list[Path]:
        made = [self._circumstances(measured, turn) for turn in range(len(patches))]
        start, _ = self.period
        later = start is not None and start > today()
        last = (start - timedelta(days=1)).isoformat() if start and later else ""
        self.edits = self.workspace.record(
            list(zip(patches, made, strict=True)),
            note=self.note,
            reverts=() if later else self.replaced,
            ends={edit.id: last for edit in self.replaced} if later else {},
            check=self._check_since,
            signer=self.signer,
        )
        if self.out is not None:
            patches[0].save(self.out)
        if self.run is not None:
            shutil.rmtree(self.workspace.folder / blobs.WORK / self.run, ignore_errors=True)
        return [blobs.patch_path(self.workspace.folder, patch.id) for patch in patches]

    def _check_since(self, history: History) -> None:
        """Refuse if someone else has recorded the same, or taken back what is replaced, since."""
        if history.number == self.over or self.clash == "force":
            return
        known = len(self.replaced)
        self._check_words(history)
        if self.replaced[known:] or not all(edit.live for edit in self.replaced):
            raise InputError("another edit of the same was recorded meanwhile; see knowpatch log")

    def _circumstances(self, measured: Mapping[str, Any], turn: int) -> Circumstances:
        from knowpatch.method import EditMethod

        taken = measured["took_each"]
        return Circumstances(
            over=self.over,
            on=self.day,
            source=self.source,
            took=taken if self.run is None else [taken[turn]],
            report=measured,
            valid_from=self.period[0],
            valid_until=self.period[1],
            dtype=self._dtype,
            folds=type(self._method).fold is not EditMethod.fold,
            sequence=self.run,
            turn=None if self.run is None else turn,
        )

    # -- telling -----------------------------------------------------------------------------------

    def told(self) -> dict[str, Any]:
        live = [edit.id for edit in self.workspace.live()]
        return {
            "workspace": {
                "folder": str(self.workspace.folder),
                "recorded": [edit.id for edit in self.edits],
                "replaced": [edit.id for edit in self.replaced],
                "live": live,
                "head": self.workspace.history.head,
            }
        }

    @property
    def wrote(self) -> str:
        live = len(self.workspace.live())
        names = _names(self.edits)
        gone = f" in place of {_names(self.replaced)}" if self.replaced else ""
        days = "" if self.day == today() else f"; live on {self.day}"
        return f"recorded {names}{gone} in {self.workspace.folder} ({live} live today{days})"

    def next(self, patches: Sequence[Mapping[str, Any]], *, merges: bool) -> list[str]:
        return ["knowpatch ask PROMPT", f"knowpatch revert {patches[-1]['id'][:12]}"]


def _names(edits: Sequence[Edit]) -> str:
    return ", ".join(edit.short for edit in edits[:4]) + (", ..." if len(edits) > 4 else "")
