"""The report's tables: what stands in them."""

from __future__ import annotations

from collections.abc import Sequence

from knowpatch.bench.groups import Comparison, Group, data_of
from knowpatch.bench.layout import Entry, Table, entries
from knowpatch.bench.retention import Curve
from knowpatch.bench.statistics import Summary
from knowpatch.bench.summary import CellSummary, Reading

# The rows of the published comparison. Of several metrics the first that a dataset has is shown:
# data about sentiments and about refusals have measures of their own.
HEADLINE = (
    ("Edit success", ("sentiment_prob", "refusal_gen", "success_tf")),
    ("Portability", ("portability_tf",)),
    ("Locality", ("sentiment_kl", "retain_same_gen", "locality_tf")),
    ("Fluency", ("fluency_entropy_gen",)),
    ("Rephrase", ("rephrase_tf",)),
    ("Perplexity of other text", ("ordinary_ppl_tf",)),
    ("General ability", ("general_mc",)),
)
SIGNIFICANT = 0.05


def number(value: float | None, how: Reading | None = None) -> str:
    """A value as the report shows it: a share in percent, anything else with three digits."""
    if value is None:
        return "–"
    if how is not None and how.percent:
        return f"{100 * value:.1f}"
    size = abs(value)
    return f"{value:.1f}" if size >= 100 else f"{value:.2f}" if size >= 1 else f"{value:.3g}"


def interval(summary: Summary, how: Reading | None = None) -> str:
    if summary.low is None or summary.high is None:
        return "[–]"
    return f"[{number(summary.low, how)}, {number(summary.high, how)}]"


def marked(how: Reading) -> str:
    """A metric's name with its marks."""
    return how.name + (" ↓" if how.better == "less" else "") + (" †" if how.published else "")


def measured(
    how: Reading, after: Summary | None, before: Summary | None, best: float | None = None
) -> Entry:
    """A mean with its interval, its n, and what it was before."""
    if after is None:
        return Entry("–")
    earlier = "" if before is None else f", before {number(before.mean, how)}"
    told = f"{interval(after, how)}\nn {after.n}{earlier}"
    return Entry(number(after.mean, how), told, strong=after.mean == best)


def headline_metric(group: Group, names: Sequence[str]) -> str | None:
    """Which of the names stands in this group's row."""
    return next((name for name in names if group.having(name)), None)


def headlines(group: Group) -> list[tuple[str, str]]:
    """(row's title, metric) of the rows that the group has."""
    found = [(title, headline_metric(group, names)) for title, names in HEADLINE]
    return [(title, name) for title, name in found if name is not None]


def by_setting(groups: Sequence[Group]) -> list[list[Group]]:
    """The groups of each setting."""
    found: dict[object, list[Group]] = {}
    for group in groups:
        found.setdefault(group.setting, []).append(group)
    return list(found.values())


def _columns(groups: Sequence[Group]) -> tuple[str, ...]:
    return tuple(sorted({label for group in groups for label in group.cells}))


def headline_tables(groups: Sequence[Group]) -> list[Table]:
    """One table for each setting: datasets and their metrics down, methods across."""
    found = []
    for mine in by_setting(groups):
        methods = _columns(mine)
        rows = [
            (*entries(group.data, Entry(title, name)), *_across(group, name, methods))
            for group in mine
            for title, name in headlines(group)
        ]
        columns = ("Dataset", "Metric", *methods)
        found.append(Table(mine[0].setting.title, columns, tuple(rows), heads=2))
    return [table for table in found if table.rows]


def _across(group: Group, name: str, methods: Sequence[str]) -> list[Entry]:
    """One metric of each method; the best mean stands out where there are several."""
    found = [group.cells[m].metrics.get(name) if m in group.cells else None for m in methods]
    means = [m.after.mean for m in found if m and m.after]
    how = next(m.reading for m in found if m)
    best = None
    if len(means) > 1 and how.better != "neither":
        best = max(means) if how.better == "more" else min(means)
    return [measured(m.reading, m.after, m.before, best) if m else Entry("–") for m in found]


