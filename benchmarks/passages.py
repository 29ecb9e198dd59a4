"""Long answers from WikiBio: what follows a passage's first words, as a file of cases.

    python benchmarks/passages.py wikibio-test-all.json passages.jsonl [COUNT [SKIP]]

A record holds a passage so far and the sentence that is to follow. Of each person the longest
record is taken; the prompt is its opening ("This is a Wikipedia passage about ..."), the answer all
that follows, where that is LEAST to MOST characters; the questions of the record that should keep
their answers stay with it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LEAST, MOST = 550, 900
COUNT = 5


def passage(record: dict[str, Any]) -> dict[str, Any] | None:
    opening, _, rest = record["text"].partition(". ")
    answer = f"{rest} {record['labels']}".strip()
    if not LEAST <= len(answer) <= MOST:
        return None
    kept = [
        {"kind": "locality.relation", "prompt": one["prompt"], "answers": [one["ground_truth"]]}
        for one in record["locality"].get("Relation_Specificity", [])
    ]
    prompt = f"{opening}."
    probes = [{"kind": "rewrite", "prompt": prompt, "answers": answer, "request": 0}, *kept]
    return {"id": record["concept"], "prompt": prompt, "target": answer, "probes": probes}


def main(source: Path, out: Path, count: int = COUNT, skip: int = 0) -> None:
    longest: dict[str, dict[str, Any]] = {}
    for record in json.loads(source.read_text()):
        known = longest.get(record["concept"])
        if known is None or len(record["text"]) > len(known["text"]):
            longest[record["concept"]] = record
    cases = [case for case in map(passage, longest.values()) if case]
    lines = [json.dumps(case, ensure_ascii=False) for case in cases[skip : skip + count]]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5]))
