"""`knowpatch locate neurons`: knowledge neurons of one fact, and their tests."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from knowpatch.cli import screen
from knowpatch.cli.options import Device, Json, Model, Seed, check_writable

if TYPE_CHECKING:
    from knowpatch.locate.neurons import KnowledgeNeurons

MOST = 12
"""Neurons that are listed one by one."""


def run(
    prompt: Annotated[str, typer.Argument(help='Text that the answer follows: "The capital of".')],
    target: Annotated[str, typer.Option(help="The answer whose neurons are looked for.")],
    rephrase: Annotated[
        list[str] | None, typer.Option(help="The prompt in other words; repeatable.")
    ] = None,
    points: Annotated[int, typer.Option(min=1, help="Steps of the integrated gradients.")] = 20,
    threshold: Annotated[
        float,
        typer.Option(min=0, max=0.999, help="A neuron counts above this share of the largest."),
    ] = 0.2,
    share: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=0.999,
            help="Of the prompts that must find it; by default until 2 to 5 are left.",
        ),
    ] = None,
    model: Model = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it: a .png or .svg file.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Which neurons an answer comes from, and what suppressing and doubling them does.

    The effects are measured on this fact and on control prompts, beside random neurons.
    """
    from knowpatch.editing import load
    from knowpatch.locate.canvas import check_picture, saved
    from knowpatch.locate.neurons import knowledge_neurons
    from knowpatch.locate.neurons_picture import neurons_picture
    from knowpatch.parts.attribution import Search

    check_writable(out)
    check_picture(out)
    search = Search(points=points, threshold=threshold, share=share)
    with screen.reporting() as report:
        edited = load(model, device=device, progress=report)
        prompts = [prompt, *(rephrase or [])]
        found = knowledge_neurons(edited.view, prompts, target, search, seed=seed, progress=report)
    if out is not None:
        saved(neurons_picture(found, f"{prompt} … {target}"), out)
    if as_json:
        screen.print_json(_facts(edited.view.source, found, out))
    else:
        _show(edited.view.source, found, out)


def _facts(source: str, found: KnowledgeNeurons, out: Path | None) -> dict[str, Any]:
    tests = [
        {**asdict(test), "mean": {"fact": fmean(test.fact), "controls": fmean(test.controls)}}
        for test in found.tests
    ]
    return {
        "model": source,
        **asdict(found),
        "tests": tests,
        "picture": None if out is None else str(out),
    }


def _show(source: str, found: KnowledgeNeurons, out: Path | None) -> None:
    console = screen.out()
    console.print(f"[dim]{escape(source)}[/]")
    for prompt, p, size in zip(found.prompts, found.probabilities, found.coarse, strict=True):
        console.print(
            f"{screen.one_line(prompt, 70)} [bold]{escape(found.answer)}[/]: "
            f"p {100 * p:.2g} %, {size} neurons above the threshold",
            soft_wrap=True,
        )
    if not found.neurons:
        console.print("no neuron that the prompts agree on: use a smaller threshold or share")
    else:
        _show_neurons(found)
        _show_tests(found)
    if out is not None:
        console.print(f"picture {escape(str(out))}", soft_wrap=True)


def _show_neurons(found: KnowledgeNeurons) -> None:
    console, counts = screen.out(), Counter(one.layer for one in found.neurons)
    told = ", ".join(f"{count} in block {layer}" for layer, count in sorted(counts.items()))
    console.print(f"{len(found.neurons)} knowledge neurons: {told}", soft_wrap=True)
    table = Table("block", "neuron", "adds to p", "its activation", "found by prompts")
    for one in found.neurons[:MOST]:
        table.add_row(
            str(one.layer),
            str(one.index),
            f"{100 * one.score:+.2g} points",
            f"{one.value:+.3g}",
            f"{one.prompts} of {len(found.prompts)}",
        )
    console.print(table)


def _show_tests(found: KnowledgeNeurons) -> None:
    table = Table("", "neurons", "this fact's p", "control prompts' p")
    words = {"suppress": "suppressed (zero)", "enhance": "enhanced (doubled)"}
    for test in found.tests:
        table.add_row(
            words[test.action],
            test.neurons,
            f"{100 * fmean(test.fact):+.1f} %",
            f"{100 * fmean(test.controls):+.1f} %",
        )
    screen.out().print(table)
