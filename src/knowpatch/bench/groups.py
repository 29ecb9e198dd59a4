"""Which cells may stand side by side: the same model, asked the same way, on the same cases."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from typing import Any, NamedTuple

from knowpatch.bench.schema import CellFacts
from knowpatch.bench.statistics import Combine, Paired, Records, holm, paired_all
from knowpatch.bench.summary import CellSummary, Reading, record

LONGEST_LABEL = 40


class Setting(NamedTuple):
    """Everything but the method and the data that a score depends on."""

    model: tuple[tuple[str, str], ...]
    mode: str
    chat: bool
    probes: int | None

    @property
    def title(self) -> str:
        """What a heading says of it; the model's fingerprint is in the table of cells."""
        facts = {name: text for name, text in self.model if name != "fingerprint"}
        source = facts.pop("source", "").rstrip("/").rpartition("/")[2]
        model = ", ".join(text for text in (source, *facts.values()) if text)
        chat = ", chat template" if self.chat else ""
        probes = "" if self.probes is None else f", at most {self.probes} questions of a kind"
        return f"{model}: {self.mode} edits{chat}{probes}"


@dataclass(frozen=True)
class Group:
    """Cells of one setting on one dataset, by label.

    Attributes:
        data: dataset, with its split.
        cells: the method's label to its cell, in the labels' order.
    """

    setting: Setting
    data: str
    cells: Mapping[str, CellSummary]

    @property
    def title(self) -> str:
        return f"{self.data} · {self.setting.title}"

    def readings(self) -> list[Reading]:
        """The metrics of any of the cells, in order of appearance."""
        found = {n: m.reading for cell in self.cells.values() for n, m in cell.metrics.items()}
        return list(found.values())

    def having(self, metric: str) -> bool:
        """Whether any cell has a value of the metric."""
        cells = self.cells.values()
        return any(metric in c.metrics and c.metrics[metric].after is not None for c in cells)


def setting_of(facts: CellFacts) -> Setting:
    return Setting(tuple(sorted(facts.model.items())), facts.mode, facts.chat, facts.probes)


def data_of(facts: CellFacts) -> str:
    return f"{facts.dataset} ({facts.split})" if facts.split else facts.dataset


def groups_of(cells: Sequence[CellSummary]) -> list[Group]:
    """All groups, those of one setting next to each other.

    Data of the same name but another content (its digest) is another group.
    """

    def key(cell: CellSummary) -> tuple[Any, ...]:
        setting = setting_of(cell.facts)
        probes = -1 if setting.probes is None else setting.probes
        return (*setting[:3], probes, data_of(cell.facts), cell.facts.digest)

    names = labels(cells)
    found = []
    for _, some in groupby(sorted(cells, key=key), key):
        mine = sorted(some, key=lambda cell: names[cell.cell.id])
        first = mine[0].facts
        by_label = {names[cell.cell.id]: cell for cell in mine}
        found.append(Group(setting_of(first), data_of(first), by_label))
    return found


def labels(cells: Sequence[CellSummary]) -> dict[str, str]:
    """Each cell's column heading: its method, with whatever tells it from others of that method.

    A method that differs only between settings or datasets has one heading.
    """
    rivals: dict[tuple[Any, ...], list[CellSummary]] = {}
    for cell in cells:
        facts = cell.facts
        key = (setting_of(facts), data_of(facts), facts.digest, facts.method)
        rivals.setdefault(key, []).append(cell)
    found = {}
    for mine in rivals.values():
        told = [_told(cell, mine) for cell in mine]
        for cell, text in zip(mine, told, strict=True):
            alike = told.count(text) > 1
            found[cell.cell.id] = f"{text} #{cell.cell.id[:6]}" if alike else text
    return found


def _told(cell: CellSummary, among: Sequence[CellSummary]) -> str:
    """The method's name with those options, and the seed, in which the cells differ."""
    options = [{**other.facts.config, "seed": other.facts.seed} for other in among]
    mine = {**cell.facts.config, "seed": cell.facts.seed}
    differing = [
        f"{name}={_plain(value)}"
        for name, value in sorted(mine.items())
        if any(other.get(name) != value for other in options)
    ]
    text = ", ".join(differing)
    text = text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…"
    return f"{cell.facts.method} ({text})" if text else cell.facts.method


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


@dataclass(frozen=True)
class Comparison:
    """Method `a` minus method `b` in one metric, over the cases that both have.

    Attributes:
        adjusted: p after Holm's correction over all pairs of methods in this metric and group.
    """

    group: Group
    reading: Reading
    a: str
    b: str
    paired: Paired
    adjusted: float


def comparisons(group: Group) -> list[Comparison]:
    """Every pair of methods in every metric, metric by metric."""
    found: dict[str, list[tuple[str, str, Paired]]] = {}
    for a, b in combinations(group.cells, 2):
        for name, paired in _compared(group, group.cells[a], group.cells[b]):
            found.setdefault(name, []).append((a, b, paired))
    return [
        Comparison(group, how, a, b, paired, adjusted)
        for how in group.readings()
        for (a, b, paired), adjusted in zip(
            found.get(how.name, []), holm([p.p for _, _, p in found.get(how.name, [])]), strict=True
        )
    ]


def _compared(group: Group, a: CellSummary, b: CellSummary) -> Iterator[tuple[str, Paired]]:
    """The metrics that both have, compared on their common cases."""
    theirs = {row.case: row for row in b.cell.final}
    common = [(row, theirs[row.case]) for row in a.cell.final if row.case in theirs]
    shared = [how for how in group.readings() if how.name in a.metrics and how.name in b.metrics]
    pairs: list[tuple[Records, Records, Combine]] = [
        (
            [record(how, x.scores.get(how.name)) for x, _ in common],
            [record(how, y.scores.get(how.name)) for _, y in common],
            how.combine,
        )
        for how in shared
    ]
    design = a.cell.design([row for row, _ in common])
    for how, paired in zip(shared, paired_all(pairs, design=design), strict=True):
        if paired is not None:
            yield how.name, paired
