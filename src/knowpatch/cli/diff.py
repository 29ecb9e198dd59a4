"""`knowpatch diff`: what differs between two states of the workspace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from knowpatch.cli import screen
from knowpatch.cli.columns import columns
from knowpatch.cli.options import Device, Dtype, Json

if TYPE_CHECKING:
    from knowpatch.ledger import Edit, Workspace
    from knowpatch.ledger.weights import Difference

MOST_SHOWN = 20


def run(
    first: Annotated[
        str, typer.Argument(metavar="A", help="A state: an edit's id, a tag, base or now.")
    ] = "base",
    second: Annotated[str, typer.Argument(metavar="B", help="Another.")] = "now",
    weights: Annotated[
        bool, typer.Option("--weights", help="Weights only: no model is loaded.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Tell which edits, which weights and which answers differ between two states.

    A state is what was live right after an edit was recorded, or when a tag was set.
    """
    from knowpatch.ledger import Workspace
    from knowpatch.ledger.weights import differences

    workspace = Workspace.here()
    history = workspace.history
    states = [history.live(at=history.state(name)) for name in (first, second)]
    changed = differences(workspace.folder, *states)
    answers = None if weights else _answers(workspace, *states, device=device, dtype=dtype)
    gone, new = ([e for e in one if e not in other] for one, other in (states, states[::-1]))
    if as_json:
        screen.print_json(
            {
                "only_a": [edit.id for edit in gone],
                "only_b": [edit.id for edit in new],
                "weights": [_facts(difference) for difference in changed],
                "answers": answers,
            }
        )
        return
    _show(first, second, gone, new, changed, answers)


def _facts(difference: Difference) -> dict[str, Any]:
    dim, start, stop = difference.part
    return {
        "parameter": difference.parameter,
        "part": None if (start, stop) == (0, None) else {"dim": dim, "start": start, "stop": stop},
        "rank": difference.rank,
        "norm": difference.norm,
        "edits": difference.edits,
    }


def _answers(
    workspace: Workspace, first: list[Edit], second: list[Edit], *, device: str, dtype: str
) -> dict[str, Any]:
    """What was edited in either state, and the control prompts, asked in both."""
    from knowpatch.data.case import Probe
    from knowpatch.editing import load
    from knowpatch.ledger.standing import asked_in, questions
    from knowpatch.probes import CONTROL, controls

    edits = list({edit.id: edit for edit in (*first, *second)}.values())
    probes = [probe for edit in edits for probe in questions(edit)]
    asked = {probe.prompt for probe in probes}
    probes += [Probe(CONTROL, prompt) for prompt in controls() if prompt not in asked]
    with screen.reporting() as report:
        edited = load(workspace.model, device=device, dtype=dtype, progress=report)
        if edits:
            workspace.check_model(edited.view.fingerprint)
        patches = [workspace.patches(state) for state in (first, second)]
        effects = asked_in(edited, probes, *patches, progress=report)
    moved = [
        {
            "kind": effect.probe.kind,
            "prompt": effect.probe.prompt,
            "a": effect.before.text,
            "b": effect.after.text,
        }
        for effect in effects
        if effect.moved
    ]
    return {"asked": len(effects), "differ": moved}


def _show(
    first: str,
    second: str,
    gone: list[Edit],
    new: list[Edit],
    changed: list[Difference],
    answers: dict[str, Any] | None,
) -> None:
    for sign, name, edits in (("-", first, gone), ("+", second, new)):
        for edit in edits:
            screen.say(f"{sign} {edit.short}  {edit.says}  (only in {name})")
    if not gone and not new:
        screen.say(f"{first} and {second} are the same edits")
    screen.say(f"\nweights: {len(changed)} differ" if changed else "\nweights: none differ")
    rows = [("parameter", "rank", "norm of the difference", "edits")]
    rows += [
        (d.parameter, "full" if d.rank is None else str(d.rank), f"{d.norm:.4g}", str(len(d.edits)))
        for d in changed[:MOST_SHOWN]
    ]
    for line in columns(rows if changed else [], (60, 0, 0, 0)):
        screen.say(f"  {line}")
    if answers is None:
        return
    differ = answers["differ"]
    screen.say(f"\nanswers: {len(differ)} of {answers['asked']} differ")
    rows = [(d["prompt"], d["a"], "→", d["b"]) for d in differ[:MOST_SHOWN]]
    for line in columns(rows, (48, 28, 1, 28)):
        screen.say(f"  {line}")
    if len(differ) > MOST_SHOWN:
        screen.say(f"  ... and {len(differ) - MOST_SHOWN} more (--json has all)")
