"""Does a faster recipe lose anything? Two recipes on the same records, compared record by record.

    python benchmarks/recipes.py DATA/counterfact/counterfact-edit.json [--records 40]

Each record is edited alone. success: share of the target's tokens that are the most likely when
forced; rephrase: the same behind the record's rephrase; locality: share of the tokens of the
locality answer at which the most likely token is the one it was before. Differences carry a paired
bootstrap 95 % interval.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from knowpatch import EditRequest, Patch, load
from knowpatch.editing import choose, edit_each
from knowpatch.parts.spans import continuation

PUBLISHED = {
    "contexts": 20,
    "precision": "model",
    "steps": 25,
    "learning_rate": 0.5,
    "clamp": 4.0,
}
SCORES = ("success", "rephrase", "locality")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare a method's default with another recipe.")
    parser.add_argument("file", type=Path, help="counterfact-edit.json")
    parser.add_argument("--records", type=int, default=40)
    parser.add_argument("--method", default="rome")
    parser.add_argument("--options", type=json.loads, default={}, help="of the recipe, as JSON")
    parser.add_argument("--against", type=json.loads, default=PUBLISHED, help="the other recipe's")
    parser.add_argument("--rows", type=Path, help="write each record's scores there (jsonl)")
    args = parser.parse_args()
    records = json.loads(args.file.read_text(encoding="utf-8"))[: args.records]
    model = load()
    found = {}
    for name, options in (("recipe", args.options), ("against", args.against)):
        start = perf_counter()
        found[name] = list(score(model, records, args.method, options))
        print(f"{name}: {json.dumps(options)}, {perf_counter() - start:.0f} s")
    if args.rows:
        lines = (
            {"case": record["case_id"], "recipe": ours, "against": theirs}
            for record, ours, theirs in zip(records, *found.values(), strict=True)
        )
        args.rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for score_name in SCORES:
        ours, theirs = (np.array([row[score_name] for row in rows]) for rows in found.values())
        print(compared(score_name, ours, theirs))


def score(
    model: Any, records: list[dict[str, str]], method: str, options: Mapping[str, Any]
) -> Iterator[dict[str, float]]:
    """The three scores of each record, edited alone."""
    patches = edit_each(model, requests_of(records), method=choose(method, options))
    for record, patch in zip(records, patches, strict=True):
        yield scores(model, record, patch)


def requests_of(records: Sequence[Mapping[str, str]]) -> list[EditRequest]:
    """CounterFact's records as requests."""
    return [
        EditRequest(prompt=r["prompt"], subject=r["subject"], target=r["target_new"])
        for r in records
    ]


class Rows:
    """Rows of a file (jsonl), of one recipe; what is there is not made again.

    Raises:
        SystemExit: the file holds rows of another recipe.
    """

    def __init__(self, path: Path, recipe: Mapping[str, Any]) -> None:
        self.path, self.recipe = path, json.loads(json.dumps(recipe))
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self.found = [json.loads(line) for line in text.splitlines()]
        if any(row["recipe"] != self.recipe for row in self.found):
            raise SystemExit(f"{path} holds rows of another recipe: name another file")

    def add(self, row: Mapping[str, Any]) -> None:
        self.found.append({**row, "recipe": self.recipe})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.found[-1]) + "\n")


def scores(model: Any, record: Mapping[str, str], patch: Patch) -> dict[str, float]:
    """What a patch for a record does to it."""
    kept = leading(model, record["locality_prompt"], record["locality_ground_truth"])
    with model.applied(patch):
        now = leading(model, record["locality_prompt"], record["locality_ground_truth"])
        return {
            "success": accuracy(model, record["prompt"], record["target_new"]),
            "rephrase": accuracy(model, record["rephrase_prompt"], record["target_new"]),
            "locality": float(np.mean([a == b for a, b in zip(kept, now, strict=True)])),
        }


def accuracy(model: Any, prompt: str, answer: str) -> float:
    encoded = model.encode(prompt)
    ids = continuation(model.tokenizer, encoded, answer)
    return float(model.view.score([(encoded.ids, ids)])[0].accuracy)


def leading(model: Any, prompt: str, answer: str) -> list[int]:
    """The most likely token at each place where a token of `answer` is predicted."""
    encoded = model.encode(prompt)
    ids = continuation(model.tokenizer, encoded, answer)
    places = [(0, len(encoded.ids) - 1 + i) for i in range(len(ids))]
    row = [*encoded.ids, *ids[:-1]]
    run = model.view.run([row], logits_at=places, prompts=[len(encoded.ids)])
    return run.logits_MV.argmax(-1).tolist()


def interval(values: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """Bootstrap 95 % interval (percentiles) of a mean; of paired differences, their mean's."""
    generator = np.random.default_rng(0)
    picks = generator.integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)


def compared(name: str, ours: np.ndarray, theirs: np.ndarray) -> str:
    """Both means and their paired difference, with its interval."""
    low, high = interval(ours - theirs)
    return (
        f"{name}: {ours.mean():.3f} against {theirs.mean():.3f}, "
        f"difference {np.mean(ours - theirs):+.3f} [{low:+.3f}, {high:+.3f}], n = {len(ours)}"
    )


if __name__ == "__main__":
    main()
