"""A pilot: facts edited at one block after another, and how well each block takes them.

A block's score is the harmonic mean of three rates, less half of how large a change is beside its
matrix:

    success     the new answer is likelier than the old one
    paraphrase  the same behind other wordings of the prompt
    kept        the likeliest next token behind prompts about other subjects is what it was

The facts are counterfactuals that ship with the library (parts/pilots.py), part of no benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from knowpatch.ask import Ask
from knowpatch.edited import EditedModel
from knowpatch.editing import edit_each
from knowpatch.errors import EditError, OptionError
from knowpatch.locate.change import changed
from knowpatch.method import EditMethod
from knowpatch.parts.calibration import BANK, about_others
from knowpatch.parts.depths import between
from knowpatch.parts.pilots import pilots
from knowpatch.patch import Patch
from knowpatch.probes import LEAD_INS, rephrased
from knowpatch.request import EditRequest

SHARES = (0.1, 0.2, 0.3, 0.4, 0.533, 0.667, 0.8, 0.9)
"""Blocks that are tried, as shares of the depth."""
WIDEST = 5
"""Blocks that are edited together at most, where a method edits several."""
LAST = 2
"""Blocks at the end in which an edit at the subject cannot reach the answer any more."""
COST = 0.5
"""What a score loses for a change as large as the matrix."""
RATES = ("success", "paraphrase", "kept")
NORM = "norm"

Record = dict[str, float]


@dataclass(frozen=True)
class Pilot:
    """One fact to try.

    Attributes:
        request: the edit.
        paraphrases: the prompt in other words; neighbours: prompts about other subjects.
    """

    request: EditRequest
    paraphrases: tuple[str, ...]
    neighbours: tuple[str, ...]


def pilot_facts(count: int, start: int = 0) -> list[Pilot]:
    """So many of the facts that ship with the library, from one on.

    Raises:
        OptionError: there are not so many that have paraphrases.
    """
    if start + count > BANK:
        raise OptionError(f"{start + count} pilot facts are asked for, there are {BANK}")
    others, reworded = about_others(), rephrased()
    found = []
    for number in range(start, start + count):
        request = pilots(BANK)[number]
        lead_ins = [f"{lead} {_lower(request)}" for lead in LEAD_INS]
        near = tuple(one.prompt for one in others[number])
        found.append(Pilot(request, (reworded[number], *lead_ins), near))
    return found


def _lower(request: EditRequest) -> str:
    """The prompt as it goes on in a sentence; a subject that opens it keeps its capital."""
    opens = request.prompt.startswith(request.subject or "\0")
    return request.prompt if opens else request.prompt[0].lower() + request.prompt[1:]


# -- where -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Blocks to edit, and the option of a method that says so.

    Attributes:
        blocks: from low to high.
        options: to be given to the method; none where that is what it edits anyway.
    """

    blocks: tuple[int, ...]
    options: dict[str, Any]

    @property
    def setting(self) -> str:
        """As the command line takes it; nothing where nothing has to be said."""
        return " ".join(f"--set {name}={_told(value)}" for name, value in self.options.items())


def _told(value: Any) -> str:
    return f"{value[0]}-{value[-1]}" if isinstance(value, list) else str(value)


def option_of(method: type[EditMethod]) -> str:
    """The option that says which blocks a method edits.

    Raises:
        OptionError: it has none.
    """
    for name in ("layer", "layers"):
        if name in method.Config.model_fields:
            return name
    raise OptionError(f"{method.name} has no option for the blocks to edit: nothing to suggest")


def places(method: EditMethod, count: int) -> list[Place]:
    """The places to try in a model of `count` blocks, the method's own first.

    A method of several blocks edits as many as it does by itself, WIDEST at most, that end there.
    """
    option, own = option_of(type(method)), method.layers(count)
    width = 1 if option == "layer" else min(WIDEST, len(own))
    last = count - 1 - LAST if "subject" in method.needs else count - 1
    ends = {between((share, share), count)[0] for share in SHARES}
    found = [Place(own, {})]
    for end in sorted(min(max(end, width - 1), max(last, width - 1)) for end in ends):
        blocks = tuple(range(end - width + 1, end + 1))
        options = {option: end if option == "layer" else list(blocks)}
        if blocks not in [place.blocks for place in found]:
            found.append(Place(blocks, options))
    return found


# -- how well --------------------------------------------------------------------------------------


def score(means: dict[str, float]) -> float | None:
    """The score of means of a pilot's columns."""
    rates = [means.get(name) for name in RATES]
    if any(rate is None for rate in rates):
        return None
    harmonic = 0.0
    if all(rates):
        harmonic = len(rates) / sum(1 / rate for rate in rates if rate)
    return harmonic - COST * means.get(NORM, 0.0)


def measured(model: EditedModel, method: EditMethod, facts: Sequence[Pilot]) -> list[Record | None]:
    """Each fact edited alone, as a record; None where it could not be."""
    said = [_said(model, fact) for fact in facts]
    try:
        patches: list[Patch | None] = list(
            edit_each(model, [fact.request for fact in facts], method=method)
        )
    except EditError:  # one of them cannot be: each by itself
        patches = [_alone(model, method, fact) for fact in facts]
    return [
        None if patch is None else _record(model, fact, patch, before)
        for fact, patch, before in zip(facts, patches, said, strict=True)
    ]


def _alone(model: EditedModel, method: EditMethod, fact: Pilot) -> Patch | None:
    try:
        (patch,) = edit_each(model, [fact.request], method=method)
    except EditError:
        return None
    return patch


def _said(model: EditedModel, fact: Pilot) -> dict[str, int]:
    """The likeliest next token behind the prompt, and behind each neighbour."""
    prompts = (fact.request.prompt, *fact.neighbours)
    rows = [model.encode(prompt).ids for prompt in prompts]
    places = [(i, len(row) - 1) for i, row in enumerate(rows)]
    likeliest = model.view.run(rows, logits_at=places).logits_MV.argmax(-1).tolist()
    return dict(zip(prompts, likeliest, strict=True))


def _record(model: EditedModel, fact: Pilot, patch: Patch, before: dict[str, int]) -> Record:
    request = fact.request
    with model.applied(patch):
        ask = Ask(model)
        old: Any = (before[request.prompt],) if request.old is None else request.old
        asked = [
            (ask.score(prompt, request.target), ask.score(prompt, old))
            for prompt in (request.prompt, *fact.paraphrases)
        ]
        ask.run()
        took = [float(new.result().mean_logprob > old.result().mean_logprob) for new, old in asked]
        after = _said(model, fact)
    record = {
        "success": took[0],
        "kept": fmean(float(after[prompt] == before[prompt]) for prompt in fact.neighbours),
        NORM: relative(model, patch),
    }
    return {**record, "paraphrase": fmean(took[1:])} if fact.paraphrases else record


def relative(model: EditedModel, patch: Patch) -> float:
    """Norm of a patch's change over that of the matrices that it changes; 0 if it changes none."""
    change = weight = 0.0
    for one in changed(model.view, patch):
        change += float(one.change_DI.double().square().sum())
        weight += float(one.weight_DI.double().square().sum())
    return math.sqrt(change / weight) if weight else 0.0
