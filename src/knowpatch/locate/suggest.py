"""Which blocks are worth editing: a pilot decides, and what locators say stands beside it.

There is no published recipe: ROME takes the peak of its traces and MEMIT the blocks up to it, and
Hase et al. (arXiv 2301.04213) found that traces do not predict where edits take. So a method is
tried at several depths on some pilot facts (pilot.py); the best place is compared, on other pilot
facts, with the method's own, which comes from published depths. Axes: L blocks, N prompts, I width.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knowpatch.bench.statistics import Paired, Summary, bootstrap, paired
from knowpatch.edited import EditedModel
from knowpatch.editing import choose
from knowpatch.files import kept_in, source_digest, write_atomically
from knowpatch.locate.facts import Fact
from knowpatch.locate.locators import Locator, located
from knowpatch.locate.overlap import spearman
from knowpatch.locate.pilot import (
    Pilot,
    Place,
    Record,
    measured,
    option_of,
    pilot_facts,
    places,
    score,
)
from knowpatch.method import EditMethod
from knowpatch.models.passes import Tap
from knowpatch.models.view import ModelView
from knowpatch.parts.attribution import ROLE, blocks_with_neurons
from knowpatch.progress import Progress, silent

NEAR = 0.7
"""Blocks whose located score is at least this share of the peak's go with it."""
SMOOTH = 3
"""Blocks of the moving average that the peak is looked for in."""
TELLING = 0.3
"""Below this rank correlation a curve does not predict."""
TOGETHER = 32
"""Prompts that are read in one pass."""


@dataclass(frozen=True)
class Tried:
    """One place, and what the pilot facts came to there.

    Attributes:
        records: of each fact; None where it could not be edited there.
        rates: means of the columns, with intervals.
        score: of these means, with its interval.
    """

    place: Place
    records: tuple[Record | None, ...]
    rates: dict[str, Summary]
    score: Summary


@dataclass(frozen=True)
class Suggestion:
    """What is suggested for one method and model.

    Attributes:
        tried: the method's own place first.
        best: the one with the highest score.
        judged: score of the best and of the own place on other facts; best less own, paired. None
            where the best is the method's own.
        curve: what a locator says of each block (L), if one was asked; its peak, and the span of
            blocks that MEMIT's rule takes from it.
        rho: rank correlation of curve and score over the places tried.
        auc: by block, how well the inputs of the MLP's output map tell paraphrases from neighbours.
    """

    tried: tuple[Tried, ...]
    best: Tried
    judged: tuple[Summary, Summary, Paired] | None
    curve: tuple[float, ...] | None
    peak: int | None
    span: tuple[int, ...]
    rho: float | None
    auc: dict[int, float]

    @property
    def own(self) -> Tried:
        return self.tried[0]

    @property
    def verdict(self) -> str:
        """How it compares with the method's own place, in one line."""
        if self.judged is None:
            return "the method's own place is the best of those tried"
        difference = self.judged[2].difference
        if difference.low is None or difference.high is None:
            return "on one fact nothing can be said"
        told = f"{difference.mean:+.2f} ({difference.low:+.2f} to {difference.high:+.2f})"
        words = f"score less the own place's on {difference.n} other facts: {told}"
        if difference.low > 0:
            return f"better than the method's own place; {words}"
        return f"no better than the method's own place, as far as this can tell; {words}"


