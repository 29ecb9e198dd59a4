"""The picture of `locate change` (KnowEdit's Figures 6 and 7): maps, mass, spectrum, words.

Axes: G by H cells of a heat map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from knowpatch.bench.figures import COLOURS
from knowpatch.bench.statistics import Summary
from knowpatch.locate.canvas import canvas, plain_axes, safe
from knowpatch.locate.portrait import Matrix, Portrait, hits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 5
"""Matrices that are drawn: those whose change is largest."""
WAY = "normed"
TOLD = {
    "before": "before the edit",
    "after": "after the edit",
    "random": "5 random columns, after",
}
GREYS = {"before": "#56b4e9", "after": "#0072b2", "random": "#bbbbbb"}
LINES = ("-", "--", "-.", ":", (0, (1, 2)))


def shown(portraits: Sequence[Portrait]) -> list[str]:
    """The labels of the matrices that are drawn, from the lowest block up."""
    mass: dict[str, float] = {}
    order: dict[str, tuple[int, str]] = {}
    for one in (one for each in portraits for one in each.matrices):
        mass[one.label] = mass.get(one.label, 0.0) + one.mass
        order[one.label] = -1 if one.layer is None else one.layer, one.label
    chosen = sorted(mass, key=lambda label: -mass[label])[:MOST]
    return sorted(chosen, key=lambda label: order[label])


def change_picture(portraits: Sequence[Portrait], title: str) -> Figure:
    """What patches change: of several, the mean of those that change a matrix."""
    labels = shown(portraits)
    matrices = {
        label: [one for each in portraits for one in each.matrices if one.label == label]
        for label in labels
    }
    figure = canvas(max(9.5, 1.0 + 2.1 * len(labels)), 5.6, title)
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    above, below = parts
    _maps(above, matrices)
    mass, spectrum, words = below.subplots(1, 3)
    _mass(mass, matrices)
    _spectrum(spectrum, matrices)
    _words(words, hits(portraits, WAY))
    return figure


def _maps(figure: Figure, matrices: Mapping[str, Sequence[Matrix]]) -> None:
    from matplotlib import colormaps

    axes_list = figure.subplots(1, len(matrices), squeeze=False)[0]
    colours = colormaps["cividis"].with_extremes(bad="white")
    for axes, (label, some) in zip(axes_list, matrices.items(), strict=True):
        map_GH = _mean([one.map_GH for one in some])
        map_GH = map_GH / map_GH.max()
        image = axes.imshow(
            map_GH.where(map_GH > 0, float("nan")).tolist(),  # as it was: no change at all
            cmap=colours,
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="nearest",
            extent=(0, some[0].shape[1], some[0].shape[0], 0),
        )
        axes.set_title(safe(label), fontsize=9, loc="left")
        axes.set_xlabel("column (neuron)", fontsize=8)
        axes.tick_params(labelsize=7)
    axes_list[0].set_ylabel("row (state)", fontsize=8)
    bar = figure.colorbar(image, ax=list(axes_list), fraction=0.03, pad=0.01)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("mean |change| of a cell,\nover the largest; white: none", fontsize=8)


def _mean(maps: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(maps)).mean(0)


def _mass(axes: Axes, matrices: Mapping[str, Sequence[Matrix]]) -> None:
    for number, (label, some) in enumerate(matrices.items()):
        shares = [share for share, _ in some[0].columns]
        held = [sum(one.columns[i][1] for one in some) / len(some) for i in range(len(shares))]
        axes.plot(
            [100 * share for share in shares],
            [100 * part for part in held],
            linestyle=LINES[number % len(LINES)],
            color=COLOURS[number % len(COLOURS)],
            label=safe(label),
        )
    axes.plot(
        [100 * share for share in shares],
        [100 * share for share in shares],
        color="#888888",
        linewidth=0.8,
        label="all columns alike",
    )
    axes.set_xscale("log")
    axes.set_xticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    axes.set_ylim(0, 103)
    axes.legend(fontsize=7, frameon=False)
    plain_axes(axes, "Mass of the change", "largest columns, % of all", "held by them, %")


def _spectrum(axes: Axes, matrices: Mapping[str, Sequence[Matrix]]) -> None:
    for number, some in enumerate(matrices.values()):
        length = min(len(one.spectrum) for one in some)
        values = [sum(one.spectrum[i] for one in some) / len(some) for i in range(length)]
        axes.plot(
            range(1, length + 1),
            values,
            marker="os^Dv"[number % 5],
            markersize=3,
            linestyle=LINES[number % len(LINES)],
            color=COLOURS[number % len(COLOURS)],
        )
    axes.set_yscale("log")
    axes.set_ylim(1e-3, 1.5)
    axes.set_xlim(0.5, max(10, *(len(one.spectrum) for some in matrices.values() for one in some)))
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    plain_axes(axes, "Spectrum of the change", "singular value", "over the largest")


def _words(axes: Axes, found: Mapping[int, Mapping[str, Summary]]) -> None:
    plain_axes(axes, "New answer among the k words\nof the 5 changed columns", "k", "hit, %")
    axes.set_ylim(0, 103)
    if not found:
        axes.text(0.5, 0.5, "no map that writes states", ha="center", transform=axes.transAxes)
        return
    for number, (name, told) in enumerate(TOLD.items()):
        summaries = [found[k][name] for k in found]
        middles = [100 * one.mean for one in summaries]
        arms = [_arms(one) for one in summaries]
        axes.bar(
            [place + 0.27 * (number - 1) for place in range(len(found))],
            middles,
            0.25,
            yerr=[[below for below, _ in arms], [above for _, above in arms]],
            error_kw={"linewidth": 0.8, "ecolor": "#444444", "capsize": 2},
            color=GREYS[name],
            label=told,
        )
    axes.set_xticks(range(len(found)), [str(k) for k in found])
    axes.legend(fontsize=7, frameon=False)


def _arms(one: Summary) -> tuple[float, float]:
    """How far the interval reaches below and above a share, in percent; of one fact there is none.

    A share of 0 or 1 of one fact has Wilson's interval in tables, which here would hide the rest.
    """
    if one.n < 2 or one.low is None or one.high is None:
        return 0.0, 0.0
    return max(0.0, 100 * (one.mean - one.low)), max(0.0, 100 * (one.high - one.mean))
