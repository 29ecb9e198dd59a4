"""The report, from rows written by hand: the numbers in it; nothing is hidden, nothing loaded."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread

from knowpatch.bench import report
from knowpatch.bench.figures import Chart, Point, Series
from knowpatch.bench.groups import groups_of, labels
from knowpatch.bench.layout import plain_text
from knowpatch.bench.pictures import picture
from knowpatch.bench.report import write_report
from knowpatch.bench.retention import Scored, half_life, non_increasing, retention
from knowpatch.bench.schema import CellFacts, Row, ScoreRow, dump
from knowpatch.bench.summary import Reading, _parts, summaries_of
from knowpatch.errors import DataError, OptionError
from knowpatch.metrics.metric import Metric, part_columns, total_columns

NASTY = 'ValueError: </script><img src="http://x.example/a.png"> | `a` & $b$ *c*\u202e'


def ratio(means):
    return means["right"] / means["asked"] if means.get("asked") else None


def measure(name, protocol="teacher-forced", **facts):
    return Metric(name, protocol, f"about {name}", lambda *_: None, **facts)


CATALOGUE = {
    m.name: m
    for m in (
        measure("success_tf"),
        measure("portability_tf"),
        measure("locality_tf"),
        measure("fluency_entropy_gen", "free generation", percent=False),
        measure("old_way", published=True),
        measure("harm", better="less"),
        measure("precision", columns=part_columns, combine=ratio),
    )
}


def cell(folder, name, rows, **facts):
    """One cell's files; `facts` over those of a cell of single edits."""
    whole = {
        "model": {"source": "/models/tiny", "fingerprint": "f" * 64, "form": "float32"},
        "method": "first",
        "config": {"steps": 3},
        "seed": 0,
        "dataset": "capitals",
        "split": "test",
        "digest": "d" * 64,
        "mode": "single",
        "limit": len(rows),
        "probes": None,
        "chat": False,
        "metrics": tuple(CATALOGUE),
        "ages": (),
        "versions": {"knowpatch": "0.1.0"},
    } | facts
    path = folder / "cells" / name
    path.mkdir(parents=True)
    (path / "cell.json").write_text(dump(CellFacts(**whole)))
    (path / "rows.jsonl").write_text("".join(f"{dump(row)}\n" for row in rows), encoding="utf-8")
    return path


def row(index, after, before=None, **facts):
    """A row: metric to its values by sub-kind, or to a number for one query without sub-kind."""

    def values(scores, name):
        found = (scores or {}).get(name)
        return found if isinstance(found, dict) or found is None else {"": (found,)}

    scores = {
        name: ScoreRow(after=values(after, name), before=values(before, name)) for name in after
    }
    fields = {"seconds": float(index + 1), "peak_mb": 100.0 * (index + 1)} | facts
    return Row(case=f"case-{index}", index=index, scores=scores, **fields)


def results(folder: Path) -> Path:
    """Two methods on four cases, one of which the second method fails on; and one cut short."""
    hits = [1.0, 1.0, 0.0, 1.0]
    parts = {"a": (1.0, 0.0), "b": (1.0,)}
    first = [
        row(
            i,
            {
                "success_tf": hit,
                "locality_tf": parts,
                "fluency_entropy_gen": 500.0 + i,
                "old_way": hit,
                "mystery": 2.0 * i,
                "precision": {"right": (hit,), "asked": (2.0,)},
            },
            {"success_tf": 0.25},
        )
        for i, hit in enumerate(hits)
    ]
    second = [row(i, {"success_tf": 0.0, "locality_tf": {"a": (1.0,)}}) for i in range(3)]
    failed = Row(case="case-3", index=3, error=NASTY)
    unscored = {"harm": ScoreRow(unscored="no words <b>at all</b>")}
    second[2] = second[2].model_copy(update={"scores": second[2].scores | unscored})
    cell(folder, "aa", first)
    cell(folder, "bb", [*second, failed], method="second")
    cell(folder, "cc", first[:2], dataset="rivers", limit=5)
    return folder


