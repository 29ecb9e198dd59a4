"""Does ours lose anything against a plain published program? Record by record, edited alone.

    python benchmarks/against.py DATA/counterfact/counterfact-edit.json memit --rows ROWS.jsonl
                                 [--records 40]

rome, memit: the library's defaults against plain/rome.py and plain/memit.py, which run whole
passes over one request at a time, with the published hyper-parameters. Both write the same layers
and are given the same key statistics. Lambda of the plain MEMIT is the published 15,000 per 14,336
inputs, for as many inputs as the map has. Rows are written as they are made; what is there already
is not made again. Scores and intervals as in recipes.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain import bridge, memit, rome
from recipes import SCORES, paired_interval, scores
from torch import Tensor

from knowpatch import EditRequest, Patch, edit, load
from knowpatch.editing import choose
from knowpatch.parts.prefixes import context_prefixes
from knowpatch.parts.solve import ridged

PREFIXES = {"rome": ((10, 5), (10, 10)), "memit": ((5, 10),)}
"""As published: how many texts of how many tokens."""
WEIGHT, INPUTS = 15_000, 14_336


class Sides:
    """Both sides of one method."""

    def __init__(self, name: str) -> None:
        self.method: Any = choose(name)
        self.model = load()
        self.contexts = context_prefixes(self.model.view, PREFIXES[name], seed=0)
        self.plain: Callable[[EditRequest], Patch] = getattr(self, f"_{name}")
        view, layers = self.model.view, self.method.layers_of(self.model.view)
        found = self.method.statistics(view, layers)
        self.seconds = [ridged(found[layer], self.method.config.ridge) for layer in layers]
        self.maps = [self.method.role(view, layer).module for layer in layers]
        self.block = view.roles.blocks[layers[-1]].module

    def ours(self, request: EditRequest) -> Patch:
        return edit(self.model, request, method=self.method)

    def _rome(self, request: EditRequest) -> Patch:
        (fact,) = bridge.facts(self.method, self.model.view, [request], self.contexts)
        model, settings = self.model.model, rome.Settings()
        left_D, right_I = rome.edit(model, self.maps[0], fact, self.seconds[0], settings)
        return self._patch([torch.outer(left_D, right_I)])

    def _memit(self, request: EditRequest) -> Patch:
        facts = bridge.facts(self.method, self.model.view, [request], self.contexts)
        settings = memit.Settings(WEIGHT * len(self.seconds[0]) / INPUTS)
        model = self.model.model
        return self._patch(memit.edit(model, self.block, self.maps, facts, self.seconds, settings))

    def _patch(self, changes: list[Tensor]) -> Patch:
        return bridge.patch(self.method, self.model.view, changes)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare a method with a plain published program.")
    parser.add_argument("file", type=Path, help="counterfact-edit.json")
    parser.add_argument("method", choices=sorted(PREFIXES))
    parser.add_argument("--records", type=int, default=40)
    parser.add_argument("--rows", type=Path, required=True, help="each record's scores (jsonl)")
    args = parser.parse_args()
    records = json.loads(args.file.read_text(encoding="utf-8"))[: args.records]
    rows = [json.loads(line) for line in lines(args.rows)]
    sides, done = Sides(args.method), {row["case"] for row in rows}
    for record in records:
        if record["case_id"] in done:
            continue
        request = EditRequest(
            prompt=record["prompt"], subject=record["subject"], target=record["target_new"]
        )
        row = {
            "case": record["case_id"],
            "ours": scores(sides.model, record, sides.ours(request)),
            "plain": scores(sides.model, record, sides.plain(request)),
        }
        rows.append(row)
        with args.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{len(rows)} of {len(records)}", file=sys.stderr, flush=True)
    for name in SCORES:
        ours, plain = (np.array([row[side][name] for row in rows]) for side in ("ours", "plain"))
        low, high = paired_interval(ours - plain)
        print(
            f"{name}: {ours.mean():.3f} against {plain.mean():.3f}, "
            f"difference {np.mean(ours - plain):+.3f} [{low:+.3f}, {high:+.3f}], n = {len(rows)}"
        )


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
