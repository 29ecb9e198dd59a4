"""Key statistics of several layers: one truncated pass against a pass for each layer.

    python benchmarks/moments.py [statistics] [--json] [--quick]

statistics: the layers that memit writes to, over the same packed rows of ordinary text; 20,000
tokens (--quick: 2,000). The plain side runs the model up to one layer at a time in float32; ours
once up to the last of them, in bfloat16 where the processor multiplies in it. The unit is seconds
per 1,000 tokens and layer, so the ratio is that of tokens per second and layer.
"""

from __future__ import annotations

from typing import Any

import torch
from pairs import Pair, arguments, measure, report
from plain import moments as plain
from torch import Tensor

from knowpatch import load
from knowpatch.editing import choose
from knowpatch.models.load import fast_dtype
from knowpatch.models.passes import Tap
from knowpatch.parts.moments import BATCH_ROWS, collect
from knowpatch.parts.text import ROW_TOKENS, find_text, packed_rows

TOKENS, FEW, ROUNDS = 20_000, 2_000, 3
LIKE = 0.03
"""Largest relative difference, in the Frobenius norm, of statistics from passes in bfloat16."""


def statistics(*, quick: bool) -> Pair:
    view = load().view
    method: Any = choose("memit")
    maps = [method.role(view, layer).module for layer in method.written(view)]
    text = find_text(None)
    count = FEW if quick else TOKENS
    rows = packed_rows(view, text, count, seed=0)
    rows = [row for row in rows if len(row) == max(map(len, rows))]  # the plain side pads nothing
    found: dict[str, list[Tensor]] = {}
    dtype = fast_dtype(view.device)

    def ours() -> None:
        taps = [Tap(name, "input") for name in maps]
        found["ours"] = [part.mean() for part in collect(view, taps, rows, dtype=dtype)]

    def one_by_one() -> None:
        found["plain"] = plain.second_moments(view.model, maps, rows, BATCH_ROWS)

    tokens = sum(map(len, rows))
    pair = measure(
        "statistics",
        ours,
        one_by_one,
        n=1 if quick else ROUNDS,
        unit="s per 1,000 tokens and layer",
        settings={"text": text.name, "tokens": tokens, "maps": maps, "row": ROW_TOKENS},
        per=(tokens * len(maps) / 1000, tokens * len(maps) / 1000),
    )
    gaps = [
        float((a - b.double()).norm() / b.double().norm())
        for a, b in zip(found["ours"], found["plain"], strict=True)
    ]
    assert max(gaps) < LIKE, gaps
    pair.settings.update(
        {
            "dtype of ours": str(dtype or "the model's"),
            "relative difference, at most": f"{max(gaps):.1e}",
            "threads": torch.get_num_threads(),
        }
    )
    return pair


def main() -> None:
    args = arguments(__doc__ or "")
    names = args.pairs or ["statistics"]
    report([globals()[name](quick=args.quick) for name in names], as_json=args.json)


if __name__ == "__main__":
    main()
