"""Edit, edit back: what does not return (KnowEdit, arXiv 2401.01286, Figure 10).

After RoundEdit (Li et al., arXiv 2310.02129): a fact's object o is edited to another one, and, on
the model as it then is, back to o. Measured are the two edits (`success`), how the probabilities of
all true objects of the question differ from what they were (Jensen-Shannon distortion, and how many
of the others fell), what is left in the weights, and what moved on control prompts. The same after
both patches are dropped, which is the other way back.

An object's probability is exp(mean log-probability of its tokens), averaged over the prompt and its
rephrases. Axes: N asked places, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from knowpatch.ask import Ask
from knowpatch.data.case import LOCALITY, REPHRASE, Case
from knowpatch.edited import EditedModel
from knowpatch.editing import edit
from knowpatch.errors import DataError, OptionError
from knowpatch.method import EditMethod
from knowpatch.models.passes import Distributions
from knowpatch.patch import Patch
from knowpatch.probes import controls
from knowpatch.request import EditRequest

IGNORED = 0.5
"""A fact fails if more than this share of its other objects fell."""


@dataclass(frozen=True)
class Trip:
    """One fact to edit there and back.

    Attributes:
        id: of the case.
        there, back: the two requests.
        prompts: the prompt and its rephrases.
        others: the other true objects.
    """

    id: str
    there: EditRequest
    back: EditRequest
    prompts: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def old(self) -> str:
        return self.back.target


def trips(cases: Sequence[Case], limit: int | None = None) -> list[Trip]:
    """The trips of cases that have one request, whose old answer is known.

    Raises:
        DataError: none of them has.
    """
    found = []
    for case in cases:
        if len(case.requests) != 1 or case.requests[0].old is None:
            continue
        there = case.requests[0]
        back = there.model_copy(update={"target": there.old, "old": there.target})
        reworded = [probe.prompt for probe in case.of(REPHRASE)]
        same = [probe for probe in case.of(LOCALITY) if probe.prompt == there.prompt]
        others = dict.fromkeys(one for probe in same for one in probe.aliases)
        kept = tuple(one for one in others if one not in (there.old, there.target))
        found.append(Trip(case.id, there, back, (there.prompt, *reworded), kept))
    if not found:
        raise DataError("no case has one edit whose old answer is given: nothing to edit back to")
    return found[:limit]


def divergence(p: Sequence[float], q: Sequence[float]) -> float:
    """Jensen-Shannon divergence of two lists, each made to sum to one, in nats."""
    one, other = ([value / sum(values) for value in values] for values in (p, q))
    total = 0.0
    for a, b in zip(one, other, strict=True):
        middle = (a + b) / 2
        total += sum(x * math.log(x / middle) for x in (a, b) if x > 0) / 2
    return max(total, 0.0)


def fallen(before: Sequence[float], after: Sequence[float]) -> float | None:
    """Share of the probabilities that are lower after than before; None of none."""
    if not before:
        return None
    return sum(b < a for a, b in zip(before, after, strict=True)) / len(before)


@dataclass(frozen=True)
class Standing:
    """How a model stands to one fact.

    Attributes:
        objects: probability of each object by its text.
        said_NV: log-probabilities behind the control prompts.
    """

    objects: Mapping[str, float]
    said_NV: Tensor

    def kl(self, now: Standing) -> float:
        """KL divergence of what is said now from what was, in nats, mean over control prompts."""
        gaps_NV = self.said_NV.exp() * (self.said_NV - now.said_NV)
        return max(float(gaps_NV.sum(-1).mean()), 0.0)


def standing(model: EditedModel, trip: Trip) -> Standing:
    """Ask the model, with whatever is live."""
    ask, objects = Ask(model), (trip.old, trip.there.target, *trip.others)
    # Whole distributions are never taken from what is kept on disk of the unedited model: whether
    # dropping gives it back is to be asked, not assumed.
    scores = {
        one: [ask.forced(prompt, one, Distributions).read(_probability) for prompt in trip.prompts]
        for one in objects
    }
    asked = [prompt for prompt in controls() if prompt != trip.there.prompt]
    # Which token is forced does not matter: it is the place's distribution that is kept.
    said = [ask.forced(prompt, [0], Distributions).read(_distribution) for prompt in asked]
    ask.run()
    return Standing(
        {name: fmean(future.result() for future in futures) for name, futures in scores.items()},
        torch.stack([future.result() for future in said]),
    )


def _probability(found: Distributions) -> float:
    return math.exp(found.mean_logprob)


def _distribution(found: Distributions) -> Tensor:
    return found.logprobs_NV[0].cpu()


def round_trip(model: EditedModel, method: EditMethod, trip: Trip) -> dict[str, Any]:
    """One fact edited there and back, as a row; the model is given back as it was.

    Raises:
        InputError, EditError: as `edit`; OptionError: the method answers by a procedure.
    """
    before = standing(model, trip)
    first = edit(model, trip.there, method=method)
    if first.procedure is not None:
        raise OptionError(f"{method.name} answers by a procedure: no answer can be forced")
    digests = model.digests(first)
    with model.growing() as add:
        add(first)
        there = standing(model, trip)
        second = edit(model, trip.back, method=method)
        digests |= {name: d for name, d in model.digests(second).items() if name not in digests}
        if second not in model.live:
            add(second)
        back = standing(model, trip)
    dropped = standing(model, trip)
    same = model.digests(first, second) == digests if digests else True
    new, old = trip.there.target, trip.old
    took = float(there.objects[new] > there.objects[old])
    returned = float(back.objects[old] > back.objects[new])
    return {
        "case": trip.id,
        "method": method.name,
        "there": took,
        "back": returned,
        "success": (took + returned) / 2,
        "edited_back": _left(trip, before, back),
        "dropped": {**_left(trip, before, dropped), "bytes_same": same},
        "kl_there": before.kl(there),
        **between(first, second, model),
    }


def _left(trip: Trip, before: Standing, after: Standing) -> dict[str, float | None]:
    """What differs between two standings to one fact."""
    names = (trip.old, *trip.others)
    p, q = ([one.objects[name] for name in names] for one in (before, after))
    distortion = divergence(p, q) if trip.others else None
    return {
        "distortion": distortion,
        # As the published program has it: divided by the number of objects.
        "distortion_published": None if distortion is None else distortion / len(names),
        "ignored": fallen(p[1:], q[1:]),
        "kl": before.kl(after),
    }


def between(first: Patch, second: Patch, model: EditedModel) -> dict[str, float | None]:
    """What two changes leave in the weights: their sum over the first (0: back), and their cosine
    (-1: back). None where no weight changes."""
    sums = {"first": 0.0, "second": 0.0, "both": 0.0, "dot": 0.0}
    names = {delta.address.parameter for patch in (first, second) for delta in patch.deltas}
    for name in sorted(names):
        one, other = (_change(patch, name, model) for patch in (first, second))
        sums["first"] += float(one.square().sum())
        sums["second"] += float(other.square().sum())
        sums["both"] += float((one + other).square().sum())
        sums["dot"] += float((one * other).sum())
    if not sums["first"] or not sums["second"]:
        return {"weights_left": None, "cosine": None}
    return {
        "weights_left": math.sqrt(sums["both"] / sums["first"]),
        "cosine": sums["dot"] / math.sqrt(sums["first"] * sums["second"]),
    }


def _change(patch: Patch, name: str, model: EditedModel) -> Tensor:
    """A patch's whole change of one parameter, float64."""
    whole = torch.zeros(model.view.parameter(name).shape)
    for delta in patch.deltas:
        if delta.address.parameter == name:
            whole = delta.added_to(whole)
    return whole.double()
