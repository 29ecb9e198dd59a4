"""The report's figures as plain numbers, which the page and the pictures both draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from knowpatch.bench.groups import Group
from knowpatch.bench.retention import bin_of
from knowpatch.bench.statistics import Summary
from knowpatch.bench.summary import CellSummary, MetricSummary, Reading
from knowpatch.bench.tables import HEADLINE, by_setting, headlines, marked, part_kinds

# Okabe and Ito's colours, which differ for every kind of colour blindness; yellow is left out, as
# it is too pale on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
UNEDITED = "unedited"
FEW = 8


@dataclass(frozen=True)
class Point:
    """A value with its interval, at a place; the horizontal value has one too, where it counts."""

    x: str | float
    y: float
    low: float | None = None
    high: float | None = None
    x_low: float | None = None
    x_high: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Series:
    """The points of one method."""

    label: str
    points: tuple[Point, ...]

    def arms(self, *, across: bool = False) -> tuple[list[float], list[float]]:
        """How far each interval reaches below and above its value; 0 where there is none."""
        below, above = [], []
        for point in self.points:
            middle = float(point.x) if across else point.y
            low, high = (point.x_low, point.x_high) if across else (point.low, point.high)
            below.append(0.0 if low is None else max(0.0, middle - low))
            above.append(0.0 if high is None else max(0.0, high - middle))
        return below, above


@dataclass(frozen=True)
class Heat:
    """Shares in percent: rows by columns, None where there is no value."""

    name: str
    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Chart:
    """Series of points.

    Attributes:
        kind: points (both axes are numbers), bars or lines (the horizontal one has categories).
        categories: in order, for bars and lines.
        percent: whether the vertical axis is 0 to 100; of points, both axes.
        named: whether the texts of the points are shown in print; the page shows them when asked.
    """

    name: str
    title: str
    kind: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    categories: tuple[str, ...] = ()
    percent: bool = True
    named: bool = False


Figure = Heat | Chart


def heats(groups: Sequence[Group]) -> list[Figure]:
    """For each group: every share of every method, and of the unedited model."""
    found: list[Figure] = []
    for group in groups:
        shares = [how for how in group.readings() if how.percent and group.having(how.name)]
        if not shares:
            continue
        values = tuple((_before(group, how), *_after(group, how)) for how in shares)
        rows, columns = tuple(marked(how) for how in shares), (UNEDITED, *group.cells)
        found.append(Heat(f"heat-{len(found) + 1:02}", group.title, rows, columns, values))
    return found


def _after(group: Group, how: Reading) -> list[float | None]:
    metrics = [cell.metrics.get(how.name) for cell in group.cells.values()]
    return [100 * m.after.mean if m and m.after else None for m in metrics]


def _before(group: Group, how: Reading) -> float | None:
    """The unedited model's value: of the cell that has most records, as failures leave some out."""
    metrics = [cell.metrics.get(how.name) for cell in group.cells.values()]
    told = [m.before for m in metrics if m and m.before]
    return 100 * max(told, key=lambda summary: summary.n).mean if told else None


def scatters(groups: Sequence[Group]) -> list[Figure]:
    """For each setting: success against locality, where both are shares."""
    found: list[Figure] = []
    for mine in by_setting(groups):
        points: dict[str, list[Point]] = {}
        for group in mine:
            names = dict(headlines(group))
            if HEADLINE[0][0] not in names or HEADLINE[2][0] not in names:
                continue
            for label, cell in group.cells.items():
                two = [cell.metrics.get(names[HEADLINE[i][0]]) for i in (2, 0)]
                if point := _crossed(two[0], two[1], group.data):
                    points.setdefault(label, []).append(point)
        if points:
            name = f"success-locality-{len(found) + 1:02}"
            series = tuple(Series(label, tuple(some)) for label, some in sorted(points.items()))
            title, x, y = mine[0].setting.title, "locality, %", "edit success, %"
            # More names than a few would lie on each other.
            few = sum(len(one.points) for one in series) <= FEW
            found.append(Chart(name, title, "points", x, y, series, named=few))
    return found


