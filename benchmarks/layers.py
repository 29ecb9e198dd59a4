"""Does what is located say where edits take? Edits at every depth, against locators and a pilot.

    python benchmarks/layers.py DATA/counterfact/counterfact-edit.json [--method rome]
                                [--records 40] [--by attribution] [--facts 8] [--rows ROWS.jsonl]

Each record is edited alone at each of `knowpatch locate suggest`'s places, and scored as its pilot
facts are (locate/pilot.py): success, paraphrase, kept neighbour, size of the change. Hase et al.
(arXiv 2301.04213) found that causal tracing does not predict where edits take: so the located
curve of each record is set against its scores (Spearman over the places, mean over records), and
the mean curve against the mean scores; intervals draw records anew. Then three choices of a place
are compared on these records: where the mean curve peaks, what the pilot suggests (which has not
seen them), and the method's own. Rows are written as they are made; what is there is not made
again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipes import Rows

from knowpatch import EditRequest, __version__, load
from knowpatch.bench.statistics import Records, bootstrap, paired
from knowpatch.editing import choose
from knowpatch.locate import overlap
from knowpatch.locate.facts import Fact
from knowpatch.locate.locators import located, locator
from knowpatch.locate.pilot import Pilot, Place, measured, places, score
from knowpatch.locate.suggest import at_place, suggest

TOGETHER = 5
"""Records that are edited in one batch; each has a patch of its own."""
DRAWS = 2000


def main() -> None:
    args = arguments()
    records = json.loads(args.file.read_text(encoding="utf-8"))[: args.records]
    recipe = {"method": args.method, "records": args.records, "version": __version__}
    rows = Rows(args.rows, recipe)
    model = load()
    tries = places(choose(args.method), len(model.view.roles.blocks))
    edits(model, args.method, tries, records, rows)
    curves(model, args.by, records, rows)
    chosen = suggest(model, args.method, {}, facts=args.facts, progress=progress)
    report(tries, rows.found, args.by, chosen.best.place)
    print(f"pilot: {chosen.verdict}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Where edits take, and what locators say of it.")
    parser.add_argument("file", type=Path, help="CounterFact's file")
    parser.add_argument("--method", default="rome")
    parser.add_argument("--records", type=int, default=40)
    parser.add_argument("--by", default="attribution", help="the locator")
    parser.add_argument("--facts", type=int, default=8, help="pilot facts of the suggestion")
    parser.add_argument("--rows", type=Path, default=Path("results/locate/layers.jsonl"))
    args = parser.parse_args()
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    return args


def progress(what: str, done: int, total: int) -> None:
    print(f"{what} {done} of {total}", file=sys.stderr, flush=True)


def pilot_of(record: Mapping[str, Any]) -> Pilot:
    """A record of CounterFact, to be scored as a pilot fact is."""
    request = EditRequest(
        prompt=record["prompt"],
        subject=record["subject"],
        target=record["target_new"],
        old=record["ground_truth"],
    )
    return Pilot(request, (record["rephrase_prompt"],), (record["locality_prompt"],))


def edits(
    model: Any, name: str, tries: Sequence[Place], records: Sequence[Mapping[str, Any]], rows: Rows
) -> None:
    """Every record at every place."""
    for place in tries:
        blocks = list(place.blocks)
        done = {row["case"] for row in rows.found if row.get("blocks") == blocks}
        left = [record for record in records if record["case_id"] not in done]
        for start in range(0, len(left), TOGETHER):
            progress(f"blocks {blocks}: records", len(records) - len(left) + start, len(records))
            some = left[start : start + TOGETHER]
            found = measured(model, at_place(choose(name), place), [pilot_of(one) for one in some])
            for record, scored in zip(some, found, strict=True):
                rows.add({"case": record["case_id"], "blocks": blocks, "scores": scored})


def curves(model: Any, by: str, records: Sequence[Mapping[str, Any]], rows: Rows) -> None:
    """Every record's prompt, located for the old answer."""
    done = {row["case"] for row in rows.found if row.get("locator") == by}
    for number, record in enumerate(records):
        if record["case_id"] in done:
            continue
        progress(f"locating by {by}: records", number, len(records))
        fact = Fact(record["prompt"], record["subject"])
        (curve,) = located(model.view, locator(by), [fact])
        told = None if curve is None else [float(f"{value:.4g}") for value in curve.tolist()]
        rows.add({"case": record["case_id"], "locator": by, "curve": told})


