"""`knowpatch locate attribute`: every restoration's effect, estimated by one backward pass."""

from __future__ import annotations

from typing import Annotated

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

UNIT = "effect on log p(answer)"
RANKS = "rank correlation with exact tracing"


def run(
    prompt: Prompt = None,
    subject: Subject = None,
    source: From = None,
    data: Data = None,
    limit: Limit = None,
    kind: Annotated[str, typer.Option(help="What is restored: state, mlp or attn.")] = "state",
    window: Window = 10,
    samples: Samples = 10,
    noise: Scale = 3.0,
    seed: Seed = 0,
    points: Annotated[
        int,
        typer.Option(min=1, help="Runs between corrupted and clean whose gradients are averaged."),
    ] = 1,
    exact: Annotated[
        bool, typer.Option("--exact", help="Trace exactly, too, and correlate the ranks.")
    ] = False,
    out: Picture = None,
    rows: RowsFile = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Attribution patching: an estimate of what `locate trace` computes, by one backward pass.

    The unit is nats: what log p(answer) would gain.
    """
    from knowpatch.bench.statistics import bootstrap
    from knowpatch.editing import load
    from knowpatch.locate import studies
    from knowpatch.locate.averages import design_of
    from knowpatch.locate.noise import Noise

    facts = facts_of(prompt, subject, source, data)
    restored = check_kind(kind)
    check_places(out, rows, source)
    with screen.reporting(remaining=source is not None) as report:
        edited = load(model, device=device, dtype=dtype, progress=report)
        view = edited.view
        drawn = Noise.of(view, scale=noise, draws=samples, seed=seed)
        study = studies.attribution(
            view, drawn, kind=restored, window=window, points=points, exact=exact
        )
        what = f"{told(study.settings)}, by estimate"
        wanted = Wanted(view.source, study, what, UNIT, out, rows, as_json)
        if source is None:
            row = study.find(facts[0], every=True, progress=report)
        else:
            found = studies.run(edited, facts, study, most=limit, progress=report)
            found.check()
    if source is None:
        effects.tell_one(wanted, row)
        if exact and not as_json:
            screen.out().print(f"{RANKS}: {row[studies.CORRELATION]:.3f}")
        return
    records = [{"value": one[studies.CORRELATION]} for one in found.rows] if exact else []
    ranks = bootstrap(records, design=design_of(found.rows)) if exact else None
    effects.tell_many(wanted, found, {RANKS: ranks} if exact else None)
