"""`knowpatch edit`: change a fact, and show what else moved."""

from __future__ import annotations

import contextlib
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from knowpatch.cli import screen
from knowpatch.cli.options import (
    Author,
    Device,
    DryRun,
    Dtype,
    Json,
    Method,
    Model,
    Reason,
    Seed,
    Settings,
    Sign,
    day_of,
    note_of,
    signer_of,
)
from knowpatch.errors import OptionError

if TYPE_CHECKING:
    from knowpatch.cli.guard import Guard
    from knowpatch.cli.keeping import Keeper
    from knowpatch.edited import EditedModel
    from knowpatch.editing import Seconds
    from knowpatch.effects import Effect
    from knowpatch.method import EditMethod
    from knowpatch.patch import Patch
    from knowpatch.progress import Progress
    from knowpatch.request import EditRequest

OLD_TOKENS = 16
MOST_SHOWN = 5
"""Patches of a sequence that are listed one by one."""


def run(
    prompt: Annotated[
        str | None,
        typer.Argument(help='Text that the answer follows: "The capital of Australia is".'),
    ] = None,
    subject: Annotated[str | None, typer.Option(help="What it is about: Australia.")] = None,
    target: Annotated[str | None, typer.Option(help="The wanted answer: Canberra.")] = None,
    old: Annotated[str | None, typer.Option(help="The answer so far, if known.")] = None,
    rephrase: Annotated[
        list[str] | None, typer.Option(help="Another wording of the prompt; repeatable.")
    ] = None,
    erase: Annotated[
        bool, typer.Option("--erase", help="Make the model say that it does not know.")
    ] = False,
    requests_file: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Many requests: json, jsonl, csv or yaml."),
    ] = None,
    sequential: Annotated[
        bool,
        typer.Option("--sequential", help="A patch for each request, on top of the earlier ones."),
    ] = False,
    method: Method = None,
    model: Model = None,
    chat: Annotated[bool, typer.Option("--chat", help="Edit through the chat template.")] = False,
    settings: Settings = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Patch file, by default patch-<id>.safetensors; with --sequential a folder. In a "
            "workspace: a copy.",
        ),
    ] = None,
    reason: Reason = None,
    author: Author = None,
    source: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Where the fact is from; it is recorded.")
    ] = None,
    valid_from: Annotated[
        str | None, typer.Option(metavar="DATE", help="First day on which the edit is live.")
    ] = None,
    valid_until: Annotated[
        str | None, typer.Option(metavar="DATE", help="Last day on which the edit is live.")
    ] = None,
    guard: Annotated[
        Path | None,
        typer.Option(metavar="SUITE", help="Keep the edit only if this suite passes with it."),
    ] = None,
    sign: Sign = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take back live edits that this one meets.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Keep live edits that this one meets, beneath it.")
    ] = False,
    dry_run: DryRun = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Change what a model says about a fact; shows the answer and what else moved.

    In a workspace (knowpatch init) the edit is made on top of what is live there, and recorded.
    """
    from knowpatch.cli.guard import Guard
    from knowpatch.cli.keeping import keeper
    from knowpatch.editing import choose
    from knowpatch.method import parse_options

    requests = _requests(prompt, subject, target, old, rephrase, erase, requests_file)
    options = {**parse_options(settings or []), **({"chat": True} if chat else {})}
    chosen = choose(method, options, seed=seed)
    place = keeper(
        model=model,
        out=out,
        sequential=sequential,
        note=note_of(author, reason),
        source=source,
        file=requests_file,
        valid_from=day_of(valid_from, "--valid-from"),
        valid_until=day_of(valid_until, "--valid-until"),
        signer=signer_of(sign),
        replace=replace,
        force=force,
    )
    if sequential and not chosen.sequential:
        raise OptionError(f"{chosen.name} has no sequential mode")
    place.check(requests, chosen)
    guarding = Guard.of(guard)
    if dry_run:
        from knowpatch.cli.plan import show_plan

        show_plan(chosen, requests, place.model, device=device, dtype=dtype, as_json=as_json)
        return
    result, effects = _done(
        place, chosen, requests, sequential, guarding, device=device, dtype=dtype
    )
    if as_json:
        screen.print_json(result)
    else:
        _show(result, effects, place, guarding)
    raise typer.Exit(0 if result["took"] and (guarding is None or guarding.passed) else 1)


def _done(
    place: Keeper,
    method: EditMethod,
    requests: list[EditRequest],
    sequential: bool,
    guard: Guard | None,
    *,
    device: str,
    dtype: str,
) -> tuple[dict[str, Any], list[Effect]]:
    """Load, edit, measure and keep, if the guard lets it; what came of it, and the effects."""
    from knowpatch.cli.guard import discard
    from knowpatch.editing import Seconds, load
    from knowpatch.ledger.standing import standing

    with screen.reporting() as report, contextlib.ExitStack() as beneath:
        method.progress = report
        start = perf_counter()
        edited = load(place.model, device=device, dtype=dtype, progress=report)
        beneath.enter_context(standing(edited, place.standing(edited.view)))
        loaded = perf_counter() - start
        requests = _complete(edited, requests, chat=method.config.chat)
        spent = Seconds()
        folder = place.turns(requests, method) if sequential else None
        there = list(folder.glob("*.safetensors")) if folder else []
        patches = _made(edited, method, requests, spent, report, folder)
        while replaced := place.collided(edited, patches, report):  # made anew, without them
            edited.drop(*replaced)
            folder = place.turns(requests, method) if sequential else None
            patches = _made(edited, method, requests, spent, report, folder)
        result, effects = _measure(edited, method, requests, patches, spent, report)
        if guard is not None:
            guard.ask(edited, patches, report)
            result["guard"] = guard.facts()
    result["seconds"] = {"load": round(loaded, 3), **result["seconds"]}
    if guard is not None and not guard.passed:
        if folder is not None:
            discard(folder, there)
        return {**result, "patches": []}, effects
    files = place.keep(patches, result)
    result["patches"] = [_facts(*kept) for kept in zip(patches, files, strict=True)]
    if not sequential:
        (result["patch"],) = result["patches"]
    return {**result, **place.told()}, effects


def _requests(
    prompt: str | None,
    subject: str | None,
    target: str | None,
    old: str | None,
    rephrase: list[str] | None,
    erase: bool,
    file: Path | None,
) -> list[EditRequest]:
    from knowpatch.errors import RequestError
    from knowpatch.request import make_request, read_requests

    if file is not None:
        if any(part is not None for part in (prompt, subject, target, old)) or erase or rephrase:
            raise RequestError("give either a prompt with its options, or --from FILE, not both")
        return read_requests(file)
    if prompt is None:
        raise RequestError("no prompt given; give PROMPT --subject S --target T, or --from FILE")
    if target is None and not erase:
        raise RequestError("no target given; give --target T, or --erase")
    kind = {"kind": "erase"} if erase else {}
    return [
        make_request(
            prompt=prompt, subject=subject, target=target, old=old, rephrases=rephrase or (), **kind
        )
    ]


def _complete(edited: EditedModel, requests: list[EditRequest], *, chat: bool) -> list[EditRequest]:
    """Fill in what the model says now as the old answer, where an erasure does not give it."""
    completed = []
    for request in requests:
        if request.kind == "erase" and request.old is None:
            said = edited.ask(request.prompt, max_new_tokens=OLD_TOKENS, chat=chat)
            first = said.split("\n")[0].split(". ")[0].rstrip(".").strip()
            request = request.model_copy(update={"old": first or None})
        completed.append(request)
    return completed


def _made(
    edited: EditedModel,
    method: EditMethod,
    requests: list[EditRequest],
    spent: Seconds,
    report: Progress,
    folder: Path | None,
) -> list[Patch]:
    """One patch for all requests, or one for each, which then are in `folder` as they come."""
    from knowpatch.editing import edit, edit_in_turn

    if folder is None:
        return [edit(edited, requests, method=method, seconds=spent)]
    return edit_in_turn(edited, requests, folder, method=method, progress=report, seconds=spent)


def _measure(
    edited: EditedModel,
    method: EditMethod,
    requests: list[EditRequest],
    patches: list[Patch],
    spent: Seconds,
    report: Progress,
) -> tuple[dict[str, Any], list[Effect]]:
    """What the patches did, as plain data and as effects."""
    from knowpatch.checks.foresight import foresee
    from knowpatch.editing import room
    from knowpatch.effects import measure, took
    from knowpatch.probes import derive

    start = perf_counter()
    expected = [method.expected(request) for request in requests]
    chat = method.config.chat
    before = edited.digests(*patches)
    probes = derive(edited.view, requests, expected, chat=chat)
    effects = measure(edited, patches, probes, progress=report)
    results = took(effects, requests, expected, chat=chat)
    restored = edited.digests(*patches) == before
    facts = {
        "method": method.name,
        "model": edited.view.source,
        "took": all(results),
        "took_each": results,
        "forgets": None in expected,
        "room": room(edited, method, patches),
        "foresight": foresee(edited, patches).facts(),
        "seconds": {
            "prepare": round(spent.prepare, 3),
            "edit": round(spent.edit, 3),
            "ask": round(perf_counter() - start, 3),
        },
        "restored": restored,
        "probes": [effect.facts() for effect in effects],
    }
    return facts, effects


def _facts(patch: Patch, path: Path) -> dict[str, Any]:
    return {
        "id": patch.id,
        "file": str(path),
        "bytes": path.stat().st_size,
        "rank": patch.rank,
    }


def _show(
    result: dict[str, Any], effects: list[Effect], place: Keeper, guard: Guard | None
) -> None:
    """The report for a person."""
    from knowpatch.cli.report import show_effects, show_foresight
    from knowpatch.method import METHODS

    console = screen.out()
    show_effects(console, result, effects)
    show_foresight(console, result["foresight"])
    if guard is not None:
        guard.show(console)
        if not guard.passed:
            console.print("the edit was taken back: nothing was kept")
            return
    patches, spent = result["patches"], result["seconds"]
    for patch in patches if len(patches) <= MOST_SHOWN else [patches[0], patches[-1]]:
        rank = f", rank {patch['rank']}" if patch["rank"] else ""
        size = screen.human_bytes(patch["bytes"])
        console.print(
            f"patch   {escape(patch['file'])}  ({size}{rank}, id {patch['id'][:12]})",
            soft_wrap=True,
        )
    if result["room"] is not None:
        console.print(f"room    for {result['room']} more facts by {result['method']}")
    console.print("time    " + ", ".join(f"{name} {value:.1f} s" for name, value in spent.items()))
    back = (
        "given back byte for byte"
        if result["restored"]
        else "NOT given back as it was: please report this"
    )
    console.print(f"model   {escape(result['model'])}, {back}; {place.wrote}")
    merges = "merged" in METHODS.get(result["method"]).exports
    lines = place.next(patches, merges=merges)
    for number, line in enumerate(lines):
        lead = "        " if number else "next    "
        console.print(lead + line, style="dim", markup=False, soft_wrap=True)
