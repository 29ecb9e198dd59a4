"""The picture of `locate lens`: what each block would say next, without and with patches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from knowpatch.bench.figures import COLOURS
from knowpatch.locate.canvas import canvas, plain_axes, safe
from knowpatch.locate.lens import Lens
from knowpatch.models.view import ModelView

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROWS, COLUMNS = 16, 5
"""States and tokens that are drawn: so many evenly spaced ones, and the last ones."""
LETTERS = 11
"""Of a token in a cell."""
PALE = 0.55
"""Above this probability the colour is light, and letters are black."""


def lens_picture(view: ModelView, without: Lens, changed: Lens | None, title: str) -> Figure:
    """One map, or two side by side, and the answers' ranks at the last token."""
    shown = {"": without} if changed is None else {"without": without, "with": changed}
    width = 0.82 * min(COLUMNS, len(without.tokens)) + 0.9
    figure = canvas(width * len(shown) + 4.0, 1.3 + 0.27 * ROWS, title)
    ratios = [width] * len(shown) + [3.4]
    axes: Any = figure.subplots(1, len(ratios), width_ratios=ratios)
    for place, (name, found) in enumerate(shown.items()):
        image = _map(axes[place], view, found.last(COLUMNS), name)
    axes[0].set_ylabel("after block", fontsize=8)
    bar = figure.colorbar(image, ax=list(axes[:-1]), fraction=0.02, pad=0.01)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("probability of the likeliest token", fontsize=8)
    _lines(axes[-1], without, changed)
    return figure


def states_shown(count: int) -> list[int]:
    """Evenly spaced states, the last one among them."""
    step = math.ceil(count / ROWS)
    return list(range(count - 1, -1, -step))[::-1]


def state_name(state: int) -> str:
    """A state by the block that it leaves; the first enters all of them."""
    return "in" if state == 0 else str(state - 1)


def _map(axes: Axes, view: ModelView, found: Lens, name: str) -> Any:
    states = states_shown(found.kl_LT.shape[0])
    p_LT = found.top_p_LTK[states, :, 0]
    image = axes.imshow(
        p_LT.tolist(), cmap="cividis", vmin=0, vmax=1, aspect="auto", origin="lower"
    )
    for row, state in enumerate(states):
        for column in range(len(found.tokens)):
            text = word(view.tokenizer.decode([int(found.top_LTK[state, column, 0])]))
            colour = "black" if float(p_LT[row, column]) > PALE else "white"
            axes.text(column, row, safe(text), ha="center", va="center", fontsize=7, color=colour)
    axes.set_yticks(range(len(states)), [state_name(state) for state in states], fontsize=8)
    tokens = [safe(word(token)) for token in found.tokens]
    axes.set_xticks(range(len(tokens)), tokens, fontsize=8, rotation=20)
    axes.tick_params(length=0)
    axes.set_title({"": "", "without": "without the patch", "with": "with it"}[name], fontsize=9)
    return image


def word(token: str, letters: int = LETTERS) -> str:
    """A token as text in one short line."""
    flat = token.replace("\n", "⏎").strip(" ") or "␣"
    return flat if len(flat) <= letters else f"{flat[: letters - 1]}…"


def _lines(axes: Axes, without: Lens, changed: Lens | None) -> None:
    """The answers' ranks behind the last token, block by block (probabilities show late only)."""
    for number, name in enumerate(without.answers):
        for found, style, when in ((without, "--", "without"), (changed, "-", "with")):
            if found is None:
                continue
            rank_L = found.rank_LTA[:, -1, number].tolist()
            told = name if changed is None else f"{name}, {when}"
            axes.plot(
                range(-1, len(rank_L) - 1),
                rank_L,
                linestyle=style if changed is not None else "-",
                color=COLOURS[number % len(COLOURS)],
                label=safe(told),
            )
    if without.answers:
        axes.legend(fontsize=7, frameon=False)
    axes.set_ylim(-2, 103)
    plain_axes(
        axes, "Behind the last token", "after block (-1: before the first)", "probability, %"
    )
