"""`knowpatch log`: the edits of a workspace, the newest first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from knowpatch.cli import screen
from knowpatch.cli.columns import columns
from knowpatch.cli.options import Day, Json, day_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import date

    from knowpatch.ledger import Edit, Workspace
    from knowpatch.ledger.chain import Event

SHOWN = 30


def run(
    number: Annotated[
        int | None,
        typer.Option("-n", min=1, help=f"How many are shown; by default {SHOWN}, as JSON all."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show all.")] = False,
    live: Annotated[bool, typer.Option("--live", help="Only those that are live.")] = False,
    on: Day = None,
    events: Annotated[
        bool, typer.Option("--events", help="Everything that happened: reverts and tags, too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the edits of the workspace, the newest first."""
    from knowpatch.errors import OptionError
    from knowpatch.ledger import Workspace
    from knowpatch.ledger.notes import today

    if events and (live or on):
        raise OptionError("give either --events, or --live or --on: events are of all days")
    day = day_of(on, "--on") or today()
    workspace = Workspace.here()
    most = None if everything else number or (None if as_json else SHOWN)
    if events:
        _list_events(workspace, as_json=as_json, most=most)
        return
    edits = workspace.live(day) if live or on else list(workspace.history.edits.values())
    edits.reverse()
    shown = edits[:most]
    if as_json:
        screen.print_json([facts(edit, day) for edit in shown])
        return
    if not edits:
        screen.say(_none(workspace, day))
        return
    head = ("id", "time", "author", "method", "state", "prompt → target", "reason")
    rows = [head, *(_row(edit, day) for edit in shown)]
    for line in columns(rows, (12, 16, 14, 16, 0, 60, 40)):
        screen.say(line)
    if len(shown) < len(edits):
        screen.say(f"... and {len(edits) - len(shown)} earlier; -n N or --all shows more")


def _none(workspace: Workspace, day: date) -> str:
    if workspace.history.edits:
        return f"no edit is live on {day}; knowpatch log lists all"
    return "no edit yet; make one: knowpatch edit PROMPT --subject S --target T -m REASON"


def facts(edit: Edit, day: date) -> dict[str, Any]:
    """An edit as plain data, without what is long (config, and what was measured)."""
    names = ("time", "author", "method", "reason", "source", "took")
    return {
        "id": edit.id,
        **{name: edit.recorded[name] for name in names},
        "valid_from": edit.first_day,
        "valid_until": edit.last_day,
        "state": state(edit, day),
        "requests": list(edit.requests),
    }


def state(edit: Edit, day: date) -> str:
    """live, reverted, or on which days it would be live, if not on this one."""
    if not edit.live:
        return "reverted"
    if edit.valid_on(day):
        return "live"
    if edit.first_day is not None and edit.first_day > day.isoformat():
        return f"from {edit.first_day}"
    return f"until {edit.last_day}"


def _row(edit: Edit, day: date) -> tuple[str, ...]:
    made = edit.recorded
    return (
        edit.short,
        moment(made["time"]),
        made["author"],
        made["method"],
        state(edit, day),
        edit.says,
        made["reason"] or "",
    )


def moment(time: str) -> str:
    """A recorded time, as it is read: in UTC, to the minute."""
    return time[:16].replace("T", " ")


def _list_events(workspace: Workspace, *, as_json: bool, most: int | None) -> None:
    events = workspace.events[::-1][:most]
    if as_json:
        screen.print_json([{"hash": event.hash, **event.body} for event in events])
        return
    head = ("event", "time", "author", "what", "reason")
    rows = [head, *(_told(event, workspace) for event in events)]
    for line in columns(rows, (12, 16, 14, 72, 40)):
        screen.say(line)


def _told(event: Event, workspace: Workspace) -> tuple[str, ...]:
    body = event.body
    return (
        event.hash[:12],
        moment(str(body["time"])),
        str(body["author"]),
        what(event, workspace),
        str(body.get("reason") or ""),
    )


def what(event: Event, workspace: Workspace) -> str:
    """What an event did, in words."""
    body = event.body
    if event.kind == "edit":
        edit = workspace.history.edits[body["patch"]]
        gone = f", reverts {_names(body['reverts'])}" if body["reverts"] else ""
        return f"edit {edit.short}{gone}{_ended(body)}: {edit.says}"
    if event.kind == "tag":
        return f"tag {body['name']}"
    if event.kind in ("apply", "revert"):
        parts = [f"apply {_names(body['applies'])}"] if body["applies"] else []
        parts += [f"revert {_names(body['reverts'])}"] if body["reverts"] else []
        return ", ".join(parts) + _ended(body)
    if event.kind == "trust":
        return f"trust {len(body['keys'])} key(s)"
    return f"init, for {body['model'] or 'the bundled model'}"


def _ended(body: Mapping[str, Any]) -> str:
    return "".join(f", ends {name[:12]} on {day}" for name, day in body["ends"].items())


def _names(ids: list[str]) -> str:
    return " ".join(name[:12] for name in ids)
