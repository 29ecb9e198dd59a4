"""Run the command line inside the test process, as a shell would see it."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny

from knowpatch.cli import main

TARGET = tiny.EDITS["The capital of France is"]
FRANCE = ("edit", "The capital of France is", "--subject", "France", "--target", TARGET)
"""An edit that a tiny model can learn; its target is one token."""


@dataclass(frozen=True)
class Result:
    """What a shell sees of one command: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Standard output as strict JSON: NaN and Infinity are no JSON."""
        return json.loads(self.out, parse_constant=_no_json)

    @property
    def complaints(self) -> list[str]:
        """The lines of standard error that are neither progress nor a warning."""
        lines = [line.strip() for line in self.err.splitlines()]
        return [line for line in lines if line and not line.endswith(" ...") and not _warns(line)]


def _no_json(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


def _warns(line: str) -> bool:
    return line.lower().startswith("warning:")


def run(*arguments: object, cwd: Path) -> Result:
    """`knowpatch ARGUMENTS` in the folder `cwd`; an unexpected exception is the test's failure."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def files(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too, with its content."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def refuse(*arguments: object, cwd: Path) -> str:
    """The one line with which a command is refused: exit code 2 and no file made or changed."""
    before = files(cwd)
    result = run(*arguments, cwd=cwd)
    assert result.code == 2, result
    assert not result.out
    assert len(result.complaints) == 1, result.err
    (line,) = result.complaints
    assert line.startswith("knowpatch: ")
    assert files(cwd) == before
    return line.removeprefix("knowpatch: ")