def report(tries: Sequence[Place], rows: Sequence[Mapping[str, Any]], by: str, best: Place) -> None:
    """Scores by place, correlations, and the three choices."""
    found = {place.blocks: scored(rows, place) for place in tries}
    cases = sorted(set.intersection(*(set(some) for some in found.values())))
    curve = {row["case"]: row["curve"] for row in rows if row.get("locator") == by}
    told = [case for case in cases if curve.get(case)]
    print(f"{len(cases)} records, {len(told)} of them located by {by}\n")
    print("| blocks | success | paraphrase | kept | change / matrix | score | located |")
    print("|---|---|---|---|---|---|---|")
    mean_L = np.mean([curve[case] for case in told], axis=0)
    for place in tries:
        mine = [found[place.blocks][case] for case in cases]
        line = [", ".join(map(str, place.blocks)) + (" (own)" if place is tries[0] else "")]
        line += [mean_of(mine, name) for name in ("success", "paraphrase", "kept", "norm")]
        line += [summary_of(mine), f"{mean_L[list(place.blocks)].mean() / mean_L.max():.2f}"]
        print(f"| {' | '.join(line)} |")
    correlations(tries, found, curve, told)
    choices(tries, found, cases, mean_L, best)


def scored(rows: Sequence[Mapping[str, Any]], place: Place) -> dict[int, Any]:
    """Each record's scores at a place."""
    return {row["case"]: row["scores"] for row in rows if row.get("blocks") == list(place.blocks)}


def mean_of(records: Records, name: str) -> str:
    found = bootstrap([{"value": one[name]} if one else None for one in records])
    return "–" if found is None else f"{100 * found.mean:.0f} %"


def summary_of(records: Records) -> str:
    found = bootstrap(records, score)
    if found is None:
        return "–"
    return f"{found.mean:.2f} ({found.low or 0:.2f} to {found.high or 0:.2f})"


def correlations(
    tries: Sequence[Place],
    found: Mapping[tuple[int, ...], Mapping[int, Any]],
    curve: Mapping[int, Sequence[float]],
    cases: Sequence[int],
) -> None:
    """Spearman's correlation of located and score over the places: fact by fact, and of means."""
    located_RP = np.array(
        [[np.mean([curve[case][b] for b in p.blocks]) for p in tries] for case in cases]
    )
    scores_RP = np.array(
        [[score(found[p.blocks][case] or {}) or 0.0 for p in tries] for case in cases]
    )
    each = [spearman(a, b) for a, b in zip(located_RP.tolist(), scores_RP.tolist(), strict=True)]
    one = bootstrap([None if r is None else {"value": r} for r in each])
    if one is not None and one.low is not None and one.high is not None:
        told = f"{one.mean:+.2f} ({one.low:+.2f} to {one.high:+.2f}), {one.n} records"
        print(f"\nSpearman of located and score over places, mean over records: {told}")
    generator = np.random.default_rng(0)
    picks = generator.integers(len(cases), size=(DRAWS, len(cases)))

    def of_means(pick: Sequence[int]) -> float | None:
        scores = mean_scores(found, tries, [cases[i] for i in pick])
        return spearman(located_RP[pick].mean(0).tolist(), scores)

    whole = of_means(range(len(cases)))
    if whole is None:
        return
    drawn = [of_means(pick) for pick in picks]
    low, high = np.percentile([r for r in drawn if r is not None], [2.5, 97.5])
    print(f"Spearman of mean located and score of means: {whole:+.2f} ({low:+.2f} to {high:+.2f})")


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Rank correlation of two lists; None if one of them is constant."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return None
    a, b = (torch.tensor([list(values)], dtype=torch.float64) for values in (one, other))
    return float(overlap.spearman(a, b))


def mean_scores(
    found: Mapping[tuple[int, ...], Mapping[int, Any]],
    tries: Sequence[Place],
    cases: Sequence[int],
) -> list[float]:
    """The score of the means over some records, by place."""
    scores = []
    for place in tries:
        some = [one for case in cases if (one := found[place.blocks][case])]
        names = some[0] if some else ()
        scores.append(score({name: float(np.mean([o[name] for o in some])) for name in names}))
    return [0.0 if one is None else one for one in scores]


def choices(
    tries: Sequence[Place],
    found: Mapping[tuple[int, ...], Mapping[int, Any]],
    cases: Sequence[int],
    mean_L: np.ndarray,
    suggested: Place,
) -> None:
    """Each way to choose a place, on these records, and less the method's own."""
    by_peak = min(tries, key=lambda p: abs(p.blocks[-1] - int(mean_L.argmax())))
    means = mean_scores(found, tries, cases)
    hindsight = tries[int(np.argmax(means))]
    print()
    own = [found[tries[0].blocks][case] for case in cases]
    for words, place in (
        ("the method's own", tries[0]),
        ("nearest to the located peak", by_peak),
        ("the pilot's suggestion", suggested),
        ("the best in hindsight", hindsight),
    ):
        mine = [found[place.blocks][case] for case in cases]
        less = paired(mine, own, score)
        gap = ""
        if less is not None and place is not tries[0] and less.difference.low is not None:
            one = less.difference
            gap = f", less own {one.mean:+.2f} ({one.low:+.2f} to {one.high or 0:+.2f})"
        print(f"{words}: blocks {list(place.blocks)}, score {summary_of(mine)}{gap}")


if __name__ == "__main__":
    main()
