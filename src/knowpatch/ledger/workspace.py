"""Workspace: a `.knowpatch` folder, what was done in it, and doing the next thing."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowpatch.errors import InputError, OptionError, PatchError
from knowpatch.files import plain_storage_errors, replacing
from knowpatch.ledger import blobs
from knowpatch.ledger.chain import Event, written
from knowpatch.ledger.history import BASE, FORMAT, NOW, Edit, History
from knowpatch.ledger.notes import Circumstances, Note, today
from knowpatch.ledger.place import FOLDER, folder_above, folder_here
from knowpatch.ledger.signing import check_signed
from knowpatch.ledger.store import Store, write_anew

if TYPE_CHECKING:
    from knowpatch.ledger.signing import Signer
    from knowpatch.patch import Patch


class Workspace:
    """A workspace that is there.

    Attributes:
        folder: its `.knowpatch` folder.
        history: what its events say, as last read (`refresh`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.history = History()
        self._store = Store(folder)
        self.refresh()

    @classmethod
    def create(cls, root: Path, *, model: str | None = None, note: Note | None = None) -> Workspace:
        """Make `.knowpatch` in `root`, for a model as `--model` takes it.

        Raises:
            InputError: there is one already, or it cannot be written.
        """
        folder = root / FOLDER
        if folder.exists():
            raise InputError(f"{folder}: exists already; nothing was changed")
        if not root.is_dir():
            what = "is a file; name a folder" if root.exists() else "no such folder; make it first"
            raise InputError(f"{root}: {what}")
        body = {"kind": "init", "format": FORMAT, "model": model, **(note or Note()).facts()}
        with replacing(folder, folder=True) as temporary:
            write_anew(temporary, [written(1, "", body)])
        return cls(folder)

    @classmethod
    def above(cls, start: Path | None = None) -> Workspace | None:
        """The workspace of a folder (by default the current one) or of the nearest one above it."""
        folder = folder_above(start)
        return None if folder is None else cls(folder)

    @classmethod
    def here(cls) -> Workspace:
        """As `above`; InputError where there is none."""
        return cls(folder_here())

    def refresh(self) -> History:
        """Read what other processes have added."""
        with _nothing_collected():
            self._store.refresh()
            return self.history.add(self._store.events[self.history.number :])

    @property
    def events(self) -> Sequence[Event]:
        """All that happened, in order."""
        return self._store.events

    # -- reading -----------------------------------------------------------------------------------

    @property
    def model(self) -> str | None:
        """What the workspace is for, as `--model` takes it: a path below it is seen from it."""
        name = self.history.model
        inside = name is not None and (self.folder.parent / name).exists()
        return str(self.folder.parent / str(name)) if inside else name

    def live(self, on: date | None = None) -> list[Edit]:
        """The edits that are live on a day, by default today, in order."""
        return self.history.live(on or today())

    def patch(self, edit: Edit, *, signed: bool = True) -> Patch:
        """The patch of an edit, checked against what was recorded.

        Args:
            signed: refuse one without a signature, where the workspace demands one.

        Raises:
            DataError: its file is missing, damaged or not signed; PatchError: of a format unknown
            here.
        """
        from knowpatch.patch import Patch

        if signed:
            check_signed(self.folder, edit, self.history.trusted)
        path = blobs.patch_path(self.folder, edit.id)
        blobs.content_of(path, edit.recorded["sha256"])
        return Patch.load(path)

    def patches(self, edits: Sequence[Edit]) -> list[Patch]:
        """Those of several edits; errors as for `patch`."""
        return [self.patch(edit) for edit in edits]

    def report(self, edit: Edit) -> dict[str, Any] | None:
        """What was measured when it was recorded; DataError if that file is damaged."""
        digest = edit.recorded["report"]
        if digest is None:
            return None
        content = blobs.content_of(blobs.report_path(self.folder, digest), digest)
        found: dict[str, Any] = json.loads(content)
        return found

    def probes(self, edit: Edit, report: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
        """The answers before and after that are the edit's own, of its report."""
        turn = edit.recorded["turn"]
        for probe in (report or {}).get("probes", ()):
            if turn is None or probe["request"] in (None, turn):
                yield probe

    # -- writing -----------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[list[Mapping[str, Any]]]:
        """Add events as one step: the block sees the newest history and fills the list.

        No other process writes meanwhile, so keep it short. If the block raises, nothing is added.
        """
        with self._store.writing() as bodies:
            self.history.add(self._store.events[self.history.number :])
            yield bodies
        self.history.add(self._store.events[self.history.number :])

    def record(
        self,
        made: Sequence[tuple[Patch, Circumstances]],
        *,
        note: Note | None = None,
        reverts: Sequence[Edit] = (),
        ends: Mapping[str, str] | None = None,
        check: Callable[[History], None] = lambda history: None,
        signer: Signer | None = None,
    ) -> list[Edit]:
        """Keep patches, and record each as a live edit; all in one step.

        One that was recorded before and taken back since is live again, in its old place.

        Args:
            made: the patches in order, with how each came about.
            note: who and why.
            reverts: edits that are taken back in the same step, which the new ones replace.
            ends: ids of edits that are live for the last time on a day, with that day.
            check: called with the newest history before anything is recorded; may raise.
            signer: signs the patches.

        Raises:
            PatchError: one is live already, or made for another model than the earlier ones.
            InputError: the workspace demands a signature, and the signer's key is not trusted.
        """
        self.check_signer(signer)
        ready = [self._body(patch, circumstances) for patch, circumstances in made]
        if signer is not None:
            for body in ready:
                signer.sign(self.folder, body["patch"], body["sha256"])
        facts = (note or Note()).facts()
        replaced, last = [edit.id for edit in reverts], dict(ends or {})
        with self.writing() as bodies:
            self.check_signer(signer)
            check(self.history)
            for body in ready:
                self.check_model(body["fingerprint"])
                known = self.history.edits.get(body["patch"])
                if known is not None and known.live and known.id not in replaced:
                    raise PatchError(f"edit {known.short} is live already: {known.says}")
                again = {"kind": "apply", "applies": [body["patch"]]}
                again |= {name: body[name] for name in ("valid_from", "valid_until")}
                step = {"reverts": replaced, "ends": last, **facts}
                bodies.append({**(again if known else body), **step})
                replaced, last = [], {}
        return [self.history.edits[patch.id] for patch, _ in made]

    def _body(self, patch: Patch, given: Circumstances) -> dict[str, Any]:
        """An edit's event, its files written before it."""
        content = patch.to_bytes()
        return {
            "kind": "edit",
            "patch": patch.id,
            "sha256": blobs.put(blobs.patch_path(self.folder, patch.id), content),
            "bytes": len(content),
            "rank": patch.rank,
            "weights": sorted({delta.address.parameter for delta in patch.deltas}),
            "parts": _kinds(patch),
            **patch.provenance.model_dump(mode="json"),
            "report": None if given.report is None else self._keep(given.report),
            **given.facts(),
        }

    def _keep(self, report: Mapping[str, Any]) -> str:
        content = json.dumps(report, ensure_ascii=False, allow_nan=False, sort_keys=True).encode()
        digest = hashlib.sha256(content).hexdigest()
        return blobs.put(blobs.report_path(self.folder, digest), content)

    def check_signer(self, signer: Signer | None) -> None:
        """InputError if the workspace demands a signature that this key cannot give."""
        trusted = self.history.trusted
        if trusted and (signer is None or signer.key not in trusted):
            who = "no key was given" if signer is None else f"{signer.key[:16]} is not one of them"
            raise InputError(
                f"this workspace demands signatures by its {len(trusted)} trusted key(s), and "
                f"{who}; sign with --sign FILE"
            )

    def check_open(self) -> None:
        """InputError if nothing can be recorded here, before there is anything to record."""
        if not os.access(self.folder, os.W_OK):
            raise InputError(f"{self.folder}: cannot be written to; nothing can be recorded here")

    def is_of(self, fingerprint: str) -> bool:
        """Whether the workspace's edits, if there are any, are of the model with this one."""
        return self.history.fingerprint in (None, fingerprint)

    def check_model(self, fingerprint: str) -> None:
        """PatchError if the workspace's edits are of a model with another fingerprint."""
        if not self.is_of(fingerprint):
            mine = str(self.history.fingerprint)
            raise PatchError(
                f"this workspace is of the model with fingerprint {mine[:16]}, not "
                f"{fingerprint[:16]}: use its model, or another workspace"
            )

    def move(
        self,
        *,
        applies: Sequence[Edit] = (),
        reverts: Sequence[Edit] = (),
        note: Note | None = None,
        also: Callable[[History], Sequence[Edit]] = lambda history: (),
    ) -> None:
        """Make edits live again and take others back, in one step.

        Args:
            also: called with the newest history; gives what is to be taken back besides. May raise.

        Raises:
            OptionError: one is live already, or is not live.
        """
        with self.writing() as bodies:
            reverts = [*reverts, *also(self.history)]
            for edit in applies:
                check_signed(self.folder, edit, self.history.trusted)
                if edit.live:
                    raise OptionError(f"edit {edit.short} is live already: {edit.says}")
            for edit in reverts:
                if not edit.live:
                    raise OptionError(f"edit {edit.short} is not live: {edit.says}")
            bodies.append(
                {
                    "kind": "apply" if applies else "revert",
                    "applies": [edit.id for edit in applies],
                    "reverts": [edit.id for edit in reverts],
                    "ends": {},
                    **(note or Note()).facts(),
                }
            )

    def tag(self, name: str, at: int, *, note: Note | None = None) -> None:
        """Name a state: that right after event `at`.

        Raises:
            OptionError: the name is taken, or cannot be one.
        """
        plain = name[:1] not in ("", "-") and all(c.isalnum() or c in "._-" for c in name)
        if not plain or name in (NOW, BASE) or not name.isascii():
            raise OptionError(
                f"{name!r} cannot be a tag: use letters, digits and . _ - in it, and no - in front"
            )
        with self.writing() as bodies:
            if name in self.history.tags:
                raise OptionError(f"the tag {name} is there already; choose another name")
            bodies.append({"kind": "tag", "name": name, "at": at, **(note or Note()).facts()})

    def trust(self, keys: Sequence[str], *, note: Note | None = None) -> None:
        """Demand that each live edit is signed by one of these public keys; by none, nothing.

        Raises:
            DataError: a live edit is not signed by any of them.
        """
        with self.writing() as bodies:
            for edit in self.history.live():
                check_signed(self.folder, edit, tuple(keys))
            bodies.append({"kind": "trust", "keys": list(keys), **(note or Note()).facts()})

    # -- sweeping ----------------------------------------------------------------------------------

    def sweep(self, *, age: float, remove: bool = True) -> list[tuple[Path, int]]:
        """Remove the files that no event names and no one has touched for `age` seconds.

        Returns:
            What was removed (or would be), with its size in bytes.
        """

        def gone() -> list[tuple[Path, int]]:
            edits = self.history.edits.values()
            known = {stem for edit in edits for stem in blobs.stems(edit.recorded)}
            return list(blobs.strays(self.folder, known, age=age))

        if not remove:
            return gone()
        with self.writing():  # no event comes meanwhile
            found = gone()
            for path, _ in found:
                with plain_storage_errors(path):
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return found


def _kinds(patch: Patch) -> list[str]:
    """What a patch holds beside weights: the kinds of its rule, procedure and wraps."""
    parts = (patch.rule, patch.procedure, *patch.wraps)
    return sorted({part.kind for part in parts if part is not None})


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Without Python's search for cycles: of ten thousand new events none is garbage, and walking
    them again and again would take as long as reading them."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
