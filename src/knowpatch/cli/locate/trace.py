"""`knowpatch locate trace`: which outputs, put back, bring a forgotten answer back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knowpatch.cli import screen
from knowpatch.cli.data import Data
from knowpatch.cli.locate import effects
from knowpatch.cli.locate.effects import Wanted
from knowpatch.cli.locate.options import (
    From,
    Limit,
    Picture,
    Prompt,
    RowsFile,
    Samples,
    Scale,
    Subject,
    Window,
    check_kind,
    check_places,
    facts_of,
    told,
)
from knowpatch.cli.options import Device, Dtype, Json, Model, Seed

if TYPE_CHECKING:
    from knowpatch.locate.averages import Curve
    from knowpatch.locate.rows import Row
    from knowpatch.locate.studies import Found

SEVERED = "severed"
UNIT = "effect on p(answer)"
CUT = "State at the subject's last token restored, the MLPs or attentions above severed"


def run(
    prompt: Prompt = None,
    subject: Subject = None,
    source: From = None,
    data: Data = None,
    limit: Limit = None,
    kind: Annotated[
        str,
        typer.Option(
            help="What is restored: state, mlp or attn; severed: states, while MLPs or attentions "
            "stay corrupted."
        ),
    ] = "state",
    window: Window = 10,
    samples: Samples = 10,
    noise: Scale = 3.0,
    seed: Seed = 0,
    out: Picture = None,
    rows: RowsFile = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Causal tracing: noise on the subject takes the answer away; what brings it back?

    Of many facts those that the model knows are traced, and averaged by token role; a run that was
    stopped goes on.
    """
    from knowpatch.editing import load
    from knowpatch.locate import studies
    from knowpatch.locate.noise import Noise

    facts = facts_of(prompt, subject, source, data)
    restored = check_kind(kind, SEVERED)
    check_places(out, rows, source)
    with screen.reporting(remaining=source is not None) as report:
        edited = load(model, device=device, dtype=dtype, progress=report)
        view = edited.view
        drawn = Noise.of(view, scale=noise, draws=samples, seed=seed)
        if kind == SEVERED:
            study = studies.severed(view, drawn)
        else:
            study = studies.tracing(view, drawn, kind=restored, window=window)
        what = CUT if kind == SEVERED else told(study.settings)
        wanted = Wanted(view.source, study, what, UNIT, out, rows, as_json)
        if source is None:
            row = study.find(facts[0], every=True, progress=report)
        else:
            found = studies.run(edited, facts, study, most=limit, progress=report)
            found.check()
    if source is None:
        (_tell_severed if kind == SEVERED else effects.tell_one)(wanted, row)
    else:
        (_tell_many_severed if kind == SEVERED else effects.tell_many)(wanted, found)


def _tell_severed(wanted: Wanted, row: Row) -> None:
    """One prompt's curves."""
    from knowpatch.locate.canvas import saved
    from knowpatch.locate.severed import shares
    from knowpatch.locate.trace_picture import curves_picture

    found = shares([row])
    if wanted.out is not None:
        saved(curves_picture(_named(found.effects), wanted.heading(row), wanted.unit), wanted.out)
    if wanted.as_json:
        screen.print_json({"model": wanted.model, **wanted.study.settings, **row})
        return
    console = screen.out()
    effects.show_prompt(console, wanted, row)
    console.print(effects.curve_table(found.effects, "severed", wanted.unit))
    effects.show_files(console, wanted)


def _tell_many_severed(wanted: Wanted, found: Found) -> None:
    """The curves' averages, and what severing takes away."""
    from knowpatch.locate.canvas import saved
    from knowpatch.locate.severed import shares
    from knowpatch.locate.trace_picture import curves_picture

    over = shares(found.rows)
    if wanted.out is not None:
        title = wanted.heading_of(found)
        saved(curves_picture(_named(over.effects), title, wanted.unit), wanted.out)
    plain: dict[str, Any] = {
        "severed": {cut: curve.facts() for cut, curve in over.effects.items()},
        "lost": {cut: curve.facts() for cut, curve in over.lost.items()},
        "share_lost": {cut: effects.summary_facts(one) for cut, one in over.share.items()},
    }
    if effects.finish(wanted, found, plain):
        return
    console = screen.out()
    effects.show_found(console, wanted, found)
    console.print(effects.curve_table(over.effects, "severed", wanted.unit))
    for cut, share in over.share.items():
        console.print(
            f"share of the effect in the lower half of the layers that is lost without {cut}: "
            f"{effects.interval(share)}"
        )
    effects.show_files(console, wanted)


def _named(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """Curves by what a legend calls them."""
    return {f"{cut} severed": curve for cut, curve in curves.items()}
