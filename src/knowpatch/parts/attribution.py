"""Attribution: which neurons an answer comes from (Dai et al., arXiv 2104.08696, section 3).

A neuron is one entry of what enters an MLP's output map W at the prompt's last token. With w_bar
what the neurons of a layer are there, and p(w) the answer's probability if they were w, the
integrated gradient along w = alpha w_bar is

    Attr_i = w_bar_i * integral over alpha from 0 to 1 of dp/dw_i (alpha w_bar),

and over a layer they sum to p(w_bar) - p(0). Scaled neurons move the map's output by
(alpha - 1) W w_bar, and dp/dw is W^T times the gradient at that output: so a layer is one replayed
batch, a row for each alpha, and what is below the layer is run once. The integral is a midpoint
sum. Axes: S layers, M points, B = S M rows, D hidden, I inner size of the MLP, N prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import Tensor

from knowpatch.models.passes import Ids, Row, Tap
from knowpatch.models.replay import passes
from knowpatch.models.roles import LinearRole
from knowpatch.models.view import ModelView
from knowpatch.progress import Progress, silent

ROLE = "mlp.out"
"""The map whose inputs are the neurons."""

ROWS = 128
"""Rows of a batch: so many layers go together."""

FIRST, STEP = 0.7, 0.05
"""Where the share of prompts starts if it is adapted, and how far it moves at a time."""
FEWEST, MOST = 2, 5
"""How many neurons are to be left then."""

Neuron = tuple[int, int]
"""Block, and index among the I neurons of its MLP."""


@dataclass(frozen=True)
class Search:
    """How neurons are looked for.

    Attributes:
        layers: blocks to look in; None for all that have neurons.
        points: of the midpoint sum.
        threshold: a neuron counts above this share of the largest attribution.
        share: of the prompts that must find it, as `refined` takes it.
        most: neurons that are kept at most, the highest attributed ones; None for all.
    """

    layers: Sequence[int] | None = None
    points: int = 20
    threshold: float = 0.2
    share: float | None = None
    most: int | None = None


@dataclass(frozen=True, eq=False)
class Attributed:
    """What each neuron gives to an answer, and what it is at the prompt's last token, by block.

    Both (I), float32, on the CPU.
    """

    scores: Mapping[int, Tensor]
    neurons: Mapping[int, Tensor]


def blocks_with_neurons(view: ModelView) -> tuple[int, ...]:
    """The blocks that have such a map (of a partly sparse model, some)."""
    return tuple(i for i, block in enumerate(view.roles.blocks) if ROLE in block.linears)


def attribute(
    view: ModelView,
    layers: Sequence[int],
    prompt: Ids,
    answer: Ids,
    *,
    points: int,
    progress: Progress = silent,
) -> Attributed:
    """The attributions of an answer behind a prompt.

    Of an answer of several tokens, each is attributed at its own place, behind the answer's tokens
    before it, and the scores are averaged. (The published programs put the model's likeliest tokens
    there, which need not belong to the answer.)

    Args:
        view: the model, with trials in force now.
        layers: blocks.
        prompt: ids of the prompt.
        answer: ids of the answer, one at least.
        points: of the midpoint sum.
        progress: told layer by layer.
    """
    maps = [view.roles.linear(ROLE, layer) for layer in layers]
    size = max(1, ROWS // points)
    found: list[list[Tensor]] = [[] for _ in maps]
    first: list[Tensor] = []
    for number, token in enumerate(answer):
        ids = (*prompt, *answer[:number])
        row = Row(ids, len(ids) - 1, len(prompt))
        neurons = _neurons(view, maps, row)
        first = first or neurons
        for start in range(0, len(maps), size):
            progress("attributing", number * len(maps) + start, len(answer) * len(maps))
            some = slice(start, start + size)
            scores = _scores(view, maps[some], neurons[some], row, token, points)
            for one, scores_I in zip(found[some], scores, strict=True):
                one.append(scores_I.cpu())
    progress("attributing", len(answer) * len(maps), len(answer) * len(maps))
    return Attributed(
        {layer: torch.stack(one).mean(0) for layer, one in zip(layers, found, strict=True)},
        {layer: neurons_I.cpu() for layer, neurons_I in zip(layers, first, strict=True)},
    )


def _neurons(view: ModelView, maps: Sequence[LinearRole], row: Row) -> list[Tensor]:
    """What enters each map at the row's position, (I) each."""
    taps = [Tap(one.module, "input") for one in maps]
    run = view.run([row.ids], taps=taps, prompts=[row.end])
    return [run.at(tap, [(0, row.position)])[0] for tap in taps]