@pytest.fixture
def made(tmp_path):
    written = write_report(results(tmp_path / "results"), tmp_path / "out", catalogue=CATALOGUE)
    return {path.name: path for path in written}


def lines(path):
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def test_means_by_hand(tmp_path):
    """Means, gains, sub-kinds, micro means, ratios, seconds: of four cases, worked out by hand."""
    cells = {c.cell.id: c for c in summaries_of(results(tmp_path), CATALOGUE)}
    first = cells["aa"]
    success = first.metrics["success_tf"]
    assert (success.after.mean, success.after.n) == (0.75, 4)
    assert (success.before.mean, success.gain.mean) == (0.25, 0.5)
    assert success.before.low == success.before.high == 0.25
    assert success.after.low < 0.75 < success.after.high
    locality = first.metrics["locality_tf"]
    assert locality.after.mean == 0.75  # (1/2 + 1) / 2
    assert locality.micro == (pytest.approx(2 / 3), None)
    assert {k: (p.after.mean, p.after.n) for k, p in locality.parts.items()} == {
        "a": (0.5, 4),
        "b": (1.0, 4),
    }
    assert locality.parts["b"].after.low == pytest.approx(0.5101, abs=1e-4)  # Wilson, 4 of 4
    assert first.metrics["precision"].after.mean == pytest.approx(0.375)  # .75 / 2
    assert first.metrics["mystery"].after.mean == 3
    assert first.metrics["mystery"].reading.protocol == "unknown"
    assert first.seconds == (2.5, 2.5)
    assert first.peak_mb == 400
    assert success.parts == {}


def test_failures_count_and_are_no_zeros(tmp_path):
    """A failed case is a record and a failure, and in no mean; an unscored one says why."""
    second = {c.cell.id: c for c in summaries_of(results(tmp_path), CATALOGUE)}["bb"]
    assert (second.records, second.metrics["success_tf"].after.n) == (4, 3)
    assert second.failures == (("case-3", NASTY),)
    assert second.metrics["harm"].unscored == {"no words <b>at all</b>": 1}
    assert second.metrics["harm"].after is None
    assert second.complete


def test_tables_hold_the_numbers(made):
    """The main table in Markdown; the same in summary.csv and report.json; rows are raw."""
    text = made["report.md"].read_text()
    [line] = [s for s in text.splitlines() if s.startswith("| capitals (test) | Edit success")]
    assert re.search(r"\*\*75\.0\*\* \\\[25\.0, 100\.0\\\] n 4, before 25\.0 \|", line)
    assert re.search(r"\| 0\.0 \\\[0\.0, 56\.1\\\] n 3 \|", line)
    assert "| Dataset | Metric | first | second |" in text
    fluency = next(s for s in text.splitlines() if "| Fluency fluency" in s)
    assert "501.5" in fluency
    assert "old\\_way †" in text
    summary = {(s["cell"], s["metric"], s["sub_kind"]): s for s in lines(made["summary.csv"])}
    assert float(summary["aa", "success_tf", ""]["gain_mean"]) == 0.5
    assert float(summary["aa", "locality_tf", "a"]["after_mean"]) == 0.5
    whole = json.loads(made["report.json"].read_text())
    by_id = {c["id"]: c for c in whole["cells"]}
    assert by_id["aa"]["metrics"]["success_tf"]["after"]["mean"] == 0.75
    rows = [s for s in lines(made["rows.csv"]) if s["cell"] == "aa" and s["case"] == "case-0"]
    kinds = {(s["metric"], s["sub_kind"]): (s["after"], s["values_after"]) for s in rows}
    assert kinds["locality_tf", "a"] == ("0.5", "1.0 0.0")
    assert ("success_tf", "") in kinds


