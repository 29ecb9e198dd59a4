"""Which text key statistics need, and how much of it.

    python benchmarks/texts.py DATA/counterfact/counterfact-edit.json --rows ROWS.jsonl
                               [--records 40] [--tokens 1000 5000 20000 50000 200000]

One batch of facts is written by memit with statistics from each text (by default the Wikipedia
summaries, and self, text that the model has written) and each number of tokens. change: cosine of
the change with that from the most tokens of the first text, all maps together. success, rephrase,
locality: as in recipes.py, with a bootstrap 95 % interval; perplexity: of an ordinary text, over
the base's. The values are optimised once: no text enters into them. Rows are written as they are
made; what is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipes import SCORES, Rows, interval, requests_of, scores
from torch import Tensor

from knowpatch import Patch, __version__, edit, load
from knowpatch.deltas import LowRank
from knowpatch.editing import choose
from knowpatch.metrics.kinds.perplexity import ordinary
from knowpatch.parts.spans import continuation

TOKENS = (1_000, 5_000, 20_000, 50_000, 200_000)
TEXTS = ("default", "self")


@dataclass
class Texts:
    """One batch of facts, and what it does with statistics from each text."""

    records: list[dict[str, str]]
    model: Any = field(default_factory=load)
    values: list[Any] | None = None

    def __post_init__(self) -> None:
        self.base = self.perplexity()

    def row(self, text: str, tokens: int) -> tuple[dict[str, Any], Patch]:
        """Scores, and the patch itself."""
        patch = self.patch(text, tokens)
        found = [scores(self.model, record, patch) for record in self.records]
        with self.model.applied(patch):
            perplexity = self.perplexity() / self.base
        means = {name: [row[name] for row in found] for name in SCORES}
        return {
            "text": text,
            "tokens": tokens,
            "perplexity": round(perplexity, 4),
            **means,
        }, patch

    def method(self, text: str, tokens: int) -> Any:
        return choose("memit", {"tokens": tokens, "text": None if text == "default" else text})

    def patch(self, text: str, tokens: int) -> Patch:
        method = self.method(text, tokens)
        optimise = method.values

        def values(*given: Any) -> list[Any]:
            self.values = self.values or optimise(*given)
            return self.values

        method.values = values
        return edit(self.model, requests_of(self.records), method=method)

    def perplexity(self) -> float:
        """Of the shipped ordinary text."""
        pairs = []
        for given, following in ordinary():
            encoded = self.model.encode(given)
            ids = continuation(self.model.tokenizer, encoded, following)
            pairs.append((encoded.ids, ids))
        logprobs = [x for scored in self.model.view.score(pairs) for x in scored.logprobs]
        return math.exp(-sum(logprobs) / len(logprobs))


def main() -> None:
    parser = argparse.ArgumentParser(description="Which text key statistics need, and how much.")
    parser.add_argument("file", type=Path, help="counterfact-edit.json")
    parser.add_argument("--records", type=int, default=40)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--rows", type=Path, required=True, help="what was measured (jsonl)")
    args = parser.parse_args()
    records = json.loads(args.file.read_text(encoding="utf-8"))[: args.records]
    config = choose("memit").config.model_dump(mode="json", exclude={"text", "tokens"})
    most = max(args.tokens)
    recipe = {"records": args.records, "most": most, "version": __version__, "config": config}
    rows = Rows(args.rows, recipe)
    done = {(row["text"], row["tokens"]) for row in rows.found}
    wanted = [(text, tokens) for text in TEXTS for tokens in sorted(args.tokens, reverse=True)]
    missing = [each for each in wanted if each not in done]
    if missing:
        texts = Texts(records)
        whole = None if missing[0] == wanted[0] else changes(texts.patch(*wanted[0]))
        for text, tokens in missing:
            print(f"{text}, {tokens} tokens", file=sys.stderr, flush=True)
            row, patch = texts.row(text, tokens)
            whole = changes(patch) if whole is None else whole
            rows.add({**row, "change": round(cosine(changes(patch), whole), 4)})
    table([row for row in rows.found if (row["text"], row["tokens"]) in wanted])


def changes(patch: Patch) -> list[Tensor]:
    """The change of each map, whole."""
    return [
        delta.change.left.double() @ delta.change.right.double()
        for delta in patch.deltas
        if isinstance(delta.change, LowRank)
    ]


def cosine(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    flat, whole = (torch.cat([change.flatten() for change in side]) for side in (one, other))
    return float(flat @ whole / (flat.norm() * whole.norm()))


def table(rows: Sequence[dict[str, Any]]) -> None:
    """As Markdown."""
    print("| text | tokens | change | success | rephrase | locality | perplexity |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        means = " | ".join(with_interval(np.array(row[name])) for name in SCORES)
        print(
            f"| {row['text']} | {row['tokens']:,} | {row['change']:.3f} "
            f"| {means} | {row['perplexity']:.3f} |"
        )


def with_interval(values: np.ndarray) -> str:
    low, high = interval(values)
    return f"{values.mean():.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
