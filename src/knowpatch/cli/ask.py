"""`knowpatch ask`: the answer without and with patches."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from knowpatch.cli import screen
from knowpatch.cli.options import (
    Day,
    Device,
    Dtype,
    Json,
    Model,
    Patches,
    day_of,
    read_patches,
    workspace_for,
)

if TYPE_CHECKING:
    from knowpatch.models.sites import Firing
    from knowpatch.patch import Patch
    from knowpatch.stepping import Generated

log = logging.getLogger(__name__)


def run(
    prompt: Annotated[str, typer.Argument(help="The question, or the beginning of a text.")],
    patch: Patches = None,
    model: Model = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the chat template.")] = False,
    why: Annotated[
        bool, typer.Option("--why", help="Say which patch acted on the answer, and by what score.")
    ] = False,
    on: Day = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Ask a model, without and with patches; in a workspace, with its live edits."""
    from knowpatch.ask import Ask
    from knowpatch.editing import load
    from knowpatch.errors import InputError
    from knowpatch.models.sites import listening

    if not prompt.strip():
        raise InputError("the prompt is empty; give a question")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError("the prompt is not text in UTF-8; give it in UTF-8") from None
    given, workspace, day = read_patches(patch), workspace_for(patch, on), day_of(on, "--on")
    name = workspace.model if workspace is not None and model is None else model
    with screen.reporting() as report:
        edited = load(name, device=device, dtype=dtype, progress=report)
        if workspace is not None and not workspace.is_of(edited.view.fingerprint):
            log.warning("another model than this workspace's: it is asked without its edits")
            workspace = None
        patches = given if workspace is None else workspace.patches(workspace.live(day))

        def said() -> Generated:
            ask = Ask(edited, progress=report)
            return ask.generate(prompt, max_new_tokens=max_new_tokens, chat=chat).result()

        without = said()
        with edited.applied(*patches), listening() as heard:
            changed = said() if patches else None
    facts: dict[str, Any] = {
        "model": edited.view.source,
        "prompt": prompt,
        "patches": [item.id for item in patches],
        "workspace": None if workspace is None else str(workspace.folder),
        "without": without.text.strip(),
        "with": None if changed is None else changed.text.strip(),
    }
    if why:
        facts["why"] = reasons(patches, heard)
        steps = () if changed is None else changed.steps
        facts["steps"] = [{"kind": step.kind, "text": step.text} for step in steps]
    if as_json:
        screen.print_json(facts)
        return
    _show(facts)


def reasons(patches: Sequence[Patch], heard: Sequence[Firing]) -> list[dict[str, Any]]:
    """For each patch what it did to the answer: the first word of each of its wraps counts."""
    found: list[dict[str, Any]] = []
    for patch in patches:
        mine = {"patch": patch.id, "method": patch.provenance.method}
        if patch.deltas:
            found.append({**mine, "how": "weights", "fired": True})
        if patch.procedure is not None:
            found.append({**mine, "how": patch.procedure.kind, "fired": True})
        said = [firing for firing in heard if firing.patch == patch]
        kinds = [part.kind for part in (patch.rule, *patch.wraps) if part is not None]
        for kind in dict.fromkeys(kinds):
            told = sorted((f for f in said if f.kind == kind), key=lambda f: not f.fired)
            found += [{**mine, "how": kind, "fired": False}] if not told else []
            found += [{**mine, "how": kind, **_facts(first)} for first in told[:1]]
    return found


def _facts(firing: Firing) -> dict[str, Any]:
    return {
        "fired": firing.fired,
        "measure": firing.measure,
        "score": firing.score,
        "threshold": firing.threshold,
        "module": firing.module,
        "what": firing.what,
    }


def _show(facts: dict[str, Any]) -> None:
    console = screen.out()
    console.print(f"[dim]{escape(facts['model'])}[/]")
    console.print("[bold]without[/]" if facts["patches"] else "[bold]answer[/]")
    console.print(facts["without"], markup=False)
    if facts["with"] is not None:
        console.print(f"\n[bold]with {escape(_named(facts))}[/]")
        console.print(facts["with"], markup=False)
    elif facts["workspace"]:
        console.print("no edit is live in this workspace", style="dim")
    if "why" in facts:
        console.print("\n[bold]why[/]" if facts["why"] else "\n[bold]why[/] no patch was given")
    for reason in facts.get("why", ()):
        console.print("  " + _line(reason), markup=False, soft_wrap=True)
    for step in facts.get("steps", ()):
        console.print(f"  {step['kind']:<9} {step['text']}", markup=False, soft_wrap=True)


def _named(facts: Mapping[str, Any]) -> str:
    """What the changed answer is given with."""
    ids = [item[:12] for item in facts["patches"]]
    names = ", ".join(ids[:4]) + (", ..." if len(ids) > 4 else "")
    if facts["workspace"] is None:
        return names
    return f"the {len(ids)} live edit{'s' if len(ids) > 1 else ''} of this workspace ({names})"


def _line(reason: Mapping[str, Any]) -> str:
    name = f"{reason['patch'][:12]} ({reason['method']})"
    if reason["how"] == "weights":
        return f"{name} acts on every answer: it changes weights"
    did = "fired" if reason["fired"] else "did not fire"
    if reason["fired"] and "score" not in reason:
        return f"{name} answered in steps ({reason['how']}):"
    if "score" not in reason:
        return f"{name} {did} ({reason['how']}): others are nearer"
    what = f" ({reason['what']})" if reason["what"] else ""
    if reason["score"] is None:
        return f"{name} {did}: always put before the question{what}"
    score, threshold = reason["score"], reason["threshold"]
    return f"{name} {did}: {reason['measure']} {score:.3g}, threshold {threshold:.3g}{what}"
