"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option(help="Hub id, folder or GGUF file; by default the bundled SmolLM2-135M-Instruct."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or 8bit.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Patches = Annotated[
    list[Path] | None, typer.Option("--patch", metavar="FILE", help="A patch file; repeatable.")
]
