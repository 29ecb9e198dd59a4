"""What methods do to the weights, fact by fact (KnowEdit, arXiv 2401.01286, Figures 6 and 7).

    python benchmarks/change.py DATA/counterfact/counterfact-edit.json [rome memit ft]
                                [--records 20] [--rows ROWS.jsonl]

Each record is edited alone by each method, at its defaults; of each patch the numbers of
`knowpatch locate change` are a row, with whether the edit took. The table is over the records that
all methods learned: an edit that did not take changes little, and looks sparse. Rows are written as
they are made; what is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes import Rows, accuracy, requests_of

from knowpatch import __version__, load
from knowpatch.bench.statistics import bootstrap
from knowpatch.editing import choose, edit_each
from knowpatch.locate.portrait import WAYS, portrait
from knowpatch.locate.vocabulary import KS, Ranks

TOGETHER = 5
"""Records that are edited in one batch; each has a patch of its own."""
NUMBERS = {
    "relative": ("change / matrix, %", 100.0),
    "top_columns": ("mass in 5 columns, %", 100.0),
    "percent_columns": ("in 1 % of the columns, %", 100.0),
    "top_rows": ("in 5 rows, %", 100.0),
    "hoyer_columns": ("Hoyer, columns", 1.0),
    "gini_columns": ("Gini, columns", 1.0),
    "stable_rank": ("stable rank", 1.0),
    "participation": ("participation ratio", 1.0),
    "matrices": ("matrices", 1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="What methods do to the weights.")
    parser.add_argument("file", type=Path, help="CounterFact's file")
    parser.add_argument("methods", nargs="*", default=["rome", "memit", "ft"])
    parser.add_argument("--records", type=int, default=20)
    parser.add_argument("--rows", type=Path, default=Path("results/locate/change.jsonl"))
    args = parser.parse_args()
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    records = json.loads(args.file.read_text(encoding="utf-8"))[: args.records]
    rows = Rows(args.rows, {"records": args.records, "version": __version__})
    model: Any = None
    for name in args.methods:
        done = {row["case"] for row in rows.found if row["method"] == name}
        left = [record for record in records if record["case_id"] not in done]
        for start in range(0, len(left), TOGETHER):
            print(f"{name}: {len(left) - start} records left", file=sys.stderr, flush=True)
            model = model or load()
            for row in made(model, name, left[start : start + TOGETHER]):
                rows.add(row)
    table([row for row in rows.found if row["method"] in args.methods], args.methods)


def made(model: Any, name: str, records: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each record, edited alone."""
    patches = edit_each(model, requests_of(records), method=choose(name))
    for record, patch in zip(records, patches, strict=True):
        with model.applied(patch):
            took = accuracy(model, record["prompt"], record["target_new"]) == 1
        found = portrait(model.view, patch)
        yield {
            "method": name,
            "case": record["case_id"],
            "took": took,
            "numbers": found.numbers(),
            "columns": found.columns,
            "new": {way: asdict(found.projected[way][0].new) for way in WAYS},
            "telling": found.projected["normed"][0].telling,
        }


def table(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> None:
    """As Markdown, over the records that all methods learned."""
    took = [{row["case"] for row in rows if row["method"] == m and row["took"]} for m in methods]
    common = set.intersection(*took)
    print(f"{len(common)} records that all of {', '.join(methods)} learned\n")
    print(f"| | {' | '.join(f'`{name}`' for name in methods)} |")
    print(f"|---|{'---|' * len(methods)}")
    mine = {
        name: [row for row in rows if row["method"] == name and row["case"] in common]
        for name in methods
    }
    for number, (words, scale) in NUMBERS.items():
        cells = [told([row["numbers"][number] for row in some], scale) for some in mine.values()]
        print(f"| {words} | {' | '.join(cells)} |")
    for way in WAYS:
        for k in KS:
            for when in ("before", "after", "random"):
                cells = [
                    told(
                        [hit(row["new"][way], k, when) for row in some if row["telling"]],
                        100.0,
                        share=when != "random",
                    )
                    for some in mine.values()
                ]
                print(f"| Hit@{k} {when}, {way}, % | {' | '.join(cells)} |")


def hit(ranks: Mapping[str, Any], k: int, when: str) -> float:
    return Ranks(**{**ranks, "random": tuple(ranks["random"])}).hits(k)[when]


def told(values: Sequence[float], scale: float, *, share: bool = False) -> str:
    """A mean with its interval; `share`: of ones among zeros and ones."""
    found = bootstrap([{"value": value} for value in values], share=share)
    if found is None:
        return "–"
    if found.low is None or found.high is None:
        return f"{scale * found.mean:.3g}"
    return f"{scale * found.mean:.3g} ({scale * found.low:.3g} to {scale * found.high:.3g})"


if __name__ == "__main__":
    main()