def _crossed(x: MetricSummary | None, y: MetricSummary | None, text: str) -> Point | None:
    """A point of two metrics; None where either is no share."""
    if x is None or y is None or not (x.reading.percent and y.reading.percent):
        return None
    if x.after is None or y.after is None:
        return None
    across, up = _point("", x.after, scale=100), _point("", y.after, scale=100)
    return Point(across.y, up.y, up.low, up.high, across.low, across.high, text)


def _point(x: str | float, summary: Summary, *, scale: float) -> Point:
    low, high = (None if end is None else scale * end for end in (summary.low, summary.high))
    return Point(x, scale * summary.mean, low, high)


def part_bars(groups: Sequence[Group]) -> list[Figure]:
    """For each group: the sub-kinds of the main table's metrics, as far as they are shares."""
    found: list[Figure] = []
    for group in groups:
        named = {how.name: how for how in group.readings() if how.percent}
        shown = [name for _, name in headlines(group) if name in named]
        kinds = [(name, kind) for name in shown for kind in part_kinds(group, name)]
        if not kinds:
            continue
        series = []
        for label, cell in group.cells.items():
            parts = [
                (f"{name}: {kind}", cell.metrics[name].parts[kind].after)
                for name, kind in kinds
                if name in cell.metrics and kind in cell.metrics[name].parts
            ]
            points = tuple(_point(category, summary, scale=100) for category, summary in parts)
            series.append(Series(label, points))
        name = f"sub-kinds-{len(found) + 1:02}"
        order = tuple(f"{name}: {kind}" for name, kind in kinds)
        found.append(
            Chart(name, group.title, "bars", "", "after the edit, %", tuple(series), order)
        )
    return found


def retention_lines(groups: Sequence[Group]) -> list[Figure]:
    """For each group of sequential cells: success and locality against the edit's age."""
    found: list[Figure] = []
    for group in groups:
        headline = {name for _, names in HEADLINE for name in names}
        shown = [
            how
            for how in group.readings()
            if how.percent and (how.name in headline or how.name.startswith("success"))
        ]
        for how in shown:
            series = [
                Series(label, points)
                for label, cell in group.cells.items()
                if (points := _kept(cell, how))
            ]
            if not series:
                continue
            oldest = max(c.retention[how.name].every.oldest for c in _keeping(group, how))
            order = tuple(_ages(bin_of(age)) for age in range(oldest + 1) if age == bin_of(age))
            name, title = f"retention-{len(found) + 1:02}", f"{marked(how)} · {group.data}"
            x, y = "edits since", "still there, %"
            found.append(Chart(name, title, "lines", x, y, tuple(series), order))
    return found


def _keeping(group: Group, how: Reading) -> list[CellSummary]:
    return [cell for cell in group.cells.values() if how.name in cell.retention]


def _kept(cell: CellSummary, how: Reading) -> tuple[Point, ...]:
    kept = cell.retention.get(how.name)
    bins = kept.every.bins if kept else {}
    return tuple(_point(_ages(age), summary, scale=100) for age, summary in bins.items())


def _ages(first: int) -> str:
    """A bin of ages, from its youngest."""
    return str(first) if first < 2 else f"{first}–{2 * first - 1}"


def cost_bars(groups: Sequence[Group]) -> list[Figure]:
    """For each setting: seconds per edit, and memory."""
    found: list[Figure] = []
    for place, mine in enumerate(by_setting(groups), 1):
        order = tuple(group.data for group in mine)
        title = mine[0].setting.title
        seconds: dict[str, list[Point]] = {}
        memory: dict[str, list[Point]] = {}
        for group in mine:
            for label, cell in group.cells.items():
                if cell.seconds:
                    seconds.setdefault(label, []).append(Point(group.data, cell.seconds[0]))
                if cell.peak_mb is not None:
                    memory.setdefault(label, []).append(Point(group.data, cell.peak_mb))
        for kind, y, told in (("seconds", "s/edit, median", seconds), ("memory", "MB", memory)):
            if told:
                series = tuple(Series(label, tuple(some)) for label, some in sorted(told.items()))
                name = f"{kind}-{place:02}"
                found.append(Chart(name, title, "bars", "", y, series, order, percent=False))
    return found
