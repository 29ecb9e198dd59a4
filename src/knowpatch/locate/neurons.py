"""Knowledge neurons of one fact, and what they do (Dai et al., arXiv 2104.08696).

The neurons that the prompt and its rephrases agree on (parts/attribution.py), and the paper's
tests: suppressed (their activations zero) and enhanced (doubled), at every token, what becomes of
the answer's probability here, and of the model's own answers to control prompts? Beside them, as
many neurons drawn at random in the same blocks. Axes: D hidden, I inner size of an MLP.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from knowpatch.deltas import WeightDelta
from knowpatch.errors import ModelError, RequestError
from knowpatch.models.batch import gathered
from knowpatch.models.passes import Ids, Scored
from knowpatch.models.view import ModelView
from knowpatch.parts.attribution import ROLE, Agreed, Neuron, Search, agreed, slots
from knowpatch.parts.spans import continuation
from knowpatch.probes import controls
from knowpatch.progress import Progress, silent

ACTIONS = {"suppress": -1.0, "enhance": 1.0}
"""What is done to a neuron, as what is added to it, in multiples of it."""
DRAWS = 3
"""Times that random neurons are drawn."""
TOGETHER = 2048
"""Tokens of a batch."""

Pair = tuple[Ids, Ids]
"""A prompt and an answer, as ids."""


@dataclass(frozen=True)
class Found:
    """One neuron.

    Attributes:
        layer, index: which.
        score: its attribution, mean over the prompts.
        value: its activation at the first prompt's last token.
        prompts: how many prompts' coarse sets it is in.
    """

    layer: int
    index: int
    score: float
    value: float
    prompts: int


@dataclass(frozen=True)
class Tested:
    """What became of probabilities, each as (p' - p) / p.

    Attributes:
        action: of ACTIONS; neurons: the found ones, or random.
        fact: for each prompt of the fact, of its answer; of random neurons the mean over draws.
        controls: for each control prompt, of what the model said before.
    """

    action: str
    neurons: str
    fact: tuple[float, ...]
    controls: tuple[float, ...]


@dataclass(frozen=True)
class KnowledgeNeurons:
    """Where one answer comes from.

    Attributes:
        prompts: the prompt, and its rephrases; answer: the text attributed.
        probabilities: of the answer behind each prompt.
        coarse: size of each prompt's coarse set.
        neurons: what the prompts agree on, highest first.
        layers: for each block the sum of its attributions, mean over prompts: what its neurons add
            to the probability.
        tests: empty where no neuron is found.
    """

    prompts: tuple[str, ...]
    answer: str
    probabilities: tuple[float, ...]
    coarse: tuple[int, ...]
    neurons: tuple[Found, ...]
    layers: dict[int, float]
    tests: tuple[Tested, ...]


def knowledge_neurons(
    view: ModelView,
    prompts: Sequence[str],
    answer: str,
    search: Search,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> KnowledgeNeurons:
    """The neurons that an answer comes from, refined over prompts, and their tests.

    Args:
        prompts: the prompt, then its rephrases.
        seed: of the random neurons.

    Raises:
        RequestError: an empty prompt or answer; ModelError: the model has no such neurons.
    """
    if reason := view.roles.lacks(ROLE):
        raise ModelError(f"{view.source} has no neurons to look at: {reason}")
    if not answer.strip() or not all(prompt.strip() for prompt in prompts):
        raise RequestError("a prompt or the answer is empty")
    encoded = [view.encode(prompt) for prompt in prompts]
    ids = continuation(view.tokenizer, encoded[0], answer)
    found = agreed(view, [one.ids for one in encoded], ids, search, progress=progress)
    neurons = _described(found)
    pairs = [(one.ids, continuation(view.tokenizer, one, answer)) for one in encoded]
    tests = _tests(view, pairs, prompts, found, seed, progress) if neurons else ()
    return KnowledgeNeurons(
        tuple(prompts),
        answer,
        tuple(_probabilities(view, pairs)),
        tuple(map(len, found.coarse)),
        neurons,
        {
            layer: fmean(float(one.scores[layer].sum()) for one in found.read)
            for layer in found.read[0].scores
        },
        tests,
    )


def _described(found: Agreed) -> tuple[Found, ...]:
    counts = Counter(neuron for one in found.coarse for neuron in one)
    described = [
        Found(
            layer,
            index,
            fmean(float(one.scores[layer][index]) for one in found.read),
            float(found.read[0].neurons[layer][index]),
            counts[layer, index],
        )
        for layer, index in found.neurons
    ]
    return tuple(sorted(described, key=lambda one: (-one.score, one.layer, one.index)))


def _tests(
    view: ModelView,
    pairs: Sequence[Pair],
    prompts: Sequence[str],
    found: Agreed,
    seed: int,
    progress: Progress,
) -> tuple[Tested, ...]:
    """Both actions, on the neurons found and on random ones."""
    asked = [*pairs, *_said(view, [text for text in controls() if text not in prompts])]
    before = _probabilities(view, asked)
    drawn = [_random(view, found.neurons, seed + number) for number in range(DRAWS)]
    sets: dict[str, list[Iterable[Neuron]]] = {"found": [found.neurons], "random": list(drawn)}
    steps, done, tests = len(ACTIONS) * (1 + DRAWS), 0, []
    for action, factor in ACTIONS.items():
        for name, some in sets.items():
            changes = []
            for neurons in some:
                progress("testing neurons", done, steps)
                with view.trying(scaled(view, neurons, factor)):
                    after = _probabilities(view, asked)
                changes.append([b / a - 1 for a, b in zip(before, after, strict=True)])
                done += 1
            means = [fmean(column) for column in zip(*changes, strict=True)]
            tests.append(
                Tested(action, name, tuple(means[: len(pairs)]), tuple(means[len(pairs) :]))
            )
    progress("testing neurons", steps, steps)
    return tuple(tests)


def scaled(view: ModelView, neurons: Iterable[Neuron], factor: float) -> list[WeightDelta]:
    """The change that adds `factor` times itself to each neuron, as a change of its value slot."""
    chosen, deltas = set(neurons), []
    for layer in sorted({layer for layer, _ in chosen}):
        role = view.roles.linear(ROLE, layer)
        factors = {index: factor for block, index in chosen if block == layer}
        left_DK, right_KI = slots(view.weight(role).cpu(), factors)
        change = role.factored(left_DK.to(view.device), right_KI.to(view.device))
        deltas.append(WeightDelta(role.address, change))
    return deltas


def _random(view: ModelView, neurons: Iterable[Neuron], seed: int) -> list[Neuron]:
    """As many neurons in each block, none of them among `neurons`."""
    generator, taken = torch.Generator().manual_seed(seed), set(neurons)
    drawn: list[Neuron] = []
    for layer, count in sorted(Counter(layer for layer, _ in taken).items()):
        role = view.roles.linear(ROLE, layer)
        order = torch.randperm(view.weight(role).shape[1], generator=generator).tolist()
        others = [(layer, index) for index in order if (layer, index) not in taken]
        drawn += others[:count]
    return drawn


def _said(view: ModelView, prompts: Sequence[str]) -> list[Pair]:
    """Each prompt with the likeliest token behind it."""
    rows = [view.encode(prompt).ids for prompt in prompts]
    found: dict[int, Pair] = {}
    for numbers in gathered([len(row) for row in rows], TOGETHER):
        mine = [rows[number] for number in numbers]
        places = [(i, len(row) - 1) for i, row in enumerate(mine)]
        likeliest = view.run(mine, logits_at=places).logits_MV.argmax(-1).tolist()
        for number, token in zip(numbers, likeliest, strict=True):
            found[number] = rows[number], (token,)
    return [found[number] for number in range(len(rows))]


def _probabilities(view: ModelView, pairs: Sequence[Pair]) -> list[float]:
    found: dict[int, float] = {}
    for numbers in gathered([len(prompt) + len(answer) for prompt, answer in pairs], TOGETHER):
        scored: list[Scored] = view.score([pairs[number] for number in numbers])
        found |= {number: one.probability for number, one in zip(numbers, scored, strict=True)}
    return [found[number] for number in range(len(pairs))]
