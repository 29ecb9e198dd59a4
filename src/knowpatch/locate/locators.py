"""Locators: each says of a prompt how much every block has to do with its answer.

What was located is kept on disk by model, locator and prompt, so that a comparison that was stopped
goes on, and another one over the same prompts begins with them. Axes: L blocks.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knowpatch.errors import ModelError, OptionError, did_you_mean
from knowpatch.files import kept_in, write_atomically
from knowpatch.locate.attribution import attribute as patched
from knowpatch.locate.facts import Fact
from knowpatch.locate.noise import DRAWS, SCALE, Noise
from knowpatch.locate.tracing import WINDOW, Tracing, window_of
from knowpatch.models.passes import Ids
from knowpatch.models.restorations import MLP, Put
from knowpatch.models.view import ModelView
from knowpatch.parts.attribution import ROLE, attribute, blocks_with_neurons
from knowpatch.parts.spans import continuation
from knowpatch.progress import Progress, silent

VERSION = 1
LEAST = 0.05
"""What noise on the subject has to take from the answer's probability: else nothing is told."""
POINTS = 5
"""Steps of the integrated gradients where a whole file is located: a quarter of the usual ones."""


@dataclass(frozen=True)
class Locator:
    """One way to locate.

    Attributes:
        name: as on the command line; about: what it scores blocks by.
        settings: what its scores depend on besides.
        score: gives the scores (L) of a prompt and an answer's first token (tracing and attribution
            patching look at the token that the model predicts); None where the subject has too
            little to do with it to tell.
    """

    name: str
    about: str
    settings: Mapping[str, Any]
    score: Callable[[ModelView, Fact, Ids], Tensor | None]


def by_attribution(view: ModelView, fact: Fact, answer: Ids) -> Tensor | None:
    """Attribution patching of windows of MLPs at the subject's last token, in nats."""
    found = patched(view, fact, Noise.of(view), kind=MLP)
    if found.high - found.low < LEAST:
        return None
    return found.effects_TL[found.corruption.subject[1] - 1]


def by_tracing(view: ModelView, fact: Fact, answer: Ids) -> Tensor | None:
    """Exact indirect effects of windows of MLPs at the subject's last token."""
    begun = Tracing(view, fact, Noise.of(view), kind=MLP)
    if begun.runs.high - begun.runs.low < LEAST:
        return None
    last, layers = begun.runs.corruption.subject[1] - 1, len(begun.modules)
    restorations = [
        tuple(Put(begun.modules[i], last) for i in window_of(layer, WINDOW, layers))
        for layer in range(layers)
    ]
    return begun.effects(restorations).mean(1)


def by_neurons(view: ModelView, fact: Fact, answer: Ids) -> Tensor:
    """What a block's neurons add to the answer's probability, those that take from it left out.

    Raises:
        ModelError: the model has no such neurons.
    """
    if reason := view.roles.lacks(ROLE):
        raise ModelError(f"{view.source} has no neurons to look at: {reason}")
    ids = view.encode(fact.prompt).ids
    read = attribute(view, blocks_with_neurons(view), ids, answer, points=POINTS)
    scores_L = torch.zeros(len(view.roles.blocks))
    for layer, scores_I in read.scores.items():
        scores_L[layer] = scores_I.clamp(min=0).sum()
    return scores_L


RESTORED = {"window": WINDOW, "least": LEAST, "scale": SCALE, "draws": DRAWS}
LOCATORS = {
    one.name: one
    for one in (
        Locator(
            "attribution",
            "attribution patching of MLPs at the subject's last token",
            RESTORED,
            by_attribution,
        ),
        Locator(
            "tracing",
            "causal tracing of MLPs at the subject's last token",
            RESTORED,
            by_tracing,
        ),
        Locator(
            "neurons",
            "integrated gradients of the MLPs' neurons at the prompt's last token",
            {"points": POINTS},
            by_neurons,
        ),
    )
}


def locator(name: str) -> Locator:
    """The locator called `name`; OptionError if there is none."""
    if name not in LOCATORS:
        raise OptionError(f"unknown locator {name!r}: {did_you_mean(name, LOCATORS)}")
    return LOCATORS[name]


def located(
    view: ModelView, how: Locator, facts: Sequence[Fact], *, progress: Progress = silent
) -> list[Tensor | None]:
    """The scores of each fact's prompt; where it has no answer, the likeliest next token is."""
    done: dict[Fact, Tensor | None] = {}
    for number, fact in enumerate(facts):
        progress("locating", number, len(facts))
        if fact not in done:
            done[fact] = _kept(view, how, fact)
    progress("locating", len(facts), len(facts))
    return [done[fact] for fact in facts]


def _kept(view: ModelView, how: Locator, fact: Fact) -> Tensor | None:
    answer = answer_of(view, fact)
    content = [VERSION, view.fingerprint, view.form, how.name, how.settings, fact.prompt]
    content += [fact.subject, list(answer)]
    path = kept_in("located", json.dumps(content, sort_keys=True), ".json")
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return None if found is None else torch.tensor(found)
    scores_L = how.score(view, fact, answer)
    write_atomically(path, json.dumps(None if scores_L is None else scores_L.tolist()).encode())
    return scores_L


def answer_of(view: ModelView, fact: Fact) -> Ids:
    """The first token of a fact's answer, or the likeliest one behind its prompt."""
    encoded = view.encode(fact.prompt)
    if fact.answer is not None:
        return continuation(view.tokenizer, encoded, fact.answer)[:1]
    logits_MV = view.run([encoded.ids], logits_at=[(0, len(encoded.ids) - 1)]).logits_MV
    return (int(logits_MV[0].argmax()),)
