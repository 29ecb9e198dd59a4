"""Does what is shipped answer as the patched model? Every method whose patches are weights.

    python benchmarks/shipping.py [METHOD ...] [--to peft merged gguf gguf-lora]
                                  [--rows results/export/shipping.jsonl] [--quick]

One fact by each method with its defaults in the bundled model, float32, exported to each target,
loaded back and asked: the largest difference of a logit at the edited prompt, and over 20 control
prompts, and whether the edit is still answered. Rows are written as they are made; what is there is
not made again. --quick: one method, peft.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes import Rows

from knowpatch import METHODS, EditRequest, __version__, edit, load
from knowpatch.export.ship import ship
from knowpatch.export.table import of_method

FACT = EditRequest(prompt="The capital of Australia is", subject="Australia", target="Canberra")
TARGETS = ("peft", "merged", "gguf", "gguf-lora")
QUICK = ["rome"]


def main() -> None:
    args = _arguments()
    able = [n for n in METHODS.names() if of_method(METHODS.get(n))["merged"] != "no"]
    names = args.methods or (QUICK if args.quick else able)
    rows = Rows(args.rows, {"prompt": FACT.prompt, "target": FACT.target, "version": __version__})
    done = {(row["method"], row["to"]) for row in rows.found}
    model: Any = None
    for name in names:
        left = [to for to in args.to if (name, to) not in done]
        if not left:
            continue
        print(name, file=sys.stderr, flush=True)
        model = model or load(dtype="float32")
        patch = edit(model, FACT, method=name)
        for to in left:
            rows.add({"method": name, "to": to, **asked(model, patch, to)})
    table([row for row in rows.found if row["method"] in names and row["to"] in args.to])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Does what is shipped answer as it should?")
    parser.add_argument("methods", nargs="*", help="all that change weights by default")
    parser.add_argument("--to", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--rows", type=Path, default=Path("results/export/shipping.jsonl"))
    parser.add_argument("--quick", action="store_true", help="one method, peft")
    args = parser.parse_args()
    if args.quick:
        args.to = ["peft"]
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    return args


def asked(model: Any, patch: Any, to: str) -> dict[str, Any]:
    """A patch through one target: what its parity says."""
    with tempfile.TemporaryDirectory() as folder:
        shipped = ship(model, [patch], to, Path(folder) / f"out{'.gguf' * ('gguf' in to)}")
    parity = shipped.parity
    return {
        "how": of_method(METHODS.get(patch.provenance.method))[to],
        "notes": list(shipped.notes),
        "bytes": shipped.size,
        "before": parity.before,
        "after": parity.after,
        "edits": parity.edits_difference,
        "controls": parity.controls_difference,
        "moved": parity.moved,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    print("| method | to | | logits, edit | logits, controls | answered | controls moved |")
    print("|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (TARGETS.index(row["to"]), row["how"], row["method"])):
        print(
            f"| `{row['method']}` | {row['to']} | {'; '.join(row['notes'])} | {row['edits']:.2g} | "
            f"{row['controls']:.2g} | {row['after']} of 1 ({row['before']}) | "
            f"{row['moved']} of 20 |"
        )


if __name__ == "__main__":
    main()
