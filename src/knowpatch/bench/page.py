"""The report as one HTML page that asks for nothing else: tables, and figures drawn by plotly."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from knowpatch.bench.figures import COLOURS, Chart, Figure, Heat, Series
from knowpatch.bench.layout import Table

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")


@dataclass(frozen=True)
class Section:
    """One part of the report: what it says, its tables and figures."""

    title: str
    words: tuple[str, ...] = ()
    tables: Sequence[Table] = field(default=())
    figures: Sequence[Figure] = field(default=())


def page(title: str, warnings: Sequence[str], sections: Sequence[Section]) -> str:
    """The page; all texts are escaped by the template."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    source = resources.files("knowpatch").joinpath("assets", "report.html.jinja")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(source.read_text(encoding="utf-8"))
    figures = [figure for section in sections for figure in section.figures]
    drawn = {figure.name: drawing(figure) for figure in figures}
    return template.render(
        title=title,
        warnings=warnings,
        sections=sections,
        heights={name: one["layout"]["height"] for name, one in drawn.items()},
        drawings=Markup(in_script(drawn)),
        plotly=Markup(get_plotlyjs()) if figures else "",
    )


def in_script(value: Any) -> str:
    """JSON that may stand in a script: nothing in it can end the script."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def drawing(figure: Figure) -> dict[str, Any]:
    """What plotly draws: traces and layout."""
    if isinstance(figure, Heat):
        return {"data": [_heat(figure)], "layout": _heat_layout(figure)}
    make = _bars if figure.kind == "bars" else _marks
    traces = [make(figure, number, series) for number, series in enumerate(figure.series)]
    return {"data": traces, "layout": _layout(figure)}


def _safe(text: str) -> str:
    """A label in which plotly finds no markup."""
    return html.escape(text, quote=False)


def _heat(heat: Heat) -> dict[str, Any]:
    return {
        "type": "heatmap",
        "x": [_safe(column) for column in heat.columns],
        "y": [_safe(row) for row in heat.rows],
        "z": heat.values,
        "zmin": 0,
        "zmax": 100,
        "colorscale": "Cividis",
        "texttemplate": "%{z:.0f}",
        "hovertemplate": "%{y}<br>%{x}: %{z:.1f} %<extra></extra>",
        "hoverongaps": False,
        "xgap": 2,
        "ygap": 2,
        "showscale": False,
    }


def _heat_layout(heat: Heat) -> dict[str, Any]:
    axis = {"type": "category", "automargin": True, "fixedrange": True, "showgrid": False}
    return {
        **_frame(),
        "height": 90 + 26 * len(heat.rows),
        "xaxis": {**axis, "side": "top"},
        "yaxis": {**axis, "autorange": "reversed"},
    }


def _frame() -> dict[str, Any]:
    return {
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#1d2733"},
        "margin": {"l": 8, "r": 8, "t": 16, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "closest",
    }


def _layout(chart: Chart) -> dict[str, Any]:
    up: dict[str, Any] = {
        "title": {"text": _safe(chart.y_label)},
        "gridcolor": "#e3e7ec",
        "automargin": True,
        "fixedrange": True,
        "rangemode": "tozero",
    }
    across: dict[str, Any] = {"automargin": True, "fixedrange": True}
    if chart.x_label:
        across["title"] = {"text": _safe(chart.x_label)}
    if chart.percent:
        up["range"] = [-2, 104]
    if chart.kind == "points":
        across |= {"range": [-2, 104], "gridcolor": "#e3e7ec"}
    else:
        order = [_safe(category) for category in chart.categories]
        across |= {
            "type": "category",
            "categoryorder": "array",
            "categoryarray": order,
            "autotickangles": [0, -40, -90],
        }
    return {
        **_frame(),
        "height": 400,
        "xaxis": across,
        "yaxis": up,
        "barmode": "group",
        "showlegend": len(chart.series) > 1,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    }


def _bars(chart: Chart, number: int, series: Series) -> dict[str, Any]:
    pattern = {"shape": "/"} if number >= len(COLOURS) else {}
    return {
        "type": "bar",
        "name": _safe(series.label),
        "x": [_safe(str(point.x)) for point in series.points],
        "y": _rounded(point.y for point in series.points),
        "error_y": _arms(series, across=False),
        "marker": {"color": COLOURS[number % len(COLOURS)], "pattern": pattern},
        "hovertemplate": "%{x}: %{y:.4~g}",
    }


def _marks(chart: Chart, number: int, series: Series) -> dict[str, Any]:
    lines = chart.kind == "lines"
    places = [p.x if isinstance(p.x, float) else _safe(str(p.x)) for p in series.points]
    trace = {
        "type": "scatter",
        "mode": "lines+markers" if lines else "markers",
        "name": _safe(series.label),
        "x": places,
        "y": _rounded(point.y for point in series.points),
        "error_y": _arms(series, across=False),
        "text": [_safe(point.text) for point in series.points],
        "marker": {
            "color": COLOURS[number % len(COLOURS)],
            "symbol": SYMBOLS[number % len(SYMBOLS)],
            "size": 9,
        },
        "hovertemplate": "%{text} %{x:.4~g}, %{y:.4~g}" if not lines else "%{x}: %{y:.4~g}",
    }
    return trace if lines else {**trace, "error_x": _arms(series, across=True)}


def _rounded(values: Any) -> list[float]:
    return [round(value, 6) for value in values]


def _arms(series: Series, *, across: bool) -> dict[str, Any]:
    below, above = series.arms(across=across)
    return {
        "type": "data",
        "symmetric": False,
        "array": _rounded(above),
        "arrayminus": _rounded(below),
        "visible": any(above) or any(below),
        "thickness": 1,
        "width": 2,
    }
