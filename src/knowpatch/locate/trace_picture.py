"""The pictures of `locate trace` and `locate attribute`: maps of effects, and curves with bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from knowpatch.bench.figures import COLOURS
from knowpatch.locate.averages import Curve
from knowpatch.locate.canvas import canvas, plain_axes, safe
from knowpatch.locate.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vPX"
LAYER = "layer"
LETTERS = 13
"""Of a title, in an inch."""


def map_picture(row: Row, title: str, unit: str) -> Figure:
    """One prompt: tokens down, layers across; the subject's tokens in bold, with a star."""
    first, stop = row["subject_tokens"]
    names = [_label(token) for token in row["tokens"]]
    names = [f"{name}*" if first <= i < stop else name for i, name in enumerate(names)]
    layers = len(row["effects"][0])
    width = max(5.5, min(13.0, 2.0 + 0.08 * max(map(len, names)) + 0.14 * layers))
    figure = canvas(width, 1.5 + 0.24 * len(names), fill(title, int(LETTERS * width)))
    axes: Any = figure.subplots()
    _map(axes, names, row["effects"], unit)
    for label in axes.get_yticklabels()[first:stop]:
        label.set_fontweight("bold")
    return figure


def average_picture(roles: Mapping[str, Curve], title: str, unit: str) -> Figure:
    """Averages by token role: a map, and below it the curves with their intervals."""
    width, height = 7.2, 1.0 + 0.24 * len(roles)
    figure = canvas(width, height + 4.0, fill(title, int(LETTERS * width)))
    upper, lower = figure.subplots(2, 1, height_ratios=[height, 3.6])
    _map(upper, list(roles), [curve.mean_L.tolist() for curve in roles.values()], unit)
    _curves(lower, roles)
    plain_axes(lower, "Means over facts, bands: 95 % intervals", LAYER, unit)
    return figure


def curves_picture(curves: Mapping[str, Curve], title: str, unit: str) -> Figure:
    """Curves over layers with their intervals."""
    figure = canvas(7.2, 3.8, fill(title, int(LETTERS * 7.2)))
    axes = figure.subplots()
    _curves(axes, curves)
    n = max(curve.n for curve in curves.values())
    told = f"Means over {n} facts, bands: 95 % intervals" if n > 1 else "One fact"
    plain_axes(axes, told, LAYER, unit)
    return figure


def _label(token: str) -> str:
    """A token's text on one line."""
    return " ".join(token.split()) or repr(token)[1:-1]


def _map(axes: Axes, names: Sequence[str], values: Sequence[Sequence[float]], unit: str) -> None:
    """A map whose colours begin at zero: what is below is as dark."""
    image = axes.imshow(values, cmap="cividis", vmin=0, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(names)), [safe(name) for name in names], fontsize=8)
    columns = len(values[0])
    axes.set_xticks(range(0, columns, 5 if columns > 12 else 1))
    axes.set_xlabel(LAYER, fontsize=8)
    axes.tick_params(length=2, labelsize=8)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label(unit, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _curves(axes: Axes, curves: Mapping[str, Curve]) -> None:
    for number, (name, curve) in enumerate(curves.items()):
        places = np.arange(len(curve.mean_L))
        colour, mark = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.plot(
            places,
            curve.mean_L,
            mark + "-",
            color=colour,
            markersize=3.5,
            linewidth=1.2,
            label=name,
        )
        axes.fill_between(places, curve.low_L, curve.high_L, color=colour, alpha=0.18, linewidth=0)
    axes.axhline(0, color="#888888", linewidth=0.6)
    axes.legend(fontsize=7, frameon=False, ncols=2)
