"""Which edits survive the number types of a GGUF file?

    python benchmarks/quantised.py DATA/counterfact/counterfact-edit.json
                                   [--records 40] [--types F16 Q8_0 ...] [--files 2]
                                   [--rows results/export/quantised.jsonl] [--quick]

Each record is edited alone in the bundled model (whose matrices are Q4_1), and the tensor that the
edit changes is rounded as `knowpatch export --to gguf` writes it: laid out as in the file, encoded
at the type, decoded, put back. answered: records whose whole target is the most likely, token by
token; rephrase, locality: as in recipes.py; logits: the largest difference of a logit from the
patched model in float32 at the places of the target, median over records. "none" is the patch as it
is. --files: so many of the edits are written, for each type, to a real file that transformers reads
back; the run ends with an error if a file answers otherwise than the rounded tensor. Rows are
written as they are made; what is there is not made again. --quick: 4 records, no files.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.quants import dequantize
from recipes import Rows, interval, requests_of, scores
from torch import Tensor

from knowpatch import Patch, __version__, load
from knowpatch.bench.statistics import wilson
from knowpatch.deltas import Dense
from knowpatch.editing import choose, edit_each
from knowpatch.export.gguf import Gguf, laid_out
from knowpatch.export.ship import ship
from knowpatch.export.target import Cargo
from knowpatch.models.gguf_file import GgufFile, Layout, Type, encoded, type_called
from knowpatch.parts.spans import continuation

PLAIN = "none"
TYPES = ("F16", "BF16", "Q8_0", "Q5_1", "Q4_1", "Q4_0")
FEW, CHUNK = 4, 8


def main() -> None:
    args = _arguments()
    records = json.loads(args.file.read_text(encoding="utf-8"))[: args.records]
    recipe = {"method": args.method, "options": args.options, "version": __version__}
    rows = Rows(args.rows, recipe)
    wanted = [PLAIN, *args.types]
    done = {(row["case"], row["type"]) for row in rows.found}
    left = [r for r in records if any((r["case_id"], kind) not in done for kind in wanted)]
    if left:
        model = load()
        for record, patch in patches(model, left, choose(args.method, args.options)):
            print(f"record {record['case_id']}", file=sys.stderr, flush=True)
            number = records.index(record)
            for row in measured(model, record, patch, wanted, files=number < args.files):
                if (row["case"], row["type"]) not in done:
                    rows.add(row)
    cases = {record["case_id"] for record in records}
    table([row for row in rows.found if row["case"] in cases], wanted)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Which edits survive a GGUF file's number types?")
    parser.add_argument("file", type=Path, help="counterfact-edit.json")
    parser.add_argument("--records", type=int, default=40)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--files", type=int, default=2, help="edits written to real files")
    parser.add_argument("--method", default="rome")
    parser.add_argument("--options", type=json.loads, default={}, help="of the method, as JSON")
    parser.add_argument("--rows", type=Path, default=Path("results/export/quantised.jsonl"))
    parser.add_argument("--quick", action="store_true", help="4 records, no files")
    args = parser.parse_args()
    if args.quick:
        args.records, args.files = FEW, 0
    for kind in args.types:
        type_called(kind)
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    return args


def patches(
    model: Any, records: Sequence[Mapping[str, str]], method: Any
) -> Iterator[tuple[Mapping[str, str], Patch]]:
    """Each record with its patch, a few computed together."""
    for start in range(0, len(records), CHUNK):
        some = records[start : start + CHUNK]
        yield from zip(some, edit_each(model, requests_of(some), method=method), strict=True)


def measured(
    model: Any, record: Mapping[str, str], patch: Patch, kinds: Sequence[str], *, files: bool
) -> Iterator[dict[str, Any]]:
    """A row for each type."""
    exact_MV, tensors = None, in_file(model, patch)
    for kind in kinds:
        rounded = patch if kind == PLAIN else as_written(patch, tensors, type_called(kind))
        logits_MV = at_target(model, record, rounded)
        exact_MV = logits_MV if exact_MV is None else exact_MV
        found = scores(model, record, rounded)
        row = {"case": record["case_id"], "type": kind, **found}
        row["answered"] = float(found["success"] == 1.0)
        row["logits"] = float((logits_MV - exact_MV).abs().max())
        if files and kind != PLAIN:
            row["file"] = through_file(model, record, patch, kind)
            apart = abs(row["file"]["logits"] - row["logits"])
            if row["file"]["answered"] != row["answered"] or apart > 1e-3:
                raise SystemExit(f"record {record['case_id']}, {kind}: the file differs: {row}")
        yield row


def in_file(model: Any, patch: Patch) -> dict[str, tuple[Tensor, Tensor]]:
    """Each changed parameter as it came and as the patch makes it, in the file's order."""
    cargo = Cargo(model, (patch,), Path("unused"))
    found = {}
    for name, _, stored, layout in laid_out(cargo, the_file(cargo.base.gguf)):
        assert layout == Layout(), f"{name} lies in another order"
        found[name] = stored.float(), cargo.folded(stored, name)
    return found


