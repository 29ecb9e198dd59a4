"""`knowpatch bench`: run a plan of methods and datasets into a folder, and report on it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape
from rich.table import Table

from knowpatch.cli import screen
from knowpatch.cli.data import Data
from knowpatch.cli.options import Json, Model

FAILURES = 5
"""Failures shown; the report shows all."""

NOTHING = {"mean": None, "low": None, "high": None, "n": 0}

app = typer.Typer(
    no_args_is_help=True, help="Compare methods: run a plan of cells, and report on the rows."
)

Limit = Annotated[int | None, typer.Option(min=1, help="Cases of each dataset; by default all.")]
Probes = Annotated[
    int | None, typer.Option(min=1, help="Most questions of each kind and case; by default all.")
]
Metrics = Annotated[str | None, typer.Option(help="Metrics or groups, comma-separated, or all.")]
Seed = Annotated[int | None, typer.Option(help="Of everything an edit samples.")]
Ages = Annotated[
    str | None, typer.Option(help="Edits after which a sequential run is scored: 10,100,500.")
]
Chat = Annotated[bool, typer.Option("--chat", help="Edit and ask through the chat template.")]
Memory = Annotated[str | None, typer.Option(help="Most memory to use: 8GB.")]


@app.command()
def run(
    plan: Annotated[Path | None, typer.Argument(help="A YAML plan; options override it.")] = None,
    methods: Annotated[
        str | None, typer.Option(help="Names, comma-separated; see: knowpatch methods.")
    ] = None,
    datasets: Annotated[
        str | None,
        typer.Option(help="Names, NAME:SPLIT or files, comma-separated; all: the paper's six."),
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="single, batch, sequential; comma-separated.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where rows go.")] = Path("results"),
    limit: Limit = None,
    probes: Probes = None,
    metrics: Metrics = None,
    ages: Ages = None,
    seed: Seed = None,
    chat: Chat = False,
    data: Data = None,
    memory: Memory = None,
    model: Model = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or 8bit.")] = None,
    as_json: Json = False,
) -> None:
    """Run methods on datasets. Killed at any moment, the same command goes on where it stopped.

    A case that fails is a row with its error. Exit code 1: every case of some cell failed.
    """
    given = {
        "methods": split(methods),
        "datasets": split(datasets),
        "modes": split(mode),
        "limit": limit,
        "probes": probes,
        "metrics": split(metrics),
        "ages": split(ages),
        "seed": seed,
        "chat": chat or None,
        "data": data,
        "memory": memory,
        "model": model,
        "device": device,
        "dtype": dtype,
    }
    found = run_plan(plan, given, out)
    show(found, found, as_json=as_json)
    if not as_json:
        said = f"rows in {out}; all of it: knowpatch bench report {out}"
        screen.out().print(said, style="dim", markup=False, soft_wrap=True)
    finish(found)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that bench run filled.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write; by default into DIR.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write tables (Markdown, CSV, JSON), one HTML page and pictures about a results folder."""
    from knowpatch.bench.report import write_report

    paths = [str(path) for path in write_report(folder, out)]
    if as_json:
        screen.print_json({"written": paths})
        return
    for path in paths:
        screen.out().print(path, markup=False, soft_wrap=True)


def split(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def run_plan(path: Path | None, given: dict[str, Any], out: Path) -> list[dict[str, Any]]:
    """What came of the cells of a plan (a file's, with `given` over it), run into `out`."""
    from knowpatch.bench.plan import make_plan, read_plan
    from knowpatch.bench.runner import Runner
    from knowpatch.editing import load
    from knowpatch.errors import OptionError

    fields = read_plan(path).model_dump(exclude_unset=True) if path else {}
    fields |= {name: value for name, value in given.items() if value is not None}
    missing = [f"--{name}" for name in ("methods", "datasets") if name not in fields]
    if missing:
        raise OptionError(f"nothing to run: give {' and '.join(missing)}, or a YAML plan")
    plan = make_plan(fields)
    with screen.reporting(remaining=True) as progress:
        model = load(plan.model, device=plan.device, dtype=plan.dtype, progress=progress)
        cells = Runner(model, plan, out, progress=progress).run()
    return [_short(cell.folder) for cell in cells]


def show(found: list[dict[str, Any]], document: Any, *, as_json: bool) -> None:
    """The cells for a person, or a document of them for a program."""
    if as_json:
        screen.print_json(document)
        return
    for short in found:
        _print(short)


def finish(found: list[dict[str, Any]]) -> NoReturn:
    """End: with 1 if every case of some cell failed."""
    raise typer.Exit(code=int(any(short["failed"] == short["n"] for short in found)))


def _short(folder: Path) -> dict[str, Any]:
    """A cell as plain data: each metric with its mean, 95 % interval, n and protocol."""
    from knowpatch.bench.summary import cell_of, summarise
    from knowpatch.metrics.catalogue import catalogue

    cell = summarise(cell_of(folder), catalogue())
    return {
        "method": cell.facts.method,
        "dataset": cell.facts.dataset,
        "split": cell.facts.split,
        "mode": cell.facts.mode,
        "n": cell.records,
        "failed": len({case for case, _ in cell.failures}),
        "failures": [{"case": case, "error": error} for case, error in cell.failures],
        "metrics": {
            name: {
                **(asdict(metric.after) if metric.after else NOTHING),
                "protocol": metric.reading.protocol,
                "before": metric.before.mean if metric.before else None,
                "n_before": metric.before.n if metric.before else 0,
                "published": metric.reading.published,
                "percent": metric.reading.percent,
                "unscored": dict(metric.unscored),
            }
            for name, metric in cell.metrics.items()
        },
        "seconds_per_edit": cell.seconds and cell.seconds[1],
        "peak_mb": cell.peak_mb,
        "rows": str(folder / "rows.jsonl"),
    }


def _print(short: dict[str, Any]) -> None:
    """A cell for a person."""
    console = screen.out()
    failed = f", {short['failed']} failed" if short["failed"] else ""
    console.print(
        f"[bold]{short['method']}[/] on [bold]{escape(short['dataset'])}[/] "
        f"({escape(short['split'])}), {short['mode']}: {short['n']} cases{failed}"
    )
    table = Table(box=None, pad_edge=False)
    for column in ("metric", "before", "after", "95 %", "n", "protocol"):
        table.add_column(column, justify="right" if column in ("before", "after", "n") else "left")
    for name, metric in short["metrics"].items():
        table.add_row(*_columns(name, metric))
    console.print(table)
    for name, metric in short["metrics"].items():
        for reason, count in metric["unscored"].items():
            said = f"  {name}: {count} cases unscored: {reason}"
            console.print(said, style="dim", markup=False, soft_wrap=True)
    for failure in short["failures"][:FAILURES]:
        console.print(f"  {failure['case']}: {failure['error']}", markup=False, soft_wrap=True)
    if short["seconds_per_edit"] is not None:
        peak = "" if short["peak_mb"] is None else f", at most {short['peak_mb']:.0f} MB"
        console.print(f"  {short['seconds_per_edit']:.2f} s per edit{peak}")
    console.print()


def _columns(name: str, metric: dict[str, Any]) -> list[str]:
    def shown(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{100 * value:.1f}" if metric["percent"] else f"{value:.4g}"

    between = f"{shown(metric['low'])} to {shown(metric['high'])}"
    published = " (as published)" if metric["published"] else ""
    return [
        name,
        shown(metric["before"]),
        shown(metric["mean"]),
        "-" if metric["low"] is None else between,
        str(metric["n"]),
        metric["protocol"] + published,
    ]
