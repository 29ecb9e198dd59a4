"""The picture of `knowpatch health`: perplexity, control drift and norms over the history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from knowpatch.bench.figures import COLOURS
from knowpatch.checks.health import Vitals
from knowpatch.locate.canvas import canvas, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOM = 1.15
"""Share of the largest value that an axis goes up to."""


def health_picture(numbers: Sequence[int], states: Sequence[Vitals], title: str) -> Figure:
    """Three charts one above the other.

    Args:
        numbers: how many edits had been recorded in each state, 0 for none.
        states: what was measured of each, that without any edit first.
        title: what it is of.
    """
    figure = canvas(8.0, 6.4, title)
    axes: Any = figure.subplots(3, 1, sharex=True)
    first = states[0]
    told = [None if one.perplexity is None else one.perplexity for one in states]
    _line(axes[0], numbers, told, 0, "perplexity")
    if first.perplexity is not None:
        axes[0].axhline(first.perplexity, color="#888888", linewidth=0.8, linestyle="--")
        axes[0].set_ylim(0, ROOM * max(value for value in told if value is not None))
    plain_axes(axes[0], "Perplexity of ordinary text (dashed: without edits)", "", "")
    _line(axes[1], numbers, [100 * one.drift for one in states], 1, "drift")
    axes[1].set_ylim(0, max(10.0, ROOM * max(100 * one.drift for one in states)))
    asked = first.asked
    plain_axes(axes[1], f"Control drift: of {asked} prompts, with another answer", "", "%")
    _line(axes[2], numbers, [100 * one.change for one in states], 2, "distance from the base")
    _line(axes[2], numbers, [100 * one.growth for one in states], 3, "growth of the norm")
    axes[2].legend(fontsize=8, frameon=False)
    plain_axes(axes[2], "Weights that any edit touches", "edits recorded", "% of their norm")
    axes[2].xaxis.get_major_locator().set_params(integer=True)
    return figure


def _line(
    axes: Axes, numbers: Sequence[int], values: Sequence[float | None], style: int, label: str
) -> None:
    axes.plot(
        numbers,
        [float("nan") if value is None else value for value in values],
        marker="os^D"[style],
        markersize=4,
        linestyle=("-", "-", "-", "--")[style],
        color=COLOURS[style],
        label=label,
    )
