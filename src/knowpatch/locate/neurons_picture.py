"""The picture of `locate neurons`: where an answer's attributions are, and what neurons do."""

from __future__ import annotations

from collections import Counter
from statistics import fmean
from typing import TYPE_CHECKING, Any

from knowpatch.bench.figures import COLOURS
from knowpatch.bench.statistics import bootstrap
from knowpatch.locate.canvas import canvas, plain_axes
from knowpatch.locate.neurons import KnowledgeNeurons, Tested

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {
    ("found", "fact"): "knowledge neurons, this fact",
    ("found", "controls"): "knowledge neurons, control prompts",
    ("random", "fact"): "random neurons, this fact",
    ("random", "controls"): "random neurons, control prompts",
}
COLOURED = ("#0072b2", "#56b4e9", "#888888", "#cccccc")


def neurons_picture(found: KnowledgeNeurons, title: str) -> Figure:
    """Attributions by block, and relative changes of probabilities."""
    figure = canvas(10.5, 3.9, title)
    axes: Any = figure.subplots(1, 2, width_ratios=[1.25, 1])
    _layers(axes[0], found)
    _tests(axes[1], found.tests)
    return figure


def _layers(axes: Axes, found: KnowledgeNeurons) -> None:
    values = [100 * value for value in found.layers.values()]
    axes.bar(list(found.layers), values, color=COLOURS[5], label="all neurons of the block")
    mine: Counter[int] = Counter()
    for one in found.neurons:
        mine[one.layer] += 100 * one.score  # type: ignore[assignment]
    axes.bar(
        list(mine), list(mine.values()), width=0.4, color=COLOURS[0], label="knowledge neurons"
    )
    counts = Counter(one.layer for one in found.neurons)
    for layer, count in counts.items():
        top = max(found.layers[layer] * 100, mine[layer], 0)
        axes.annotate(
            str(count),
            (layer, top),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.axhline(0, color="#444444", linewidth=0.8)
    axes.legend(fontsize=7, frameon=False)
    plain_axes(
        axes,
        "What neurons add to the answer's probability\n(numbers: knowledge neurons of the block)",
        "block",
        "percentage points",
    )


def _tests(axes: Axes, tests: tuple[Tested, ...]) -> None:
    actions = list(dict.fromkeys(one.action for one in tests))
    for number, ((neurons, asked), label) in enumerate(NAMES.items()):
        values = [
            getattr(one, asked)
            for action in actions
            for one in tests
            if one.action == action
            if one.neurons == neurons
        ]
        middles = [100 * fmean(one) for one in values]
        arms = [_arms(one) for one in values]
        axes.bar(
            [place + 0.2 * (number - 1.5) for place in range(len(actions))],
            middles,
            0.18,
            yerr=[[low for low, _ in arms], [high for _, high in arms]],
            error_kw={"linewidth": 0.8, "ecolor": "#444444", "capsize": 2},
            color=COLOURED[number],
            label=label,
        )
    axes.axhline(0, color="#444444", linewidth=0.8)
    axes.set_xticks(range(len(actions)), actions)
    if tests:
        axes.legend(fontsize=7, frameon=False)
    else:
        axes.text(0.5, 0.5, "no neuron was found", ha="center", transform=axes.transAxes)
    plain_axes(axes, "Neurons suppressed (zero) and enhanced (doubled)", "", "change of p, %")


def _arms(values: tuple[float, ...]) -> tuple[float, float]:
    """How far a mean's 95 % interval reaches below and above it, in percent."""
    summary = bootstrap([{"value": value} for value in values])
    if summary is None or summary.low is None or summary.high is None:
        return 0.0, 0.0
    return 100 * (summary.mean - summary.low), 100 * (summary.high - summary.mean)
