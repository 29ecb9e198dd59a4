"""`knowpatch data`: the datasets there are, and what a dataset or a file of cases holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from knowpatch.cli import screen
from knowpatch.cli.options import Json

if TYPE_CHECKING:
    from knowpatch.data.dataset import Dataset
    from knowpatch.data.source import Loaded

app = typer.Typer(no_args_is_help=True, help="Datasets: what there is, and what is in it.")

Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR",
        help="Folder with the files; by default KNOWPATCH_DATA, or the hub.",
    ),
]


@app.command("list")
def show_list(data: Data = None, as_json: Json = False) -> None:
    """List the datasets, their splits, and which files are here."""
    from knowpatch.data.dataset import DATASETS

    facts = [describe(name, data) for name in DATASETS.names()]
    if as_json:
        screen.print_json(facts)
        return
    console = screen.out()
    for fact in facts:
        console.print(f"[bold]{fact['name']}[/]  {escape(fact['about'])}")
        suite = f"{fact['suite']}; " if fact["suite"] else ""
        console.print(f"    {suite}{fact['kind']}; {escape(fact['paper'])}")
        console.print(f"    from: {escape(fact['from'])}")
        for split in fact["splits"]:
            default = " (default)" if split["name"] == fact["default_split"] else ""
            console.print(f"      {split['name']}{default}: {escape(_state(split))}", style="dim")
        console.print()


def describe(name: str, data: Path | None) -> dict[str, Any]:
    """The facts of one dataset as plain data, with what is here of each split."""
    from knowpatch.data.dataset import DATASETS

    dataset = DATASETS.get(name)
    hub = dataset.hub
    return {
        "name": dataset.name,
        "about": dataset.about,
        "paper": dataset.paper,
        "kind": dataset.kind,
        "suite": dataset.suite,
        "from": f"a folder, or the hub: {hub.repo} at {hub.revision[:12]}" if hub else "a folder",
        "default_split": dataset.default_split,
        "splits": [_split(dataset, split, data) for split in dataset.files],
    }


def _split(dataset: type[Dataset], split: str, data: Path | None) -> dict[str, Any]:
    from knowpatch.data.source import load, present
    from knowpatch.errors import DataError
    from knowpatch.files import remembered, source_digest

    paths = present(dataset, split, data)
    facts: dict[str, Any] = {"name": split, "files": list(dataset.files[split]), "cases": None}
    if paths:
        facts["files"] = [str(path) for path in paths]
        what = f"cases of {dataset.name}:{split} by {source_digest()}"
        try:
            facts["cases"] = remembered(
                what, paths, lambda: len(load(dataset.name, split=split, data=data).cases)
            )
        except DataError as error:
            facts["error"] = str(error)
    return facts


def _state(split: dict[str, Any]) -> str:
    if "error" in split:
        return f"damaged: {split['error']}"
    return "not here" if split["cases"] is None else f"{split['cases']:,} cases"


@app.command("check")
def check(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="A dataset, NAME:SPLIT, or a .jsonl file of cases."),
    ],
    split: Annotated[str | None, typer.Option(help="Split of the dataset.")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Read all of a dataset or a file, and count what it holds and what is odd about it."""
    from knowpatch.data.source import load

    facts = counts(load(name, split=split, data=data))
    if as_json:
        screen.print_json(facts)
        return
    console = screen.out()
    console.print(f"[bold]{escape(facts['name'])}[/], {facts['split']}")
    for file in facts["files"]:
        console.print(f"    {escape(file)}", style="dim", soft_wrap=True)
    console.print(f"{facts['cases']:,} cases, {facts['requests']:,} requests")
    for title, part in (("probes", "probes"), ("odd", "oddities"), ("unusable", "unusable")):
        for what, count in facts[part].items():
            console.print(f"  {title:<8} {count:>8,}  {screen.one_line(what, 80)}")


def counts(loaded: Loaded) -> dict[str, Any]:
    """What was loaded, counted: probes by kind, cases by oddity, unusable cases by reason."""
    from knowpatch.data.draft import tally

    cases = loaded.cases
    unusable = Counter(case.unusable for case in cases if case.unusable is not None)
    return {
        "name": loaded.name,
        "split": loaded.split,
        "files": [str(path) for path in loaded.paths],
        "digest": loaded.digest,
        "cases": len(cases),
        "requests": sum(len(case.requests) for case in cases),
        "probes": dict(Counter(probe.kind for case in cases for probe in case.probes)),
        "oddities": dict(tally(cases)),
        "unusable": dict(unusable),
    }
