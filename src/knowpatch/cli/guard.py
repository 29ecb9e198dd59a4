"""`knowpatch edit --guard`: a suite that decides whether an edit is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from knowpatch.cli.verdict import facts, show

if TYPE_CHECKING:
    from knowpatch.checks.examine import Verdict
    from knowpatch.checks.suite import Suite
    from knowpatch.data.case import Probe
    from knowpatch.edited import EditedModel
    from knowpatch.patch import Patch
    from knowpatch.progress import Progress


@dataclass
class Guard:
    """A suite that an edit has to pass; read before the model is loaded.

    Attributes:
        path: its file.
        suite: what must hold.
        general: the questions of its multiple choice.
        verdict: what came of it.
    """

    path: Path
    suite: Suite
    general: Sequence[Probe]
    verdict: Verdict | None = None

    @classmethod
    def of(cls, path: Path | None) -> Guard | None:
        """The guard that a file holds; OptionError or DataError if it holds none."""
        from knowpatch.checks.suite import read_suite

        if path is None:
            return None
        suite = read_suite(path)
        return cls(path, suite, suite.general())

    def ask(self, edited: EditedModel, patches: Sequence[Patch], report: Progress) -> None:
        """Examine the patches on top of what is live."""
        from knowpatch.checks.examine import examine

        self.verdict = examine(edited, patches, self.suite, self.general, progress=report)

    @property
    def passed(self) -> bool:
        return self.verdict is not None and self.verdict.passed

    def facts(self) -> dict[str, Any]:
        """For the JSON."""
        return {"suite": str(self.path), **({} if self.verdict is None else facts(self.verdict))}

    def show(self, console: Console) -> None:
        """For a person: the whole table where it failed, else a line."""
        if self.verdict is None or self.passed:
            console.print(f"guard   {escape(str(self.path))} passed", soft_wrap=True)
            return
        console.print(f"[bold]{escape(str(self.path))}[/], which guards the edit\n")
        show(console, self.verdict)
        console.print()


def discard(folder: Path, kept: Sequence[Path]) -> None:
    """Remove the patches of a sequence that were not there before, and their folder if that is
    empty then."""
    for path in set(folder.glob("*.safetensors")) - set(kept):
        path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
