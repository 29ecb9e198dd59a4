"""Options that `locate trace` and `locate attribute` share, and the facts that they name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knowpatch.cli.options import check_writable

if TYPE_CHECKING:
    from knowpatch.locate.facts import Fact

Prompt = Annotated[
    str | None, typer.Argument(help='Text that the answer follows: "The capital of Japan is".')
]
Subject = Annotated[str | None, typer.Option(help="What it is about, a part of the prompt: Japan.")]
From = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="FILE",
        help="Many facts: a json or jsonl file of prompt, subject, answer; or a dataset.",
    ),
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="With --from: facts that are enough; by default all.")
]
Window = Annotated[int, typer.Option(min=1, help="Layers that are restored together.")]
Samples = Annotated[int, typer.Option(min=1, help="Draws of the noise.")]
Scale = Annotated[
    float, typer.Option("--noise", min=0.0, help="Noise, in deviations of the embeddings.")
]
Picture = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Draw it: a .png or .svg file.")
]
RowsFile = Annotated[
    Path | None,
    typer.Option("--rows", metavar="FILE", help="With --from: write each fact's map (jsonl)."),
]


def facts_of(
    prompt: str | None, subject: str | None, source: str | None, data: Path | None
) -> list[Fact]:
    """The one fact of PROMPT --subject S, or those of --from; refused where it is neither."""
    from knowpatch.errors import RequestError
    from knowpatch.locate.facts import Fact, read_facts

    if source is not None:
        if prompt is not None or subject is not None:
            raise RequestError("give either PROMPT --subject S, or --from FILE, not both")
        return read_facts(source, data=data)
    if prompt is None or subject is None:
        missing = "prompt" if prompt is None else "subject"
        raise RequestError(f"no {missing} given; give PROMPT --subject S, or --from FILE")
    return [Fact.of(prompt, subject)]


def check_kind(kind: str, *more: str) -> Any:
    """What is restored, if it is something that can be (or one of `more`)."""
    from knowpatch.errors import OptionError, did_you_mean
    from knowpatch.models.restorations import KINDS

    if kind not in (*KINDS, *more):
        raise OptionError(f"unknown kind {kind!r}: {did_you_mean(kind, [*KINDS, *more])}")
    return kind


def told(settings: Mapping[str, Any]) -> str:
    """What a study restores, in words."""
    from knowpatch.models.restorations import ATTENTION, MLP, STATE

    windows = f"windows of {settings['window']} layers"
    words = {
        STATE: "State after each block restored",
        MLP: f"MLPs' outputs restored, {windows}",
        ATTENTION: f"Attentions' outputs restored, {windows}",
    }
    return words[settings["kind"]]


def check_places(out: Path | None, rows: Path | None, source: str | None) -> None:
    """Refuse a picture or a file of rows that could not be written, before the work."""
    from knowpatch.errors import OptionError
    from knowpatch.locate.canvas import check_picture

    if rows is not None and source is None:
        raise OptionError("--rows is for the maps of many facts: give these with --from FILE")
    check_picture(out)
    check_writable(out)
    check_writable(rows, "--rows")
