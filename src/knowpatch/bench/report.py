"""A results folder as a report: Markdown, CSV, JSON, one HTML page, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from knowpatch.bench import figures, tables
from knowpatch.bench.export import report_json, rows_csv, summary_csv
from knowpatch.bench.groups import Comparison, Group, comparisons, groups_of
from knowpatch.bench.layout import markdown as in_markdown
from knowpatch.bench.layout import plain_text
from knowpatch.bench.page import Section, page
from knowpatch.bench.pictures import picture
from knowpatch.bench.summary import Catalogue, summaries_of
from knowpatch.errors import OptionError
from knowpatch.files import write_atomically

TITLE = "Knowledge editing: results"
NEEDS = ("matplotlib", "plotly", "jinja2")

READING = (
    "Each number is a mean over cases, with its 95 % interval and the number n of cases that have "
    "it; shares are in percent. A case's queries are averaged within their sub-kind and its "
    "sub-kinds with each other. Cases are drawn anew 2,000 times (percentile bootstrap, fixed "
    "seed), in sequential runs as runs of up to 20 neighbours; a share that is 0 or 100 in every "
    "case has Wilson's interval. A case that failed, or that a metric could not score, is in no "
    "mean: it is listed below.",
    "“before” is the unedited model, measured by the same code on the same cases. ↓: less is "
    "better. Bold: the best mean of its row, which need not differ from the next.",
)
PROTOCOLS = (
    "Teacher-forced scores put the right answer's own tokens in front of the model, which gives "
    "away its length and beginning: they flatter. Free generation asks the model to answer and "
    "reads what it says. The two never share a name and cannot be compared with each other.",
    "†: repeats a published computation, its faults included, to be compared with published "
    "numbers only.",
    "A failed edit changes nothing and so has perfect locality: read locality beside success.",
)
PAIRS = (
    "A minus B over the cases that both have, with the same draws for both; shares in percentage "
    "points. p is from 10,000 flips of signs; Holm's correction is over all pairs of methods in "
    "one metric and dataset. Bold: below .05 after it.",
)
LASTING = (
    "R(a) is the mean after a further edits. F: the mean over all edits after the last one. BWT: "
    "what an edit has lost or won at the end against its value right after it was made. Slope: "
    "what each doubling of the age takes away. Half-life: the least age at which R, made "
    "non-increasing, is at most half of R(0); “lasting” counts only edits that were right at age 0."
)


def write_report(
    folder: Path, out: Path | None = None, *, catalogue: Catalogue | None = None
) -> list[Path]:
    """Write the report about the cells in `folder`, and say which files it is.

    Args:
        folder: a results folder.
        out: where to write; by default `report` in the results folder.
        catalogue: metrics by name; by default all that there are.

    Raises:
        DataError: no results there, or damaged ones.
        OptionError: a library for drawing is not installed.
    """
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        needed = " and ".join(missing)
        raise OptionError(f"a report needs {needed}: pip install 'knowpatch[plot]'")
    groups = groups_of(summaries_of(folder, _catalogue(catalogue)))
    compared = [one for group in groups for one in comparisons(group)]
    sections = sections_of(groups, compared)
    warnings = warnings_of(groups)
    texts = {
        "report.md": markdown(warnings, sections),
        "report.html": page(TITLE, warnings, sections),
        "report.json": report_json(groups, compared),
        "summary.csv": summary_csv(groups),
        "rows.csv": rows_csv(groups),
    }
    target = folder / "report" if out is None else out
    written = [write_atomically(target / name, text.encode()) for name, text in texts.items()]
    for figure in (figure for section in sections for figure in section.figures):
        written.append(write_atomically(target / f"{figure.name}.png", picture(figure)))
    return written


def _catalogue(given: Catalogue | None) -> Catalogue:
    if given is not None:
        return given
    from knowpatch.metrics.catalogue import catalogue  # metrics load torch, a given one does not

    return catalogue()


def warnings_of(groups: Sequence[Group]) -> list[str]:
    """What stands above everything else: cells that are not complete, and failures."""
    cells = [(label, cell) for group in groups for label, cell in group.cells.items()]
    found = [
        f"INCOMPLETE: {tables.cell_text(label, cell).text}: {tables.far(cell)}; "
        "the same run goes on where it stopped"
        for label, cell in cells
        if not cell.complete
    ]
    failed = sum(len(cell.failures) for _, cell in cells)
    if failed:
        rows = "1 row has" if failed == 1 else f"{failed} rows have"
        found.append(f"{rows} no scores because something failed: see Failures")
    return found


def sections_of(groups: Sequence[Group], compared: Sequence[Comparison]) -> list[Section]:
    """The report's parts; those without content are left out."""
    unscored, failures = tables.unscored_table(groups), tables.failure_table(groups)
    found = [
        Section("Main results", READING, tables.headline_tables(groups)),
        Section("All shares at a glance", (), (), figures.heats(groups)),
        Section("Success against locality", (), (), figures.scatters(groups)),
        Section("Sub-kinds", (), tables.part_tables(groups), figures.part_bars(groups)),
        Section(
            "Retention",
            (LASTING,),
            tables.retention_tables(groups),
            figures.retention_lines(groups),
        ),
        Section("Cost", (), [tables.cost_table(groups)], figures.cost_bars(groups)),
        Section("Comparisons", PAIRS, tables.pair_tables(compared)),
        Section("All metrics", (), tables.metric_tables(groups)),
        Section("Completeness", (), [tables.progress_table(groups)]),
        Section("Unscored", (), [unscored] if unscored.rows else ()),
        Section("Failures", (), [failures] if failures.rows else ()),
        Section("Settings", (), [tables.settings_table(groups)]),
        Section("Protocols", PROTOCOLS, [tables.protocol_table(groups)]),
    ]
    return [section for section in found if section.tables or section.figures]


def markdown(warnings: Sequence[str], sections: Sequence[Section]) -> str:
    """The report in Markdown, with the pictures beside it."""
    lines = [f"# {TITLE}", ""]
    lines += [f"> **{plain_text(warning)}**\n>" for warning in warnings]
    for section in sections:
        lines += ["", f"## {section.title}", ""]
        for words in section.words:
            lines += [words, ""]
        for figure in section.figures:
            lines += [f"![{plain_text(figure.title)}]({figure.name}.png)", ""]
        lines += [in_markdown(table) for table in section.tables]
    return "\n".join(lines).rstrip() + "\n"
