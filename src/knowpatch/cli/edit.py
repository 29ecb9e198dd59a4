"""`knowpatch edit`: change a fact, and show what else moved."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from knowpatch.cli import screen
from knowpatch.cli.options import (
    Device,
    DryRun,
    Dtype,
    Json,
    Method,
    Model,
    Seed,
    Settings,
    check_writable,
)

if TYPE_CHECKING:
    from knowpatch.edited import EditedModel
    from knowpatch.effects import Effect
    from knowpatch.method import EditMethod
    from knowpatch.patch import Patch
    from knowpatch.request import EditRequest

OLD_TOKENS = 16
FOLDER = Path("patches")
"""Where the patches of a sequence go by default."""
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
            help="Patch file, by default patch-<id>.safetensors; with --sequential a folder.",
        ),
    ] = None,
    dry_run: DryRun = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Change what a model says about a fact; shows the answer and what else moved."""
    from knowpatch.editing import Seconds, choose, load
    from knowpatch.method import parse_options

    requests = _requests(prompt, subject, target, old, rephrase, erase, requests_file)
    options = {**parse_options(settings or []), **({"chat": True} if chat else {})}
    chosen = choose(method, options, seed=seed)
    if sequential:
        _check_folder(out, chosen)
    else:
        check_writable(out)
    if dry_run:
        from knowpatch.cli.plan import show_plan

        show_plan(chosen, requests, model, device=device, dtype=dtype, as_json=as_json)
        return
    with screen.reporting() as report:
        chosen.progress = report
        start = perf_counter()
        edited = load(model, device=device, dtype=dtype, progress=report)
        loaded = perf_counter() - start
        requests = _complete(edited, requests, chat=chosen.config.chat)
        spent = Seconds()
        patches = _made(edited, chosen, requests, spent, report, out, sequential)
        result = _measure(edited, chosen, requests, patches, spent, report, sequential)
    result["seconds"] = {"load": round(loaded, 3), **result["seconds"]}
    effects = result.pop("effects")
    if not sequential:
        (result["patch"],) = result["patches"]
    if as_json:
        screen.print_json(result)
    else:
        _show(result, effects, model)
    raise typer.Exit(0 if result["took"] else 1)


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


def _check_folder(out: Path | None, method: EditMethod) -> None:
    """Refuse a place for the patches of a sequence before the work, not after it."""
    from knowpatch.errors import InputError, OptionError

    if not method.sequential:
        raise OptionError(f"{method.name} has no sequential mode")
    folder = out or FOLDER
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; with --sequential name a folder with --out")
    check_writable(folder / "patch" if folder.exists() else folder)


def _made(
    edited: EditedModel,
    method: EditMethod,
    requests: list[EditRequest],
    spent: Any,
    report: Any,
    out: Path | None,
    sequential: bool,
) -> dict[Path, Patch]:
    """The patches, by the files that they are, or are to be, in."""
    from knowpatch.editing import edit, edit_in_turn, numbered

    if sequential:
        folder = out or FOLDER
        patches = edit_in_turn(
            edited, requests, folder, method=method, progress=report, seconds=spent
        )
        return dict(zip(numbered(folder, len(patches)), patches, strict=True))
    patch = edit(edited, requests, method=method, seconds=spent)
    return {out or Path(f"patch-{patch.id[:12]}.safetensors"): patch}


def _measure(
    edited: EditedModel,
    method: EditMethod,
    requests: list[EditRequest],
    patches: dict[Path, Patch],
    spent: Any,
    report: Any,
    sequential: bool,
) -> dict[str, Any]:
    """What the patches did, as plain data. They are in their files afterwards."""
    from knowpatch.editing import room
    from knowpatch.effects import measure, took
    from knowpatch.probes import derive

    start = perf_counter()
    expected = [method.expected(request) for request in requests]
    chat = method.config.chat
    made = list(patches.values())
    before = edited.digests(*made)
    probes = derive(edited.view, requests, expected, chat=chat)
    effects = measure(edited, made, probes, progress=report)
    results = took(effects, requests, expected, chat=chat)
    restored = edited.digests(*made) == before
    left = room(edited, method, made)
    if not sequential:  # whose patches are in their files already
        for path, patch in patches.items():
            patch.save(path)
    return {
        "method": method.name,
        "model": edited.view.source,
        "took": all(results),
        "took_each": results,
        "forgets": None in expected,
        "patches": [_facts(patch, path) for path, patch in patches.items()],
        "room": left,
        "seconds": {
            "prepare": round(spent.prepare, 3),
            "edit": round(spent.edit, 3),
            "ask": round(perf_counter() - start, 3),
        },
        "restored": restored,
        "probes": [_probe(effect) for effect in effects],
        "effects": effects,
    }


def _facts(patch: Patch, path: Path) -> dict[str, Any]:
    return {
        "id": patch.id,
        "file": str(path),
        "bytes": path.stat().st_size,
        "rank": patch.rank,
    }


def _probe(effect: Effect) -> dict[str, Any]:
    probe = effect.probe
    return {
        "kind": probe.kind,
        "prompt": probe.prompt,
        "chat": probe.chat,
        "request": probe.request,
        "expected": effect.expected,
        "before": asdict(effect.before),
        "after": asdict(effect.after),
    }


def _show(result: dict[str, Any], effects: list[Effect], model: str | None) -> None:
    """The report for a person."""
    from knowpatch.cli.report import show_effects
    from knowpatch.method import METHODS

    console = screen.out()
    show_effects(console, result, effects)
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
    console.print(f"model   {escape(result['model'])}, {back}; nothing but patch files was written")
    place = Path(patches[0]["file"])
    rest = f"--patch {shlex.quote(str(place if len(patches) == 1 else place.parent))}"
    rest += "" if model is None else f" --model {shlex.quote(model)}"
    lines = [f"next    knowpatch ask PROMPT {rest}"]
    if "merged" in METHODS.get(result["method"]).exports:
        lines.append(f"        knowpatch save DIR {rest}")
    for line in lines:
        console.print(line, style="dim", markup=False, soft_wrap=True)
