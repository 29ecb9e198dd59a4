"""`knowpatch check`: whether an edited model says what a suite wants of it."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from knowpatch.cli import screen
from knowpatch.cli.options import (
    Device,
    Dtype,
    Json,
    Model,
    Patches,
    check_writable,
    read_patches,
)
from knowpatch.cli.verdict import facts, show
from knowpatch.errors import InputError
from knowpatch.files import write_atomically

if TYPE_CHECKING:
    from knowpatch.edited import EditedModel
    from knowpatch.ledger import Workspace
    from knowpatch.patch import Patch
    from knowpatch.progress import Progress

log = logging.getLogger(__name__)

SUITE = Path("suite.yaml")
QUESTIONS = 100
"""General questions that a first suite asks, where their file is at hand."""


def run(
    suite: Annotated[
        Path, typer.Argument(metavar="SUITE", help="A YAML file; see docs/checks.md.")
    ] = SUITE,
    patch: Patches = None,
    make: Annotated[
        bool,
        typer.Option("--make", help="Write a first suite there, of the edits and what lies near."),
    ] = False,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the result as JUnit XML, too.")
    ] = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Check the live edits of a workspace, or patches, against a suite: exit code 0 or 1.

    Every question is asked of the unedited and of the edited model. Another --model than the
    workspace's is checked as it is.
    """
    from knowpatch.checks.suite import read_suite
    from knowpatch.ledger import Workspace

    check_writable(junit, "--junit")
    if junit is not None and junit.exists() and suite.exists() and junit.samefile(suite):
        raise InputError(f"{junit}: is the suite itself; name another file with --junit")
    patches = read_patches(patch)
    workspace = None if patch else Workspace.above()
    if make:
        _make(suite, patches, workspace, model, device=device, dtype=dtype, as_json=as_json)
        return
    wanted, start = read_suite(suite), perf_counter()
    general = wanted.general()
    with screen.reporting() as report:
        edited, patches, workspace = _loaded(patches, workspace, model, device, dtype, report)
        from knowpatch.checks.examine import examine

        verdict = examine(edited, patches, wanted, general, progress=report)
    if junit is not None:
        from knowpatch.checks.junit import junit as xml

        write_atomically(junit, xml(verdict, str(suite), perf_counter() - start))
    source = edited.view.source
    if as_json:
        ids = [one.id for one in patches]
        place = None if workspace is None else str(workspace.folder)
        told = {"suite": str(suite), "model": source, "workspace": place, "patches": ids}
        screen.print_json({**told, **facts(verdict)})
    else:
        console = screen.out()
        with_ = _named(patches, workspace)
        console.print(f"\n[bold]{escape(str(suite))}[/]: {escape(source)}, {with_}\n")
        show(console, verdict)
    raise typer.Exit(0 if verdict.passed else 1)


def _loaded(
    patches: list[Patch],
    workspace: Workspace | None,
    model: str | None,
    device: str,
    dtype: str,
    report: Progress,
) -> tuple[EditedModel, list[Patch], Workspace | None]:
    """The model, and the patches that are checked: those given, else the live ones of the
    workspace, if that is what is checked. Another model is: what an export wrote, say."""
    from knowpatch.editing import load

    name = workspace.model if workspace is not None and model is None else model
    edited = load(name, device=device, dtype=dtype, progress=report)
    if workspace is None:
        return edited, patches, None
    if model is not None and not workspace.is_of(edited.view.fingerprint):
        log.warning("another model than this workspace's: it is checked as it is, without edits")
        return edited, [], None
    live = workspace.live()
    if live:
        workspace.check_model(edited.view.fingerprint)
    return edited, workspace.patches(live), workspace


def _named(patches: Sequence[Patch], workspace: Workspace | None) -> str:
    """What is checked, in words."""
    if workspace is not None:
        return f"{len(patches)} live edit{'s' * (len(patches) != 1)} of this workspace"
    return f"{len(patches)} patch{'es' * (len(patches) != 1)}" if patches else "without patches"


def _make(
    suite: Path,
    patches: list[Patch],
    workspace: Workspace | None,
    model: str | None,
    *,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Write a first suite; one that is there stays as it is."""
    from knowpatch.checks.make import first_suite
    from knowpatch.checks.suite import write_suite
    from knowpatch.data.general import present_general

    if suite.exists():
        raise InputError(f"{suite}: exists already; name another file, or edit that one")
    check_writable(suite, "SUITE")
    with screen.reporting() as report:
        edited, patches, _ = _loaded(patches, workspace, model, device, dtype, report)
        if not patches:
            raise InputError(
                "no edit to make a suite of: edit first, or give patches with --patch FILE"
            )
        asked = QUESTIONS if present_general(None) else None
        made = first_suite(edited, patches, questions=asked, progress=report)
    write_suite(made, suite)
    counts = {"suite": str(suite), "change": len(made.change), "keep": len(made.keep)}
    if as_json:
        screen.print_json(counts)
        return
    screen.say(
        f"{suite}: {counts['change']} question(s) that must change, {counts['keep']} that must not"
        f"{', a perplexity' if asked is None else ', perplexity and multiple-choice'} budget"
    )
    screen.say(f"next    read it, strike out and add; knowpatch check {shlex.quote(str(suite))}")
