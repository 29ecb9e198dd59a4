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
from recipes import SCORES, Rows, compared, requests_of, scores
from torch import Tensor

from knowpatch import EditRequest, Patch, __version__, edit, load
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

    def recipe(self) -> dict[str, Any]:
        """What the rows depend on."""
        config = self.method.config.model_dump(mode="json")
        return {"method": self.method.name, "version": __version__, "config": config}

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
    sides = Sides(args.method)
    rows = Rows(args.rows, sides.recipe())
    done = {row["case"] for row in rows.found}
    for record, request in zip(records, requests_of(records), strict=True):
        if record["case_id"] in done:
            continue
        ours, plain = sides.ours(request), sides.plain(request)
        found = {"ours": scores(sides.model, record, ours)}
        found["plain"] = scores(sides.model, record, plain)
        rows.add({"case": record["case_id"], **found})
        print(f"{len(rows.found)} of {len(records)}", file=sys.stderr, flush=True)
    cases = {record["case_id"] for record in records}
    kept = [row for row in rows.found if row["case"] in cases]
    for name in SCORES:
        ours_N, plain_N = (np.array([row[s][name] for row in kept]) for s in ("ours", "plain"))
        print(compared(name, ours_N, plain_N))


if __name__ == "__main__":
    main()