def test_methods_are_compared_on_common_cases(made):
    """The second method has three of the four cases: 2/3 - 0 of them."""
    pairs = json.loads(made["report.json"].read_text())["comparisons"]
    [success] = [p for p in pairs if p["metric"] == "success_tf"]
    assert success["difference"]["mean"] == pytest.approx(2 / 3)
    assert success["difference"]["n"] == 3
    assert success["p"] == success["p_holm"] > 0.3
    assert {p["metric"] for p in pairs} == {"success_tf", "locality_tf"}


def test_incomplete_cells_are_said(made):
    """Two of five cases: in the warnings, in the table, in every format."""
    said = "INCOMPLETE: first · rivers (test) · single: 2 of 5 cases"
    assert said in made["report.md"].read_text()
    assert said in made["report.html"].read_text()
    assert ">INCOMPLETE: 2 of 5 cases<" in made["report.html"].read_text()
    assert {s["complete"] for s in lines(made["summary.csv"]) if s["cell"] == "cc"} == {"0"}


def test_an_open_cell_is_incomplete(tmp_path):
    """Patches that lie in a cell say that it is not finished; so does a fuller cell beside it."""
    path = cell(tmp_path, "aa", [row(0, {"success_tf": 1.0})])
    assert [c.complete for c in summaries_of(tmp_path, CATALOGUE)] == [True]
    (path / "patches").mkdir()
    (path / "patches" / "000001.json").write_text("{}")
    assert [c.complete for c in summaries_of(tmp_path, CATALOGUE)] == [False]
    rows = [row(i, {"success_tf": 1.0}) for i in range(3)]
    cell(tmp_path, "bb", rows, limit=None)
    cell(tmp_path, "cc", rows[:1], limit=None, method="second")
    cell(tmp_path, "dd", [], method="third", limit=None)
    told = {c.cell.id: (c.complete, c.expected) for c in summaries_of(tmp_path, CATALOGUE)}
    assert told["bb"] == (True, 3)
    assert told["cc"] == told["dd"] == (False, 3)


class Loads(HTMLParser):
    """Collects what a page loads, and its text."""

    def __init__(self):
        super().__init__()
        self.loads, self.tags, self.text, self._script = [], [], [], False

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._script = tag == "script"
        names = ("src", "href", "srcset", "data", "action", "poster")
        self.loads += [value for name, value in attrs if name in names]

    def handle_endtag(self, tag):
        self._script = False

    def handle_data(self, data):
        if not self._script:
            self.text.append(data)


def test_the_page_loads_nothing_and_escapes_all(made):
    """No link but to the page's own parts; a failure's text is text, whole."""
    page = Loads()
    source = made["report.html"].read_text()
    page.feed(source)
    assert page.loads
    assert all(target.startswith("#part-") for target in page.loads)
    assert not {"img", "link", "iframe", "base"} & set(page.tags)
    assert page.tags.count("script") == 3
    text = "".join(page.text)
    assert NASTY in text
    assert "no words <b>at all</b>" in text
    assert "@import" not in source.partition("</style>")[0]
    assert "url(" not in source.partition("</style>")[0]


def test_markdown_shows_texts_as_they_are(made):
    """Nothing in a text is markup, or ends its cell."""
    text = made["report.md"].read_text()
    assert "<img" not in text
    assert plain_text(NASTY) in text
    assert plain_text("a|b\n`c` <d> [e](f) \x1b") == r"a\|b \`c\` &lt;d&gt; \[e\](f)"
    for line in text.splitlines():
        if line.startswith("| first · "):
            assert line.count(" | ") in (3, 2)


def test_the_same_rows_give_the_same_bytes(made, tmp_path):
    """Made twice, every file is the same."""
    again = write_report(tmp_path / "results", tmp_path / "again", catalogue=CATALOGUE)
    assert {path.name: path.read_bytes() for path in again} == {
        name: path.read_bytes() for name, path in made.items()
    }
    assert {".png", ".md", ".csv", ".json", ".html"} == {path.suffix for path in again}


