"""`knowpatch evaluate`: one method on one dataset, scored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from knowpatch.cli import bench
from knowpatch.cli.bench import Ages, Chat, Limit, Memory, Metrics, Probes, Seed
from knowpatch.cli.data import Data
from knowpatch.cli.options import Json, Model


def run(
    method: Annotated[str, typer.Option(help="See: knowpatch methods.")],
    dataset: Annotated[str, typer.Option(help="A name, NAME:SPLIT or a file of cases.")],
    mode: Annotated[str, typer.Option(help="single, batch or sequential.")] = "single",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A method's option.")
    ] = None,
    limit: Limit = None,
    probes: Probes = None,
    metrics: Metrics = None,
    ages: Ages = None,
    seed: Seed = None,
    chat: Chat = False,
    data: Data = None,
    memory: Memory = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where rows go; by default the cache.")
    ] = None,
    model: Model = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or 8bit.")] = "auto",
    as_json: Json = False,
) -> None:
    """Score one method on one dataset: means with 95 % intervals, seconds and memory.

    Exit code 1: every case failed.
    """
    from knowpatch.data.source import expanded
    from knowpatch.errors import OptionError
    from knowpatch.files import cache_folder
    from knowpatch.method import parse_options

    if len(expanded([dataset])) > 1:
        raise OptionError(f"{dataset!r} is several datasets: give one, or use knowpatch bench run")
    folder = out or cache_folder() / "evaluate"
    given = {
        "methods": [{"name": method, "options": parse_options(set_ or [])}],
        "datasets": [dataset],
        "modes": [mode],
        "limit": limit,
        "probes": probes,
        "metrics": bench.split(metrics),
        "ages": bench.split(ages),
        "seed": seed,
        "chat": chat or None,
        "data": data,
        "memory": memory,
        "model": model,
        "device": device,
        "dtype": dtype,
    }
    found = bench.run_plan(None, given, folder)
    bench.show(found, found[0], as_json=as_json)
    bench.finish(found)
