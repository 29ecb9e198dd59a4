"""The picture of `locate roundtrip` (KnowEdit's Figure 10)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from knowpatch.bench.figures import COLOURS
from knowpatch.bench.statistics import Summary
from knowpatch.locate.canvas import canvas, plain_axes, safe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Means = Mapping[str, Summary]
LOOKS: dict[str, tuple[str, dict[str, Any]]] = {
    "edited_back": ("edited back", {"color": COLOURS[1], "marker": "o"}),
    "dropped": ("patches dropped", {"color": COLOURS[0], "marker": "D"}),
}


def roundtrip_picture(found: Mapping[str, Means], title: str) -> Figure:
    """What is left after both ways back, method by method: weights, true objects, other prompts."""
    figure = canvas(11.5, 1.7 + 0.5 * len(found), title)
    axes: Any = figure.subplots(1, 3, sharey=True)
    # No weight is left by dropping: its bytes are what they were, which every row checks.
    _panel(axes[0], found, {"edited_back": "weights_left", "dropped": None}, 100.0)
    plain_axes(axes[0], "Left in the weights", "of the first edit's change, %", "")
    _panel(axes[1], found, {way: f"{way}.distortion" for way in LOOKS}, 1.0)
    plain_axes(axes[1], "Distortion of the true answers", "Jensen-Shannon, nats", "")
    _panel(axes[2], found, {way: f"{way}.kl" for way in LOOKS}, 1.0)
    plain_axes(axes[2], "Moved on control prompts", "KL divergence, nats", "")
    for panel in axes:
        panel.grid(axis="x", color="#dddddd", linewidth=0.6)
        panel.grid(visible=False, axis="y")
    axes[0].set_yticks(range(len(found)), [safe(name) for name in found], fontsize=9)
    axes[0].set_ylim(len(found) - 0.5, -0.5)
    axes[2].legend(fontsize=8, frameon=False, loc="best")
    return figure


def _panel(
    axes: Axes, found: Mapping[str, Means], names: Mapping[str, str | None], scale: float
) -> None:
    axes.axvline(0, color="#888888", linewidth=0.8)
    for step, (way, name) in enumerate(names.items()):
        label, look = LOOKS[way]
        for place, mine in enumerate(found.values()):
            one = mine.get(name) if name else _nothing(mine)
            if one is not None:
                low, high = (one.mean if end is None else end for end in (one.low, one.high))
                arms = [[scale * (one.mean - low)], [scale * (high - one.mean)]]
                axes.errorbar(
                    [scale * one.mean],
                    [place + 0.24 * (step - 0.5)],
                    xerr=arms,
                    linestyle="",
                    markersize=6,
                    elinewidth=1.2,
                    **look,
                )
            elif step == 0:
                axes.text(
                    0.02,
                    place,
                    "changes no weight",
                    fontsize=8,
                    va="center",
                    transform=axes.get_yaxis_transform(),
                )
        axes.errorbar([], [], linestyle="", label=label, **look)


def _nothing(means: Means) -> Summary | None:
    """What dropping leaves in the weights, where every row's bytes were the same."""
    same = means.get("dropped.bytes_same")
    left = same is not None and same.mean == 1 and "weights_left" in means
    return Summary(0.0, None, None, means["weights_left"].n) if left else None