@cache
def the_file(path: Path) -> GgufFile:
    """Opened once: its metadata takes a second to read."""
    return GgufFile(path)


def as_written(patch: Patch, tensors: Mapping[str, tuple[Tensor, Tensor]], kind: Type) -> Patch:
    """The patch by which the model has the numbers that a file of this type would give it."""
    deltas = []
    for delta in patch.deltas:
        stored, values = tensors[delta.address.parameter]
        rounded = torch.from_numpy(np.array(dequantize(encoded(values, kind), kind)))
        deltas.append(type(delta)(delta.address, Dense(rounded - stored), delta.base))
    return Patch(patch.provenance, tuple(deltas))


def at_target(model: Any, record: Mapping[str, str], patch: Patch) -> Tensor:
    """The logits at the places of the target's tokens."""
    encoded_prompt = model.encode(record["prompt"])
    ids = continuation(model.tokenizer, encoded_prompt, record["target_new"])
    places = [(0, len(encoded_prompt.ids) - 1 + i) for i in range(len(ids))]
    with model.applied(patch):
        return model.view.run([[*encoded_prompt.ids, *ids[:-1]]], logits_at=places).logits_MV


def through_file(
    model: Any, record: Mapping[str, str], patch: Patch, kind: str
) -> dict[str, float]:
    """The same by a real file."""
    with tempfile.TemporaryDirectory() as folder:
        parity = ship(model, [patch], Gguf(kind), Path(folder) / "edited.gguf").parity
    return {"answered": float(parity.after), "logits": parity.edits_difference}


def table(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> None:
    plain = {row["case"]: row for row in rows if row["type"] == PLAIN}
    print("| type | answered | against the patch as it is | rephrase | locality | logits |")
    print("|---|---|---|---|---|---|")
    for kind in kinds:
        mine = sorted((row for row in rows if row["type"] == kind), key=lambda row: row["case"])
        answered = np.array([row["answered"] for row in mine])
        low, high = wilson(int(answered.sum()), len(mine))
        change = answered - np.array([plain[row["case"]]["answered"] for row in mine])
        less, more = interval(change)
        rest = [
            "{:.3f} ({:.3f} to {:.3f})".format(values.mean(), *interval(values))
            for values in (
                np.array([row[name] for row in mine]) for name in ("rephrase", "locality")
            )
        ]
        logits = float(np.median([row["logits"] for row in mine]))
        print(
            f"| {kind} | {int(answered.sum())} of {len(mine)}: {answered.mean():.3f} "
            f"({low:.3f} to {high:.3f}) | {change.mean():+.3f} ({less:+.3f} to {more:+.3f}) | "
            f"{rest[0]} | {rest[1]} | {logits:.2g} |"
        )


if __name__ == "__main__":
    main()
