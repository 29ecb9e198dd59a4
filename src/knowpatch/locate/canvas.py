"""What the pictures of this folder share: a canvas, a file in the form of its ending, plain labels.

Colours are Okabe and Ito's, and maps run along cividis: both differ for every kind of colour
blindness.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowpatch.errors import InputError, OptionError
from knowpatch.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS = 110
FORMS = {".png": {"Software": None}, ".svg": {"Date": None}}
"""Endings of picture files; what would make the same picture another file each time is left out."""


def check_picture(path: Path | None) -> None:
    """Refuse, before the work, a picture that could not be drawn."""
    if path is None:
        return
    if path.suffix.lower() not in FORMS:
        raise InputError(f"{path}: a picture's name ends in {' or '.join(FORMS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OptionError(
            "pictures need matplotlib: install knowpatch[plot], or leave out --out"
        ) from None


def canvas(width: float, height: float, title: str = "") -> Figure:
    """An empty figure, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DOTS, layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(safe(title), x=0.01, ha="left", fontsize=10)
    return figure


def saved(figure: Figure, path: Path) -> Path:
    """The figure in a file; the same numbers give the same bytes."""
    from matplotlib import rc_context

    target, ending = io.BytesIO(), path.suffix.lower()
    with warnings.catch_warnings(), rc_context({"svg.hashsalt": "knowpatch"}):
        # A letter that the font lacks is a box in the picture; the tables have it.
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from font", category=UserWarning
        )
        form: Any = FORMS[ending]
        figure.savefig(target, format=ending[1:], metadata=form)
    return write_atomically(path, target.getvalue())


def safe(text: str) -> str:
    """A label that is not taken for mathematics."""
    return text.replace("$", r"\$")


def plain_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """The look of a chart."""
    axes.set_title(safe(title), fontsize=9, loc="left")
    axes.set_xlabel(safe(x), fontsize=8)
    axes.set_ylabel(safe(y), fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
