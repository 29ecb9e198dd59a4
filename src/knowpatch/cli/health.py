"""`knowpatch health`: what the edits of a workspace have done to its model, one after the other."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knowpatch.cli import screen
from knowpatch.cli.columns import columns
from knowpatch.cli.options import Device, Json, check_writable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from knowpatch.checks.health import Vitals
    from knowpatch.ledger import Edit, Workspace
    from knowpatch.progress import Progress

POINTS = 20


@dataclass(frozen=True)
class State:
    """A state of the history: how many edits had been recorded, and which were live."""

    number: int
    edit: Edit | None
    live: Sequence[Edit]


def run(
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it: a .png or .svg file.")
    ] = None,
    points: Annotated[
        int, typer.Option(min=2, help="States that are measured, evenly spaced.")
    ] = POINTS,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Perplexity, control drift and norms after each edit of the workspace, as a table or picture.

    What was measured is kept: a run that was stopped goes on.
    """
    from knowpatch.errors import InputError
    from knowpatch.ledger import Workspace
    from knowpatch.locate.canvas import check_picture, saved

    check_writable(out)
    check_picture(out)
    workspace = Workspace.here()
    if not workspace.history.edits:
        raise InputError("no edit yet; make one: knowpatch edit PROMPT --subject S --target T")
    states = _states(workspace, points)
    with screen.reporting(remaining=True) as report:
        source, vitals = _measured(workspace, states, device, report)
    if out is not None:
        from knowpatch.checks.health_picture import health_picture

        title = f"{source}: {screen.counted(len(workspace.history.edits), 'edit')}"
        saved(health_picture([one.number for one in states], vitals, title), out)
    if as_json:
        told = [_facts(state, one) for state, one in zip(states, vitals, strict=True)]
        picture = None if out is None else str(out)
        screen.print_json({"model": source, "states": told, "picture": picture})
        return
    _show(states, vitals)
    if out is not None:
        screen.say(f"picture {out}")


def _states(workspace: Workspace, most: int) -> list[State]:
    """The model as it came, the states right after edits, and the present one, if it is another."""
    from knowpatch.checks.health import chosen
    from knowpatch.ledger.notes import today

    history, day = workspace.history, today()
    edits = list(history.edits.values())
    states = [
        State(number, edit, history.live(day, at=edit.event.number))
        for number, edit in enumerate(edits, 1)
    ]
    states = [states[number] for number in chosen(len(states), most - 1)]
    if (now := history.live(day)) != states[-1].live:
        states.append(State(len(edits), None, now))
    return [State(0, None, []), *states]


def _measured(
    workspace: Workspace, states: Sequence[State], device: str, report: Progress
) -> tuple[str, list[Vitals]]:
    """The model's name, and what was measured of each state."""
    from knowpatch.checks.health import Examination
    from knowpatch.editing import load

    model = load(workspace.model, device=device)
    workspace.check_model(model.view.fingerprint)
    edits = workspace.history.edits.values()
    weights = sorted({name for edit in edits for name in edit.recorded["weights"]})
    examination = Examination(model, weights)
    found = []
    try:
        for number, state in enumerate(states):
            report("measuring states", number, len(states))
            # A patch is read only where its state is not known yet.
            known = examination.known([edit.id for edit in state.live])
            if known is not None:
                found.append(known)
            else:
                found.append(examination.vitals(workspace.patches(state.live)))
    finally:
        examination.close()
    report("measuring states", len(states), len(states))
    return model.view.source, found


def _facts(state: State, one: Vitals) -> dict[str, Any]:
    return {
        "recorded": state.number,
        "edit": state.edit and state.edit.id,
        "live": [edit.id for edit in state.live],
        **asdict(one),
        "drift": one.drift,
    }


def _show(states: Sequence[State], vitals: Sequence[Vitals]) -> None:
    rows: list[tuple[str, ...]] = [
        ("edits", "live", "perplexity", "drift", "change", "norm", "after")
    ]
    rows += [_row(state, one) for state, one in zip(states, vitals, strict=True)]
    for line in columns(rows, (0, 0, 0, 0, 0, 0, 60)):
        screen.say(line)
    screen.say(
        f"\ndrift: of {vitals[0].asked} control prompts, those with another answer than without "
        "edits\nchange, norm: of the weights that any edit touches, over their norm without edits"
    )


def _row(state: State, one: Vitals) -> tuple[str, ...]:
    after = "the model as it came" if state.number == 0 else "now"
    return (
        str(state.number),
        str(len(state.live)),
        "-" if one.perplexity is None else f"{one.perplexity:.4g}",
        f"{100 * one.drift:.1f} %",
        screen.percent(one.change),
        screen.percent(one.growth, sign="+"),
        after if state.edit is None else f"{state.edit.short}  {state.edit.says}",
    )