def metric_tables(groups: Sequence[Group]) -> list[Table]:
    """Every metric of every group."""
    return [
        Table(
            group.title,
            ("Metric", *group.cells),
            tuple(
                (Entry(marked(how), how.protocol), *_across(group, how.name, list(group.cells)))
                for how in group.readings()
            ),
            folded=True,
        )
        for group in groups
        if group.readings()
    ]


def part_tables(groups: Sequence[Group]) -> list[Table]:
    """Every metric's sub-kinds, where it has any."""
    found = []
    for group in groups:
        rows = [
            (Entry(marked(how)), Entry(kind), *_parts_across(group, how, kind))
            for how in group.readings()
            for kind in part_kinds(group, how.name)
        ]
        columns = ("Metric", "Sub-kind", *group.cells)
        found.append(Table(group.title, columns, tuple(rows), heads=2, folded=True))
    return [table for table in found if table.rows]


def part_kinds(group: Group, name: str) -> list[str]:
    """The sub-kinds of a metric in any of the group's cells."""
    cells = [cell.metrics[name] for cell in group.cells.values() if name in cell.metrics]
    return sorted({kind for metric in cells for kind in metric.parts})


def _parts_across(group: Group, how: Reading, kind: str) -> list[Entry]:
    parts = [
        cell.metrics[how.name].parts.get(kind) if how.name in cell.metrics else None
        for cell in group.cells.values()
    ]
    return [measured(how, part.after, part.before) if part else Entry("–") for part in parts]


def retention_tables(groups: Sequence[Group]) -> list[Table]:
    """How each metric of each sequential cell lasts."""
    columns = ("Metric", "Method", "R(0)", "F", "BWT", "slope", "half-life", "lasting half-life")
    found = []
    for group in groups:
        rows = []
        for how in group.readings():
            for label, cell in group.cells.items():
                kept = cell.retention.get(how.name)
                if kept is None:
                    continue
                told = [kept.every.bins.get(0), kept.final, kept.transfer, kept.every.slope]
                lives = [half_life(kept.every), half_life(kept.lasting)]
                values = [measured(how, summary, None) for summary in told]
                rows.append((*entries(marked(how), label), *values, *entries(*lives)))
        found.append(Table(group.title, columns, tuple(rows), heads=2))
    return [table for table in found if table.rows]


def half_life(curve: Curve | None) -> Entry:
    """A half-life, or beyond which age it lies."""
    if curve is None or 0 not in curve.bins:
        return Entry("–")
    text = f"> {curve.oldest}" if curve.half_life is None else str(curve.half_life)
    return Entry(text, f"n {curve.n}")


def cost_table(groups: Sequence[Group]) -> Table:
    """Seconds and memory."""
    rows = [
        entries(
            group.data,
            label,
            group.setting.mode,
            number(cell.seconds[0]) if cell.seconds else "–",
            number(cell.seconds[1]) if cell.seconds else "–",
            "–" if cell.peak_mb is None else f"{cell.peak_mb:.0f}",
            cell.records,
        )
        for group in groups
        for label, cell in group.cells.items()
    ]
    columns = ("Dataset", "Method", "Mode", "s/edit, median", "s/edit, mean", "peak MB", "cases")
    return Table("Seconds and memory", columns, tuple(rows), heads=2)


def pair_tables(found: Sequence[Comparison]) -> list[Table]:
    """Differences between methods: the headline's metrics, then the others."""
    columns = ("Dataset", "Metric", "A − B", "difference", "p", "p, Holm")
    headline = {name for _, names in HEADLINE for name in names}
    tables = []
    for title, folded in (("Metrics of the main table", False), ("All other metrics", True)):
        rows = [_pair(one) for one in found if (one.reading.name not in headline) == folded]
        tables.append(Table(title, columns, tuple(rows), heads=2, folded=folded))
    return [table for table in tables if table.rows]


