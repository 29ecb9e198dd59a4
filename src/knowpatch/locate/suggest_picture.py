"""The picture of `locate suggest`: how each place takes edits, and what locators say of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from knowpatch.bench.figures import COLOURS
from knowpatch.locate.canvas import canvas, plain_axes
from knowpatch.locate.pilot import RATES
from knowpatch.locate.suggest import Suggestion

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = dict(zip(RATES, "os^", strict=True))


def suggest_picture(found: Suggestion, title: str) -> Figure:
    """Scores and rates by the last block edited; beside them the curves by block."""
    figure = canvas(11.0, 4.0, title)
    axes: Any = figure.subplots(1, 2, sharex=True)
    _scores(axes[0], found)
    _located(axes[1], found)
    return figure


def _scores(axes: Axes, found: Suggestion) -> None:
    tried = sorted(found.tried, key=lambda one: one.place.blocks[-1])
    places = [one.place.blocks[-1] for one in tried]
    for number, name in enumerate(RATES):
        axes.plot(
            places,
            [one.rates[name].mean if name in one.rates else float("nan") for one in tried],
            marker=MARKERS[name],
            markersize=4,
            linestyle="--",
            linewidth=0.9,
            color=COLOURS[number + 1],
            label=name,
        )
    middles = [one.score.mean for one in tried]
    low = [
        m if one.score.low is None else one.score.low for m, one in zip(middles, tried, strict=True)
    ]
    high = [
        m if one.score.high is None else one.score.high
        for m, one in zip(middles, tried, strict=True)
    ]
    arms = [
        [m - at for m, at in zip(middles, low, strict=True)],
        [at - m for m, at in zip(middles, high, strict=True)],
    ]
    axes.errorbar(
        places, middles, yerr=arms, marker="D", linewidth=1.8, color=COLOURS[0], label="score"
    )
    for one, words, up in ((found.own, "own", 10), (found.best, "best", 24)):
        axes.annotate(
            words,
            (one.place.blocks[-1], one.score.mean),
            xytext=(0, -up),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.legend(fontsize=7, frameon=False)
    plain_axes(axes, "Pilot edits", "(last) block edited", "rate, score")


def _located(axes: Axes, found: Suggestion) -> None:
    if found.curve is not None:
        largest = max(max(found.curve), 1e-30)
        axes.plot(
            range(len(found.curve)),
            [value / largest for value in found.curve],
            color=COLOURS[3],
            label="located (over its largest)",
        )
    if found.auc:
        axes.plot(
            list(found.auc),
            list(found.auc.values()),
            color=COLOURS[4],
            linestyle="-.",
            label="paraphrases told from neighbours (AUC)",
        )
    axes.set_ylim(0, 1.05)
    axes.legend(fontsize=7, frameon=False)
    plain_axes(axes, "What can be located", "block", "")