def test_a_damaged_line_is_one_error(tmp_path):
    """A line that is no row is one line of error with its place; a cut last line is left out."""
    results(tmp_path)
    path = tmp_path / "cells" / "aa" / "rows.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"case": "cut o')
    assert {c.cell.id: c.records for c in summaries_of(tmp_path, CATALOGUE)}["aa"] == 4
    path.write_text(whole.replace('"case": "case-1"', '"case": 1'))
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: not a row") as caught:
        write_report(tmp_path, catalogue=CATALOGUE)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report").exists()


def test_no_results_is_an_error(tmp_path):
    """A folder without cells."""
    with pytest.raises(DataError, match="no cells of results"):
        write_report(tmp_path, catalogue=CATALOGUE)


def test_a_missing_library_is_told(tmp_path, monkeypatch):
    """What to install, before anything is written."""
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"pip install 'knowpatch\[plot\]'"):
        write_report(results(tmp_path), catalogue=CATALOGUE)
    assert not (tmp_path / "report").exists()


def test_cells_without_scores_still_make_a_report(tmp_path):
    """Every case failed, or none has been run: the report says so."""
    cell(tmp_path, "aa", [Row(case="0", index=0, error="no such mode")])
    cell(tmp_path, "bb", [], method="second", limit=3)
    write_report(tmp_path, catalogue=CATALOGUE)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "no such mode" in text
    assert "0 of 3 cases" in text


def test_labels_tell_cells_of_one_method_apart(tmp_path):
    """Options and seeds that differ are in the label; other data needs none."""
    rows = [row(0, {"success_tf": 1.0})]
    cell(tmp_path, "aa", rows)
    cell(tmp_path, "bb", rows, config={"steps": 9})
    cell(tmp_path, "cc", rows, dataset="rivers", config={"steps": 9})
    cell(tmp_path, "dd", rows, dataset="lakes", seed=1)
    cell(tmp_path, "ee", rows, dataset="lakes", seed=1, metrics=())
    found = labels(summaries_of(tmp_path, CATALOGUE))
    assert found == {
        "aa": "first (steps=3)",
        "bb": "first (steps=9)",
        "cc": "first",
        "dd": "first #dd",
        "ee": "first #ee",
    }


def test_names_of_any_kind_are_only_text(tmp_path):
    """Names with markup, mathematics and letters of other scripts, in every file."""
    name = "</script><b>$x_1$ 猫 | `"
    scores = {"success_tf": 1.0, "locality_tf": {name: (0.5,)}, name: 2.0}
    rows = [row(i, scores) for i in range(3)]
    cell(tmp_path, "aa", rows, method=name, dataset=name, split=name)
    cell(tmp_path, "bb", rows, method="=1+1", dataset=name, split=name)
    write_report(tmp_path, catalogue=CATALOGUE)
    page = Loads()
    page.feed((tmp_path / "report" / "report.html").read_text())
    assert page.tags.count("script") == 3
    assert "".join(page.text).count(name) > 5
    assert "<b>$" not in (tmp_path / "report" / "report.md").read_text()
    assert name in {s["method"] for s in lines(tmp_path / "report" / "rows.csv")}


def test_other_settings_are_other_tables(tmp_path):
    """Another model, mode, template or number of questions is never in the same group."""
    rows = [row(0, {"success_tf": 1.0})]
    cell(tmp_path, "aa", rows)
    for i, other in enumerate(
        (
            {"mode": "batch"},
            {"chat": True},
            {"probes": 2},
            {"digest": "e"},
            {"split": "train"},
            {"model": {"source": "other"}},
        )
    ):
        cell(tmp_path, f"b{i}", rows, method="second", **other)
    assert {len(g.cells) for g in groups_of(summaries_of(tmp_path, CATALOGUE))} == {1}


# -- retention -------------------------------------------------------------------------------------