def _pair(one: Comparison) -> tuple[Entry, ...]:
    difference = one.paired.difference
    told = f"{interval(difference, one.reading)}\nn {difference.n}"
    return (
        Entry(one.group.data, one.group.setting.mode),
        Entry(marked(one.reading)),
        Entry(f"{one.a} − {one.b}"),
        Entry(number(difference.mean, one.reading), told, strong=one.adjusted < SIGNIFICANT),
        Entry(f"{one.paired.p:.4f}"),
        Entry(f"{one.adjusted:.4f}", strong=one.adjusted < SIGNIFICANT),
    )


def cell_text(label: str, cell: CellSummary) -> Entry:
    """Which cell: method, data and mode, with its folder's name."""
    facts = cell.facts
    return Entry(f"{label} · {data_of(facts)} · {facts.mode}", cell.cell.id)


def progress_table(groups: Sequence[Group]) -> Table:
    """How far each cell has come."""
    rows = []
    for group in groups:
        for label, cell in group.cells.items():
            state = "complete" if cell.complete else f"INCOMPLETE: {far(cell)}"
            done = Entry(state, strong=not cell.complete)
            rows.append((cell_text(label, cell), done, *entries(cell.records, len(cell.failures))))
    return Table("How far each cell has come", ("Cell", "State", "cases", "failures"), tuple(rows))


def far(cell: CellSummary) -> str:
    """How many cases have their last word, of how many."""
    return f"{cell.records} of {'?' if cell.expected is None else cell.expected} cases"


def unscored_table(groups: Sequence[Group]) -> Table:
    """Records that a metric could not score, which are not zeros."""
    rows = [
        (cell_text(label, cell), *entries(name, count, why))
        for group in groups
        for label, cell in group.cells.items()
        for name, metric in cell.metrics.items()
        for why, count in sorted(metric.unscored.items())
    ]
    return Table("Unscored", ("Cell", "Metric", "cases", "Why"), tuple(rows), wide=True)


def failure_table(groups: Sequence[Group]) -> Table:
    """Every failure; cases of one cell that failed alike share a line."""
    rows = []
    for group in groups:
        for label, cell in group.cells.items():
            alike: dict[str, list[str]] = {}
            for case, why in cell.failures:
                alike.setdefault(why, []).append(case)
            for why, cases in alike.items():
                told = Entry(", ".join(dict.fromkeys(cases)))
                rows.append((cell_text(label, cell), Entry(str(len(cases))), told, Entry(why)))
    columns = ("Cell", "rows", "Cases", "What happened")
    return Table("Failures", columns, tuple(rows), wide=True)


def settings_table(groups: Sequence[Group]) -> Table:
    """What each cell is."""
    rows = []
    for group in groups:
        for label, cell in group.cells.items():
            facts = cell.facts
            model = ", ".join(f"{key} {value}" for key, value in sorted(facts.model.items()))
            options = ", ".join(f"{key}={value}" for key, value in sorted(facts.config.items()))
            rest = (
                f"seed {facts.seed}; limit {facts.limit or 'all'}; "
                f"probes {facts.probes or 'all'}; chat {'yes' if facts.chat else 'no'}; "
                f"data {facts.digest[:12]}; "
                + ", ".join(f"{key} {value}" for key, value in sorted(facts.versions.items()))
            )
            rows.append((cell_text(label, cell), *entries(model, rest, options)))
    columns = ("Cell", "Model", "Run", "Options of the method")
    return Table("Settings", columns, tuple(rows), folded=True, wide=True)


def protocol_table(groups: Sequence[Group]) -> Table:
    """What each metric measures, and how its answers were had."""
    readings = {how.name: how for group in groups for how in group.readings()}
    rows = [
        entries(marked(how), how.protocol, {"less": "less", "more": "more"}.get(how.better, "–"))
        + entries(how.about)
        for _, how in sorted(readings.items())
    ]
    columns = ("Metric", "Protocol", "better", "What it measures")
    return Table("Metrics", columns, tuple(rows), wide=True)
