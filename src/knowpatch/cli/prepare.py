"""`knowpatch prepare`: make once what every edit with a method needs of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter, time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from knowpatch.cli import screen
from knowpatch.cli.options import Device, DryRun, Dtype, Json, Method, Model, Seed, Settings

if TYPE_CHECKING:
    from knowpatch.method import EditMethod, Preparation


def run(
    method: Method = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|FOLDER|DATASET",
            help="Text to take statistics from; the same as --set text=...",
        ),
    ] = None,
    model: Model = None,
    settings: Settings = None,
    seed: Seed = 0,
    dry_run: DryRun = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Do once what every edit with a method needs and no request changes; says what was kept.

    Edits do it themselves where it was not done. Killed at any moment, the same command goes on
    where it stopped.
    """
    from knowpatch.editing import choose
    from knowpatch.method import parse_options

    options = {**parse_options(settings or []), **({} if text is None else {"text": text})}
    chosen = choose(method, options, seed=seed)
    facts = outlook(chosen, model)
    nothing = facts["items"] == []
    if not as_json:
        _announce(facts, dry_run=dry_run)
    if not dry_run and not nothing:
        facts |= _prepare(chosen, model, device, dtype)
        if not as_json:
            _show(facts)
    if as_json:
        screen.print_json(facts)


def outlook(method: EditMethod, name: str | None) -> dict[str, Any]:
    """What preparing would take, as plain data; nothing is loaded or written.

    `items` is None where the model is not here yet, and empty where there is nothing to prepare.
    `there` says of each item whether it had been made before, `seconds` how long making it took.
    """
    from knowpatch.cli.plan import known

    model = known(name)
    if model.shape is not None:
        method.check_layers(model.shape.layers)
    items = None if model.shape is None else method.preparations(model.shape)
    missing = [item.tokens for item in items or () if not item.path.exists()]
    return {
        "method": method.name,
        "model": model.name,
        "first": model.first,
        "estimated_seconds": None if items is None else model.seconds(sum(missing)),
        "items": None if items is None else _items(items, _changes(items), 0.0),
    }


def _prepare(method: EditMethod, name: str | None, device: str, dtype: str) -> dict[str, Any]:
    """Load and prepare: the items as they are then, and the seconds."""
    from knowpatch.cli.plan import shape_of
    from knowpatch.editing import load

    with screen.reporting(remaining=True) as report:
        method.progress = report
        start = perf_counter()
        view = load(name, device=device, dtype=dtype, progress=report).view
        method.check(view)
        items = method.preparations(shape_of(view.model.config.to_dict(), view.fingerprint))
        before, begun, loaded = _changes(items), time(), perf_counter()
        shown = method.shown(method.prepare(view))
        done = perf_counter()
    seconds = {"load": round(loaded - start, 3), "prepare": round(done - loaded, 3)}
    return {
        "first": None,
        "items": _items(items, before, begun),
        "shown": shown,
        "seconds": seconds,
    }


def _changes(items: Sequence[Preparation]) -> dict[Path, float]:
    """When each of the items that are there was written."""
    return {item.path: item.path.stat().st_mtime for item in items if item.path.exists()}


def _items(
    items: Sequence[Preparation], before: Mapping[Path, float], begun: float
) -> list[dict[str, Any]]:
    """The items as plain data, with what has happened since `before`, from the time `begun` on.

    An item's seconds end when its file is written and begin where those of the one before end, so
    what several share counts for the first.
    """
    now = _changes(items)
    made = sorted(when for path, when in now.items() if before.get(path) != when)
    since = dict(zip(made, [begun, *made], strict=False))
    facts = []
    for item in items:
        when = now.get(item.path)
        there = when is not None and before.get(item.path) == when
        spent = None if when is None or there else round(max(0.0, when - since[when]), 3)
        facts.append(
            {
                "what": item.what,
                "path": str(item.path),
                "tokens": item.tokens,
                "there": there,
                "bytes": None if when is None else item.path.stat().st_size,
                "seconds": spent,
            }
        )
    return facts


def _announce(facts: dict[str, Any], *, dry_run: bool) -> None:
    """What is to be done, before it is."""
    console = screen.out()
    items, about = facts["items"], facts["estimated_seconds"]
    title = f"[bold]{facts['method']}[/] on [bold]{escape(facts['model'])}[/]"
    if items == []:
        console.print(f"{title}: nothing to prepare")
        return
    console.print(title)
    if facts["first"]:
        console.print(f"  first      {escape(facts['first'])}", soft_wrap=True)
    for item in items or ():
        state = "there" if item["there"] else "to make"
        console.print(f"  {state:10} {escape(item['what'])}", soft_wrap=True)
    known = "not known yet" if about is None else f"about {about:.0f} s, after loading"
    console.print(f"  time       {known}")
    if dry_run:
        console.print("nothing was loaded or written", style="dim")


def _show(facts: dict[str, Any]) -> None:
    """What was kept."""
    console = screen.out()
    if not facts["items"]:
        console.print("nothing to prepare")
    for item in facts["items"]:
        size = "no file" if item["bytes"] is None else screen.human_bytes(item["bytes"])
        how = "was there" if item["there"] else f"made in {item['seconds'] or 0:.1f} s"
        console.print(f"kept    {escape(item['what'])}: {size}, {how}", soft_wrap=True)
        console.print(f"        {escape(item['path'])}", style="dim", soft_wrap=True)
    for line in facts["shown"]:
        console.print(f"        {escape(line)}", soft_wrap=True)
    spent = facts["seconds"]
    console.print("time    " + ", ".join(f"{name} {value:.1f} s" for name, value in spent.items()))
