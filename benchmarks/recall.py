"""Whether a memory finds the fact that a question is about, and keeps still where there is none.

    python benchmarks/recall.py [scr] [memprompt] [--facts 40,2000] [--out FILE]

The first 40 records of CounterFact (KNOWPATCH_DATA) are asked, with so many facts in memory: these
and the next of the file, then those of its split `train`. For edited prompts and rephrases: the
share whose nearest fact is the right one (recall at 1), and that is shown it; for neighbours, and
what else ought to stay: the share that is shown any. With Wilson's 95 % intervals. A row for each
question goes to results/external/recall.jsonl.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from knowpatch import EditRequest, __version__, edit, load
from knowpatch.bench.statistics import wilson
from knowpatch.data.case import LOCALITY, REPHRASE, REWRITE, Case
from knowpatch.data.source import load as load_cases
from knowpatch.edited import EditedModel
from knowpatch.files import write_atomically
from knowpatch.models.sites import listening
from knowpatch.parts.factbook import said
from knowpatch.parts.rules import rendered

ASKED = 40
OUT = Path(__file__).parent.parent / "results" / "external" / "recall.jsonl"
KINDS = {"prompts": REWRITE, "rephrases": REPHRASE, "neighbours": LOCALITY}
Row = dict[str, Any]


def requests(count: int) -> list[EditRequest]:
    """The first `count` facts of the file, then of `train`; of one prompt the first."""
    cases = [*load_cases("counterfact").cases[:count]]
    if len(cases) < count:
        cases += load_cases("counterfact:train", limit=2 * count).cases
    found: dict[str, EditRequest] = {}
    for case in cases:
        for request in case.requests:
            found.setdefault(request.prompt, request)
    return list(found.values())[:count]


def rows(model: EditedModel, name: str, facts: int, cases: Sequence[Case]) -> Iterator[Row]:
    """What a memory of so many facts shows each question."""
    patch = edit(model, requests(facts), method=name)
    for case in cases:
        (request,) = case.requests
        mine = said(request.prompt, request.target)
        for kind, named in KINDS.items():
            for probe in case.of(named):
                with listening() as heard:
                    rendered([patch], probe.prompt, model.view, chat=False)
                nearest = heard[0]
                yield {
                    "method": name,
                    "facts": facts,
                    "case": case.id,
                    "kind": kind,
                    "prompt": probe.prompt,
                    "right": nearest.what == mine,
                    "fired": nearest.fired,
                    "score": nearest.score,
                    "threshold": nearest.threshold,
                    "version": __version__,
                }


def told(found: Sequence[Row], name: str, facts: int) -> Iterator[str]:
    """Shares with their intervals, in lines."""
    for kind in KINDS:
        mine = [r for r in found if (r["method"], r["facts"], r["kind"]) == (name, facts, kind)]
        shares = {"shown any": [row["fired"] for row in mine]}
        if kind != "neighbours":
            shares = {
                "recall at 1": [row["right"] for row in mine],
                "shown the right one": [row["right"] and row["fired"] for row in mine],
            }
        for what, values in shares.items():
            low, high = wilson(sum(values), len(values))
            share = f"{sum(values) / len(values):.3f} ({low:.3f} to {high:.3f})"
            yield f"{name}, {facts} facts, {kind}: {what} {share}, n = {len(values)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=["scr", "memprompt"])
    parser.add_argument("--facts", default="40,2000", help="numbers of facts in memory")
    parser.add_argument("--out", type=Path, default=OUT, help="file of rows")
    args = parser.parse_args()
    model, cases = load(), load_cases("counterfact", limit=ASKED).cases
    found: list[Row] = []
    for name in args.methods:
        for facts in map(int, args.facts.split(",")):
            found += rows(model, name, facts, cases)
            for line in told(found, name, facts):
                print(line, flush=True)
    write_atomically(args.out, "".join(f"{json.dumps(row)}\n" for row in found).encode())


if __name__ == "__main__":
    main()