def test_retention_by_hand():
    """The card's: ages 3, 2, 1, 0 end as 0, 1, 1, 1, and all were right at first."""
    first = [Scored(i, i + 1, 0, 1.0, final=False) for i in range(3)]
    last = [Scored(i, 4, 3 - i, float(i > 0), final=True) for i in range(4)]
    kept = retention([*first, *last], share=True)
    assert kept.final.mean == 0.75
    assert kept.transfer.mean == -0.25
    assert kept.every.half_life == kept.lasting.half_life == 3
    assert (kept.lasting.n, kept.every.oldest) == (4, 3)
    assert kept.every.bins[2].mean == 0.5  # ages 2 and 3
    assert kept.every.slope.mean < 0
    assert {n: s.mean for n, s in kept.checkpoints.items()} == {1: 1, 2: 1, 3: 1, 4: 0.75}


def test_only_edits_that_took_can_last():
    """An edit that failed at age 0 is in R, and not in the lasting curve."""
    rows = [Scored(0, 1, 0, 0.0, final=False), Scored(0, 2, 1, 0.0, final=True)]
    rows += [Scored(1, 2, 0, 1.0, final=True), Scored(1, 3, 1, 1.0, final=False)]
    kept = retention(rows, share=True)
    assert (kept.every.n, kept.lasting.n) == (2, 1)
    assert kept.lasting.bins[1].mean == 1
    assert kept.every.bins[1].mean == 0.5
    assert retention(rows, share=False).lasting is None
    assert retention(rows[:1], share=True) is None


def test_what_lasts_has_no_half_life():
    """A method that forgets nothing: R is 1 at all ages, the half-life is not reached."""
    kept = retention([Scored(i, 8, 7 - i, 1.0, final=True) for i in range(8)], share=True)
    assert kept.every.half_life is None
    assert kept.every.slope.mean == pytest.approx(0)
    assert half_life([(1, 1.0), (2, 0.0)]) is None  # R(0) is not known


def test_non_increasing_fit():
    """Pooled where it rises, by weight."""
    assert non_increasing([1.0, 0.2, 0.6, 0.1], [1, 1, 1, 1]) == pytest.approx([1, 0.4, 0.4, 0.1])
    assert non_increasing([0.0, 1.0], [3, 1]) == [0.25, 0.25]


def test_a_sequential_cell_is_reported(tmp_path):
    """Its main table is of final rows alone; its curves are of all."""
    early = [row(0, {"success_tf": 1.0}, edits=1, age=0, final=False)]
    late = [row(i, {"success_tf": float(i > 0)}, edits=4, age=3 - i) for i in range(4)]
    cell(tmp_path, "aa", [*early, *late], mode="sequential", limit=4)
    [summary] = summaries_of(tmp_path, CATALOGUE)
    assert (summary.records, summary.metrics["success_tf"].after.mean) == (4, 0.75)
    assert summary.retention["success_tf"].transfer.mean == -0.5  # edits 1 and 4 have both
    names = {path.name for path in write_report(tmp_path, catalogue=CATALOGUE)}
    assert "retention-01.png" in names
    assert "## Retention" in (tmp_path / "report" / "report.md").read_text()


def test_what_is_summed_up_has_no_sub_kinds():
    """Log-likelihoods and numbers of tokens are summands, not kinds of question."""
    values = {"nll": [3.0, 5.0], "tokens": [2.0, 2.0]}
    assert _parts(Reading("ppl", columns=total_columns), values) is None
    assert _parts(Reading("success"), values) == {"nll": 4.0, "tokens": 2.0}


def test_a_legend_of_long_names_takes_several_lines():
    """As many names side by side as the picture is wide for: none is cut off."""
    point = Point("0", 50.0)

    def drawn(names):
        series = tuple(Series(name, (point,)) for name in names)
        chart = Chart("one", "Title", "lines", "", "", series, ("0",))
        return imread(io.BytesIO(picture(chart)), format="png")[:, :, :3]

    for names in (["a", "b"], ["\u2588" * 40] * 4):
        image = drawn(names)
        assert (image[:, :3] == 1).all()  # nothing runs into the edges
        assert (image[:, -3:] == 1).all()
