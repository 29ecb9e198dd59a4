"""The first records of a CounterFact file as a file of requests: facts to warm up on.

python benchmarks/warmup.py counterfact-train.json warmup.jsonl [COUNT]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

COUNT = 1000


def main(source: Path, out: Path, count: int = COUNT) -> None:
    records = json.loads(source.read_text())[:count]
    lines = [json.dumps({"prompt": r["prompt"], "target": r["target_new"]}) for r in records]
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:4]))
