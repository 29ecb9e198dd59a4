"""`knowpatch show`: all that is recorded of an edit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from knowpatch.cli import screen
from knowpatch.cli.columns import columns
from knowpatch.cli.log import moment, state, what
from knowpatch.cli.options import Json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from knowpatch.ledger import Edit, Workspace

OTHERS = 8
"""Answers that moved, beside the edited ones, that are shown."""


def run(
    edit_id: Annotated[str, typer.Argument(metavar="ID", help="The beginning of an edit's id.")],
    as_json: Json = False,
) -> None:
    """Show what is recorded of an edit: request, method, who, why, and what it changed."""
    from knowpatch.ledger import Workspace
    from knowpatch.ledger.notes import today

    workspace = Workspace.here()
    edit = workspace.history.edit(edit_id)
    report = workspace.report(edit)
    probes = list(workspace.probes(edit, report))
    if as_json:
        body = {name: value for name, value in edit.recorded.items() if name != "report"}
        happened = [{"hash": event.hash, **event.body} for event in edit.touched[1:]]
        found = {**body, "state": state(edit, today()), "since": happened, "probes": probes}
        screen.print_json(found)
        return
    for line in columns(list(_lines(edit, workspace)), (0, 0)):
        screen.say(line)
    _show_probes(probes)


def _lines(edit: Edit, workspace: Workspace) -> Iterator[tuple[str, str]]:
    from knowpatch.ledger.notes import today

    made = edit.recorded
    yield "edit", edit.id
    yield "state", state(edit, today())
    yield "time", f"{moment(made['time'])} UTC"
    yield "author", made["author"]
    named = {"reason": made["reason"], "source": made["source"]}
    named |= {"valid from": edit.first_day, "valid until": edit.last_day}
    yield from ((name, value) for name, value in named.items() if value is not None)
    for number, request in enumerate(edit.requests[:OTHERS]):
        yield "" if number else "request", _request(request)
    if len(edit.requests) > OTHERS:
        yield "", f"... and {len(edit.requests) - OTHERS} more (--json has all)"
    yield "method", f"{made['method']}, seed {made['seed']}, knowpatch {made['version']}"
    yield "options", ", ".join(f"{n}={v}" for n, v in made["config"].items() if v is not None)
    yield "model", f"fingerprint {made['fingerprint'][:16]}"
    yield "changes", _changes(made)
    if made["took"] is not None:
        yield "took", "yes" if all(made["took"]) else f"{sum(made['took'])} of {len(made['took'])}"
    below = workspace.history.beneath(edit)
    names = " ".join(other.short for other in below[:6]) + (" ..." if len(below) > 6 else "")
    yield "on top of", f"{len(below)} edit(s): {names}" if below else "the model as it came"
    for event in edit.touched[1:]:
        why = f" ({event.body['reason']})" if event.body.get("reason") else ""
        when = moment(str(event.body["time"]))
        yield "since", f"{when} {event.body['author']}: {what(event, workspace)}{why}"


def _request(request: Mapping[str, Any]) -> str:
    about = f" (about {request['subject']})" if request.get("subject") else ""
    old = f", until now {request['old']}" if request.get("old") else ""
    return f"{request['prompt']} → {request['target']}{old}{about}"


def _changes(made: Mapping[str, Any]) -> str:
    rank = f", rank {made['rank']}" if made["rank"] else ""
    names = ", ".join(made["weights"][:4]) + (", ..." if len(made["weights"]) > 4 else "")
    count = len(made["weights"])
    what = f"{screen.counted(count, 'parameter')} ({names}){rank}" if count else "no weight"
    return f"{what}; {screen.human_bytes(made['bytes'])}"


def _show_probes(probes: list[dict[str, Any]]) -> None:
    """The answers to what was edited, and those that moved besides."""
    if not probes:
        return
    own = [p for p in probes if not p["kind"].startswith("locality")]
    others = [p for p in probes if p["kind"].startswith("locality")]
    moved = [p for p in others if p["before"]["text"] != p["after"]["text"]]
    rows = [("", "asked", "before", "after")]
    rows += [_answers(p) for p in own[:OTHERS]]
    screen.say("")
    for line in columns(rows, (18, 44, 24, 24)):
        screen.say(line)
    if not others:
        return
    screen.say(f"\nelse moved: {len(moved)} of {len(others)} answers")
    for line in columns([_answers(p) for p in moved[:OTHERS]], (18, 44, 24, 24)):
        screen.say(line)


def _answers(probe: Mapping[str, Any]) -> tuple[str, str, str, str]:
    way = ", chat" if probe["chat"] else ""
    kind = probe["kind"].removeprefix("locality.")
    return kind + way, probe["prompt"], probe["before"]["text"], probe["after"]["text"]
