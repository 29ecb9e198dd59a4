"""The picture of `locate compare` (KnowEdit's Figures 8 and 9)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from knowpatch.bench.figures import COLOURS
from knowpatch.bench.pictures import MARKERS
from knowpatch.locate.canvas import canvas, plain_axes
from knowpatch.locate.compare import KINDS, Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)))


def compare_picture(found: Comparison, title: str) -> Figure:
    """RSim by the number of blocks, correlations, and the mean curves."""
    figure = canvas(12.5, 4.0, title)
    axes: Any = figure.subplots(1, 3, width_ratios=[1.2, 0.9, 1.3])
    _rsim(axes[0], found)
    _correlations(axes[1], found)
    _curves(axes[2], found)
    return figure


def _look(kind: str) -> dict[str, Any]:
    number = KINDS.index(kind)
    return {"color": COLOURS[number], "marker": MARKERS[number], "markersize": 4}


def _rsim(axes: Axes, found: Comparison) -> None:
    for number, (kind, one) in enumerate(found.kinds.items()):
        places = [n + 0.06 * number for n in range(1, len(one.rsim) + 1)]
        middles = [summary.mean for summary in one.rsim]
        low = [s.mean - (s.mean if s.low is None else s.low) for s in one.rsim]
        high = [(s.mean if s.high is None else s.high) - s.mean for s in one.rsim]
        axes.errorbar(places, middles, yerr=[low, high], elinewidth=0.8, label=kind, **_look(kind))
    axes.set_ylim(-0.03, 1.03)
    axes.legend(fontsize=7, frameon=False)
    plain_axes(axes, "RSim: above prompts of other facts", "highest blocks taken", "RSim")


def _correlations(axes: Axes, found: Comparison) -> None:
    kinds = list(found.kinds)[::-1]
    for place, kind in enumerate(kinds):
        one = found.kinds[kind].correlation
        low, high = (one.mean if end is None else end for end in (one.low, one.high))
        arms = [[one.mean - low], [high - one.mean]]
        axes.errorbar([one.mean], [place], xerr=arms, elinewidth=1.2, **_look(kind))
    axes.set_yticks(range(len(kinds)), kinds)
    lows = [one.correlation.low or 0.0 for one in found.kinds.values()]
    axes.set_xlim(min(-0.25, *lows) - 0.05, 1.05)
    axes.axvline(0, color="#888888", linewidth=0.8)
    plain_axes(axes, "Correlation with the fact's own", "Pearson's r of all blocks' scores", "")


def _curves(axes: Axes, found: Comparison) -> None:
    blocks = range(found.blocks)
    axes.plot(blocks, found.own[2], color="#000000", linewidth=2, label="the fact's own prompt")
    for number, (kind, one) in enumerate(found.kinds.items()):
        colour, style = COLOURS[KINDS.index(kind)], STYLES[number % len(STYLES)]
        axes.plot(blocks, one.curve, color=colour, linestyle=style, linewidth=1.2, label=kind)
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.legend(fontsize=7, frameon=False)
    plain_axes(axes, "Scores by block, mean over prompts", "block", "over the prompt's largest")
