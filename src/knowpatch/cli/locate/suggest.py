"""`knowpatch locate suggest`: which blocks are worth editing in this model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from knowpatch.cli import screen
from knowpatch.cli.options import Device, Json, Method, Model, Seed, Settings, check_writable

if TYPE_CHECKING:
    from knowpatch.bench.statistics import Summary
    from knowpatch.locate.suggest import Suggestion, Tried


def run(
    method: Method = None,
    facts: Annotated[
        int,
        typer.Option(min=2, max=30, help="Pilot facts to choose by; as many others to compare."),
    ] = 8,
    by: Annotated[
        str, typer.Option(help="The locator whose curve is set beside it.")
    ] = "attribution",
    settings: Settings = None,
    model: Model = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it: a .png or .svg file.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Try a method at several depths on pilot facts, and name the blocks that take edits best.

    What was tried is kept: a run that was stopped goes on where it was.
    """
    from knowpatch.editing import load
    from knowpatch.locate.canvas import check_picture, saved
    from knowpatch.locate.locators import locator
    from knowpatch.locate.pilot import option_of
    from knowpatch.locate.suggest import suggest
    from knowpatch.locate.suggest_picture import suggest_picture
    from knowpatch.method import METHODS, parse_options
    from knowpatch.methods import DEFAULT

    check_writable(out)
    check_picture(out)
    name, how = method or DEFAULT, locator(by)
    option_of(METHODS.get(name))
    options = parse_options(settings or [])
    with screen.reporting(remaining=True) as report:
        edited = load(model, device=device, progress=report)
        found = suggest(edited, name, options, facts=facts, how=how, seed=seed, progress=report)
    if out is not None:
        title = f"{name} on {facts} pilot facts, in {edited.view.source}"
        saved(suggest_picture(found, title), out)
    if as_json:
        screen.print_json(_facts(edited.view.source, edited.view.fingerprint, name, found, out))
    else:
        _show(name, model, found, out)


def _facts(
    source: str, fingerprint: str, method: str, found: Suggestion, out: Path | None
) -> dict[str, Any]:
    judged = found.judged
    return {
        "model": source,
        "fingerprint": fingerprint,
        "method": method,
        "suggested": list(found.best.place.blocks),
        "preset": found.best.place.options,
        "option": found.best.place.setting,
        "own": list(found.own.place.blocks),
        "verdict": found.verdict,
        "judged": None
        if judged is None
        else {"best": asdict(judged[0]), "own": asdict(judged[1]), "difference": asdict(judged[2])},
        "tried": [_tried(one) for one in found.tried],
        "located": {"curve": found.curve, "peak": found.peak, "span": list(found.span)},
        "rho": found.rho,
        "auc": found.auc,
        "warnings": warnings(found),
        "picture": None if out is None else str(out),
    }


def _tried(one: Tried) -> dict[str, Any]:
    return {
        "blocks": list(one.place.blocks),
        "options": one.place.options,
        "rates": {name: asdict(summary) for name, summary in one.rates.items()},
        "score": asdict(one.score),
        "records": list(one.records),
    }


def warnings(found: Suggestion) -> list[str]:
    """What should keep a reader from believing too much."""
    from knowpatch.locate.suggest import TELLING

    told = []
    if found.rho is None or abs(found.rho) < TELLING:
        rho = "none" if found.rho is None else f"{found.rho:+.2f}"
        told.append(f"what is located does not predict where edits take (rank correlation {rho})")
    failed = sum(record is None for one in found.tried for record in one.records)
    if failed:
        told.append(f"{failed} pilot edits failed and are left out")
    return told


def _show(method: str, model: str | None, found: Suggestion, out: Path | None) -> None:
    console = screen.out()
    table = Table("blocks", "success", "paraphrase", "kept", "change / matrix", "score", "")
    for one in found.tried:
        marks = "own" * (one is found.own) + " best" * (one is found.best)
        rates: Mapping[str, Summary] = one.rates
        cells = [
            f"{100 * rates[name].mean:.0f} %" if name in rates else "–"
            for name in ("success", "paraphrase", "kept", "norm")
        ]
        low, high = one.score.low, one.score.high
        between = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
        table.add_row(_blocks(one), *cells, f"{one.score.mean:.2f}{between}", marks.strip())
    console.print(table)
    console.print(f"suggested  {_blocks(found.best)}: {found.verdict}", soft_wrap=True)
    if found.peak is not None:
        told = f"located    peak at block {found.peak}"
        rho = "" if found.rho is None else f"; rank correlation with the score {found.rho:+.2f}"
        console.print(told + rho, soft_wrap=True)
    if found.auc:
        best = max(found.auc, key=lambda block: found.auc[block])
        console.print(
            f"memories   paraphrases are told from neighbours best at block {best} "
            f"(AUC {found.auc[best]:.2f})",
            soft_wrap=True,
        )
    for line in warnings(found):
        console.print(f"[yellow]warning[/]    {escape(line)}", soft_wrap=True)
    rest = "" if model is None else f" --model {model}"
    setting = f" {found.best.place.setting}".rstrip()
    line = f"next       knowpatch edit PROMPT --method {method}{setting}{rest}"
    console.print(line, style="dim", markup=False, soft_wrap=True)
    if out is not None:
        console.print(f"picture    {escape(str(out))}", soft_wrap=True)


def _blocks(one: Tried) -> str:
    blocks = one.place.blocks
    return str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]}-{blocks[-1]}"