def _scores(
    view: ModelView,
    maps: Sequence[LinearRole],
    neurons: Sequence[Tensor],
    row: Row,
    token: int,
    points: int,
) -> list[Tensor]:
    """Attr (I) of each of these layers, for one token at the row's position."""
    rows = [row] * (len(maps) * points)
    places = [(number, row.position) for number in range(len(rows))]
    alpha_M1 = ((torch.arange(points, device=view.device) + 0.5) / points)[:, None]
    shift_BSD = torch.zeros(len(rows), len(maps), view.roles.hidden_size, device=view.device)
    for s, (one, neurons_I) in enumerate(zip(maps, neurons, strict=True)):
        mine = slice(s * points, (s + 1) * points)
        shift_BSD[mine, s] = (alpha_M1 - 1) * (view.weight(one) @ neurons_I)
    shift_BSD.requires_grad_()
    replay = passes(view, [one.module for one in maps], rows, places)
    total = replay.run(shift_BSD).logits_MV.softmax(-1)[:, token].sum()
    (grad_BSD,) = torch.autograd.grad(total, shift_BSD)
    found = []
    for s, (one, neurons_I) in enumerate(zip(maps, neurons, strict=True)):
        mean_D = grad_BSD[s * points : (s + 1) * points, s].mean(0)
        found.append(neurons_I * (view.weight(one).T @ mean_D))
    return found


@dataclass(frozen=True, eq=False)
class Agreed:
    """The neurons that prompts of one fact agree on, each prompt's coarse set and attributions."""

    neurons: frozenset[Neuron]
    coarse: tuple[frozenset[Neuron], ...]
    read: tuple[Attributed, ...]


def agreed(
    view: ModelView,
    prompts: Sequence[Ids],
    answer: Ids,
    search: Search,
    *,
    progress: Progress = silent,
) -> Agreed:
    """The neurons that an answer comes from, behind each of several prompts."""
    layers = search.layers or blocks_with_neurons(view)
    read = tuple(
        attribute(view, layers, prompt, answer, points=search.points, progress=progress)
        for prompt in prompts
    )
    sets = tuple(coarse(one.scores, search.threshold) for one in read)
    neurons = refined(sets, search.share)
    if search.most is not None:
        neurons = highest(neurons, [one.scores for one in read], search.most)
    return Agreed(neurons, sets, read)


def coarse(scores: Mapping[int, Tensor], threshold: float) -> frozenset[Neuron]:
    """The neurons whose attribution is more than a share of the largest one of all layers."""
    largest = max(float(scores_I.max()) for scores_I in scores.values())
    if largest <= 0:
        return frozenset()
    return frozenset(
        (layer, index)
        for layer, scores_I in scores.items()
        for index in (scores_I > threshold * largest).nonzero()[:, 0].tolist()
    )


def refined(found: Sequence[AbstractSet[Neuron]], share: float | None) -> frozenset[Neuron]:
    """The neurons that are in more than a share of the prompts' coarse sets.

    Args:
        found: the coarse set of each prompt.
        share: of the prompts; None to start at .7 and move in steps of .05 until 2 to 5 neurons are
            left (with one prompt every share leaves the same ones).
    """
    counts = Counter(neuron for one in found for neuron in one)
    if share is not None:
        return _shared(counts, share * len(found))
    # In whole steps, so that no rounding turns "more than half" into "half".
    first, steps = round(FIRST / STEP), round(1 / STEP)
    kept = _shared(counts, first * len(found) / steps)
    if len(kept) > MOST:
        tried = range(first + 1, steps)
        enough = [_shared(counts, step * len(found) / steps) for step in tried]
        return next((one for one in enough if len(one) <= MOST), enough[-1])
    if len(kept) < FEWEST:
        tried = range(first - 1, -1, -1)
        enough = [_shared(counts, step * len(found) / steps) for step in tried]
        return next((one for one in enough if len(one) >= FEWEST), enough[-1])
    return kept


def _shared(counts: Counter[Neuron], more_than: float) -> frozenset[Neuron]:
    return frozenset(neuron for neuron, count in counts.items() if count > more_than)


def slots(weight_DI: Tensor, factors: Mapping[int, float]) -> tuple[Tensor, Tensor]:
    """What adds so many times itself to each of these value slots: (D, K) @ (K, I).

    A neuron times its slot is what it writes, so that scales the neuron, wherever it fires.
    """
    index_K = torch.tensor(sorted(factors), dtype=torch.long)
    factor_K = torch.tensor([factors[index] for index in index_K.tolist()])
    right_KI = torch.zeros(len(index_K), weight_DI.shape[1])
    right_KI[torch.arange(len(index_K)), index_K] = 1.0
    return factor_K * weight_DI[:, index_K], right_KI


def highest(
    found: AbstractSet[Neuron], scores: Sequence[Mapping[int, Tensor]], most: int
) -> frozenset[Neuron]:
    """Of the neurons found, the `most` with the highest mean attribution over prompts."""

    def mean(neuron: Neuron) -> tuple[float, Neuron]:
        layer, index = neuron
        return -sum(float(one[layer][index]) for one in scores), neuron

    return frozenset(sorted(found, key=mean)[:most])
