"""The command line: one file per verb; whatever is slow to import is imported inside the verb.

Exit codes: 0 done, 1 an edit that did not take, a suite that fails or a run in which all failed,
2 input that cannot be used (one line on stderr).
"""

from __future__ import annotations

import io
import logging
import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

from knowpatch import __version__
from knowpatch.cli import (
    apply,
    ask,
    bench,
    check,
    data,
    data_make,
    diff,
    edit,
    evaluate,
    export,
    forget,
    gc,
    health,
    init,
    locate,
    log,
    methods,
    prepare,
    replay,
    revert,
    scan,
    show,
    sign,
    tag,
    trust,
    verify,
)
from knowpatch.errors import KnowpatchError

app = typer.Typer(
    name="knowpatch",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Change what a language model knows, as measured, reversible, shippable patches.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"knowpatch {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Change what a language model knows, as measured, reversible, shippable patches."""


WORKSPACE = (init, log, show, diff, apply, revert, replay, tag, verify, gc, sign, trust, health)
for verb in (edit, ask, check, export, *WORKSPACE, forget, methods, prepare, scan, evaluate):
    app.command(verb.__name__.rpartition(".")[2])(verb.run)
data.app.command("make")(data_make.run)
app.add_typer(bench.app, name="bench")
app.add_typer(data.app, name="data")
app.add_typer(locate.app, name="locate")

INTERRUPTED = 130
"""What typer returns for Ctrl-C."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit; every error a person can cause is one line."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.addLevelName(logging.WARNING, "warning")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a narrow encoding costs characters, not the report
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
    try:
        code = app(arguments, standalone_mode=False)
    except KnowpatchError as error:
        _refuse(str(error))
    except TyperException as error:
        _refuse(" ".join(error.format_message().split()) or "nothing to do; see knowpatch --help")
    except KeyboardInterrupt:
        code = INTERRUPTED
    except MemoryError:
        _refuse("out of memory; try --dtype bfloat16, fewer requests at once, or a smaller model")
    except SystemExit as ended:
        # Whoever reads went away (`| head`): typer and rich both make a 1 of it, which is taken.
        if isinstance(ended.__context__, BrokenPipeError):
            sys.exit(0)
        raise
    if code == INTERRUPTED:
        _refuse("interrupted; no file was left half-written")
    sys.exit(code or 0)


def _refuse(message: str) -> None:
    sys.stderr.write(f"knowpatch: {message}\n")
    sys.exit(2)