def suggest(
    model: EditedModel,
    name: str,
    options: Mapping[str, Any],
    *,
    facts: int,
    how: Locator | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Suggestion:
    """Try a method at several depths.

    Args:
        name, options: of the method, without the blocks to edit.
        facts: pilot facts to choose by; as many others compare the choice with the method's own.
        how: a locator whose curve is set beside the scores.

    Raises:
        OptionError: the method has no option for blocks, or there are not so many facts.
    """
    method = choose(name, options, seed=seed)
    option_of(type(method))
    method.check(model.view)
    tries = places(method, len(model.view.roles.blocks))
    first, others = pilot_facts(facts), pilot_facts(facts, start=facts)
    steps, tried = len(tries) + 2, []
    for number, place in enumerate(tries):
        progress("trying blocks", number, steps)
        tried.append(_tried(place, kept_records(model, method, place, first)))
    best = max(tried, key=lambda one: one.score.mean)
    judged = None
    if best is not tried[0]:
        sides = []
        for number, one in enumerate((best, tried[0])):
            progress("trying blocks", len(tries) + number, steps)
            sides.append(kept_records(model, method, one.place, others))
        judged = _judged(sides[0], sides[1])
    progress("trying blocks", steps, steps)
    curve = None if how is None else _curve(model.view, how, first, progress)
    peak, span = (None, ()) if curve is None else by_curve(curve)
    return Suggestion(
        tried=tuple(tried),
        best=best,
        judged=judged,
        curve=curve,
        peak=peak,
        span=span,
        rho=None if curve is None else _rho(curve, tried),
        auc=separations(model.view, [*first, *others], progress),
    )


def kept_records(
    model: EditedModel, method: EditMethod, place: Place, facts: Sequence[Pilot]
) -> list[Record | None]:
    """What facts came to at a place: measured now, or found on disk."""
    there = at_place(method, place)
    content = [model.view.fingerprint, model.view.form, there.name, there.seed, source_digest()]
    content += [there.config.model_dump(mode="json"), [fact.request.prompt for fact in facts]]
    path = kept_in("pilots", json.dumps(content, sort_keys=True), ".json")
    with contextlib.suppress(OSError, ValueError):
        found: list[Record | None] = json.loads(path.read_text(encoding="utf-8"))
        return found
    records = measured(model, there, facts)
    write_atomically(path, json.dumps(records).encode())
    return records


def at_place(method: EditMethod, place: Place) -> EditMethod:
    """The method, editing there."""
    given = method.config.model_dump(exclude_unset=True)
    return type(method)(type(method).configure({**given, **place.options}), seed=method.seed)


def _tried(place: Place, records: Sequence[Record | None]) -> Tried:
    names = dict.fromkeys(name for record in records for name in record or ())
    rates = {
        name: bootstrap([{"value": record[name]} if record else None for record in records])
        for name in names
    }
    found = bootstrap(records, score) or Summary(0.0, None, None, 0)
    told = {name: summary for name, summary in rates.items() if summary is not None}
    return Tried(place, tuple(records), told, found)


def _judged(
    best: Sequence[Record | None], own: Sequence[Record | None]
) -> tuple[Summary, Summary, Paired] | None:
    sides = bootstrap(best, score), bootstrap(own, score)
    difference = paired(best, own, score)
    if sides[0] is None or sides[1] is None or difference is None:
        return None
    return sides[0], sides[1], difference


# -- what locators say -----------------------------------------------------------------------------


def _curve(
    view: ModelView, how: Locator, facts: Sequence[Pilot], progress: Progress
) -> tuple[float, ...] | None:
    """Mean positive scores (L) of the pilot facts' prompts, for what the model says of them."""
    asked = [Fact(one.request.prompt, one.request.subject or "") for one in facts]
    found = [one for one in located(view, how, asked, progress=progress) if one is not None]
    return tuple(torch.stack(found).clamp(min=0).mean(0).tolist()) if found else None


def by_curve(curve: Sequence[float]) -> tuple[int, tuple[int, ...]]:
    """The peak of a curve's moving average, and the blocks up to it that are near it (MEMIT's rule:
    the range ends at the last block that matters)."""
    scores_L, half = torch.tensor(curve, dtype=torch.float64), SMOOTH // 2
    inside = range(half, len(curve) - half)
    peak = max(inside, key=lambda i: float(scores_L[i - half : i + half + 1].mean()), default=0)
    least = NEAR * float(scores_L.max())
    first = peak
    while first > 0 and curve[first - 1] >= least and peak - first + 1 < 5:
        first -= 1
    return peak, tuple(range(first, peak + 1))


def _rho(curve: Sequence[float], tried: Sequence[Tried]) -> float | None:
    """Rank correlation, over the places tried, of a curve's mean there and the score."""
    there = [float(np.mean([curve[block] for block in one.place.blocks])) for one in tried]
    scores = [one.score.mean for one in tried]
    if len(set(there)) < 2 or len(set(scores)) < 2:
        return None
    return float(spearman(torch.tensor([there]), torch.tensor([scores])))


def separations(
    view: ModelView, facts: Sequence[Pilot], progress: Progress = silent
) -> dict[int, float]:
    """By block, the chance that a paraphrase is nearer to its prompt than a prompt about another
    subject is: area under the curve of distances between what enters the MLP's output map at the
    last token. What a memory at this block could recognise."""
    blocks = blocks_with_neurons(view)
    if not blocks:
        return {}
    prompts = [fact.request.prompt for fact in facts]
    groups = [list(fact.paraphrases) for fact in facts], [list(fact.neighbours) for fact in facts]
    every = [*prompts, *(text for group in groups for some in group for text in some)]
    read = _ends(view, blocks, every, progress)
    found = {}
    for number, block in enumerate(blocks):
        at = {text: read[number][i] for i, text in enumerate(every)}
        inside, outside = (
            [
                float((at[prompt] - at[text]).norm())
                for prompt, some in zip(prompts, group, strict=True)
                for text in some
            ]
            for group in groups
        )
        found[block] = auc(inside, outside)
    return found


def _ends(
    view: ModelView, blocks: Sequence[int], prompts: Sequence[str], progress: Progress
) -> list[Tensor]:
    """For each block what enters its map at each prompt's last token (N, I), float32."""
    taps = [Tap(view.roles.linear(ROLE, block).module, "input") for block in blocks]
    parts: list[list[Tensor]] = [[] for _ in taps]
    for start in range(0, len(prompts), TOGETHER):
        progress("reading prompts", start, len(prompts))
        rows = [view.encode(text).ids for text in prompts[start : start + TOGETHER]]
        run = view.run(rows, taps=taps)
        ends = [(i, len(row) - 1) for i, row in enumerate(rows)]
        for part, tap in zip(parts, taps, strict=True):
            part.append(run.at(tap, ends).cpu())
    progress("reading prompts", len(prompts), len(prompts))
    return [torch.cat(part) for part in parts]


def auc(inside: Sequence[float], outside: Sequence[float]) -> float:
    """Share of pairs in which the distance inside is smaller; equal ones count half."""
    gaps = np.subtract.outer(np.asarray(inside), np.asarray(outside))
    return float(((gaps < 0) + 0.5 * (gaps == 0)).mean())
