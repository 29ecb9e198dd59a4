"""The report's figures as PNG files, drawn by matplotlib."""

from __future__ import annotations

import io
import warnings
from textwrap import fill
from typing import TYPE_CHECKING

from knowpatch.bench.figures import COLOURS, Chart, Figure, Heat, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vPX*"
INCH, DOTS = 0.32, 110
LETTERS = 12
"""Of a title, in an inch."""
MARK = 8
"""Letters that a legend's mark takes up."""


def picture(figure: Figure) -> bytes:
    """The figure as a PNG file; the same bytes for the same numbers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    size = _size(figure)
    canvas = Canvas(figsize=size, dpi=DOTS, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    title = fill(_safe(figure.title), int(LETTERS * size[0]))
    canvas.suptitle(title, x=0.01, ha="left", fontsize=9)
    if isinstance(figure, Heat):
        _heat(axes, figure)
    else:
        _chart(axes, figure)
        if len(figure.series) > 1:
            longest = max(len(series.label) for series in figure.series)
            ncols = min(6, max(1, int(LETTERS * size[0]) // (longest + MARK)))
            canvas.legend(loc="outside lower center", ncols=ncols, fontsize=8, frameon=False)
    target = io.BytesIO()
    with warnings.catch_warnings():
        # A letter that the font lacks is a box in the picture; the tables have it.
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from font", category=UserWarning
        )
        canvas.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()


def _size(figure: Figure) -> tuple[float, float]:
    if isinstance(figure, Heat):
        return 3.5 + 0.85 * len(figure.columns), 1.4 + INCH * len(figure.rows)
    bars = len(figure.categories) * (len(figure.series) + 1) if figure.kind == "bars" else 0
    return min(16.0, max(7.0, 2 + 0.2 * bars)), 4.2


def _safe(text: str) -> str:
    """A label that is not taken for mathematics."""
    return text.replace("$", r"\$")


def _heat(axes: Axes, heat: Heat) -> None:
    values = [[float("nan") if v is None else v for v in line] for line in heat.values]
    axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(heat.columns)), [_safe(c) for c in heat.columns], fontsize=8)
    axes.set_yticks(range(len(heat.rows)), [_safe(r) for r in heat.rows], fontsize=8)
    axes.tick_params(length=0)
    axes.tick_params(axis="x", rotation=20 if len(heat.columns) > 4 else 0)
    for i, line in enumerate(heat.values):
        for j, value in enumerate(line):
            told = "–" if value is None else f"{value:.0f}"
            colour = "white" if value is not None and value < 55 else "black"
            axes.text(j, i, told, ha="center", va="center", fontsize=8, color=colour)


def _chart(axes: Axes, chart: Chart) -> None:
    for number, series in enumerate(chart.series):
        if chart.kind == "bars":
            _bars(axes, chart, number, series)
        else:
            _marks(axes, chart, number, series)
    axes.set_xlabel(_safe(chart.x_label))
    axes.set_ylabel(_safe(chart.y_label))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    if chart.percent:
        axes.set_ylim(-2, 104)
    if chart.kind == "points":
        axes.set_xlim(-2, 104)
    else:
        names = [_safe(category) for category in chart.categories]
        long = sum(map(len, names)) > 90
        axes.set_xticks(range(len(names)), names, fontsize=8)
        if long:
            axes.tick_params(axis="x", labelrotation=30)
            for label in axes.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")


def _bars(axes: Axes, chart: Chart, number: int, series: Series) -> None:
    width = 0.8 / len(chart.series)
    shift = (number - (len(chart.series) - 1) / 2) * width
    axes.bar(
        [chart.categories.index(str(point.x)) + shift for point in series.points],
        [point.y for point in series.points],
        width,
        color=COLOURS[number % len(COLOURS)],
        hatch="//" if number >= len(COLOURS) else None,
        yerr=series.arms() if any(p.low is not None for p in series.points) else None,
        error_kw={"linewidth": 0.8, "ecolor": "#444444"},
        label=_safe(series.label),
    )


def _marks(axes: Axes, chart: Chart, number: int, series: Series) -> None:
    points = series.points
    places = [
        chart.categories.index(p.x) + 0.04 * number if isinstance(p.x, str) else p.x for p in points
    ]
    axes.errorbar(
        places,
        [point.y for point in points],
        yerr=series.arms(),
        xerr=series.arms(across=True) if chart.kind == "points" else None,
        fmt=MARKERS[number % len(MARKERS)] + ("-" if chart.kind == "lines" else ""),
        color=COLOURS[number % len(COLOURS)],
        markersize=5,
        elinewidth=0.8,
        label=_safe(series.label),
    )
    for place, point in zip(places, points, strict=True):
        if point.text and chart.named:
            axes.annotate(
                _safe(point.text),
                (place, point.y),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=7,
            )
