"""Scoring edited models: one plan of questions against each metric its own calls.

    python benchmarks/ask.py [score] [--json] [--quick]

score: the first 40 records of KnowEdit's wiki_counterfact (KNOWPATCH_DATA), each with a rank-one
edit of its own, scored by the groups `accuracy` and `locality` before and after. Ours asks all
metrics of several records together, each question once, patches beside the model, nothing kept from
earlier runs; the plain side (plain/score.py) merges each patch and asks metric by metric, question
by question. Both have the same questions: at most one of each kind and record, with all aliases.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pairs import Pair, arguments, measure, report
from plain.score import PlainScorer, divergence, macro, same

from knowpatch import Patch, __version__, load
from knowpatch.bench.memory import MOST
from knowpatch.bench.scoring import Asked, Scorer
from knowpatch.data.case import LOCALITY, PORTABILITY, REPHRASE, REWRITE, Case
from knowpatch.data.source import load as load_cases
from knowpatch.deltas import LowRank, WeightDelta
from knowpatch.metrics.asker import Asker
from knowpatch.metrics.catalogue import chosen
from knowpatch.metrics.metric import macro as macro_of
from knowpatch.patch import Provenance

COUNT, ROUNDS, PROBES = 40, 4, 1
KINDS = {"success": REWRITE, "rephrase": REPHRASE, "portability": PORTABILITY}
COMPARE: dict[str, Callable[[Any, Any], float | None]] = {
    "locality_tf": same,
    "locality_kl": divergence,
    "locality_right_tf": lambda old, new: new if old else None,
}
Scores = dict[str, float]
Groups = list[list[Any]]
Work = Sequence[tuple[Case, Patch]]


class Bench:
    """A model, cases, and a patch for each."""

    def __init__(self, *, quick: bool) -> None:
        self.count, self.rounds = (1, 1) if quick else (COUNT, ROUNDS)
        self.model = load()
        loaded = load_cases("wiki_counterfact:test", limit=self.count)
        cases = [case.sampled(PROBES) for case in loaded.cases]
        self.work = [(case, self._patch(number)) for number, case in enumerate(cases)]
        self.metrics = chosen(["accuracy", "locality"])
        self.plain = PlainScorer(self.model.tokenizer)

    def _patch(self, number: int) -> Patch:
        """A rank-one change of a tenth of a matrix's norm: of an edit's shape, for one case."""
        view = self.model.view
        role = view.roles.linear("mlp.out", 10)
        weight = view.weight(role)
        generator = torch.Generator().manual_seed(number)
        left = torch.randn(weight.shape[0], 1, generator=generator)
        right = torch.randn(1, weight.shape[1], generator=generator)
        size = weight.norm() / 10 / (left.norm() * right.norm())
        provenance = Provenance(
            method="benchmark",
            config={},
            seed=number,
            fingerprint=view.fingerprint,
            requests=(),
            version=__version__,
        )
        return Patch(provenance, (WeightDelta(role.address, LowRank(left * size, right)),))

    def ours(self, work: Work) -> list[Scores]:
        with tempfile.TemporaryDirectory() as folder:  # no answer is there from before
            os.environ["KNOWPATCH_CACHE"] = folder
            scorer = Scorer(self.model, self.metrics, chat=False)
            found: list[Scores] = []
            for start in range(0, len(work), MOST):
                some = work[start : start + MOST]
                before = scorer.before([case for case, _ in some])
                asked = [
                    Asked(case, asker, (patch,))
                    for (case, patch), asker in zip(some, before, strict=True)
                    if isinstance(asker, Asker)
                ]
                found += [self._flat(outcome) for outcome in scorer.after(asked)]
        return found

    def _flat(self, outcome: object) -> Scores:
        assert isinstance(outcome, dict), outcome
        flat: Scores = {}
        for name, score in outcome.items():
            sides = {"after": score.after, "before": score.before}
            flat |= {f"{name} {side}": macro_of(values) for side, values in sides.items() if values}
        return {name: value for name, value in flat.items() if value is not None}

    def plainly(self, work: Work) -> list[Scores]:
        """Metric by metric: the unedited model first, then the edited one."""
        found = []
        for case, patch in work:
            scores: dict[str, float | None] = {}
            for metric in self.metrics:
                name = metric.name
                old = self._asked(name, case)
                with self.model.applied(patch):
                    new = self._asked(name, case)
                if name in COMPARE:
                    scores[f"{name} after"] = macro(each(COMPARE[name], old, new))
                else:
                    scores |= {f"{name} before": macro(old), f"{name} after": macro(new)}
            found.append({name: value for name, value in scores.items() if value is not None})
        return found

    def _asked(self, name: str, case: Case) -> list[list[Any]]:
        """What one metric asks of the model as it is, by sub-kind and question."""
        kind = KINDS.get(name.partition("_")[0], LOCALITY)
        return [
            [self._one(name, probe.prompt, probe.aliases) for probe in probes]
            for probes in case.by_sub_kind(kind).values()
        ]

    def _one(self, name: str, prompt: str, answers: Sequence[str]) -> Any:
        if name in ("locality_tf", "locality_kl"):
            return self.plain.forced(self._model, prompt, answers[0])[1]
        exact = name in ("locality_right_tf",) or name.endswith("_exact")
        first = 1 if name.endswith("_published") else None
        return self.plain.accuracy(self._model, prompt, answers[:first], exact=exact)

    def _model(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.model(input_ids=ids).logits
        return logits

    def score(self) -> Pair:
        ours: list[Scores] = []
        plain: list[Scores] = []
        size = self.count // self.rounds
        # Each round takes other records, so that the spread is that of records, too.
        rounds = [self.work[start : start + size] for start in range(0, self.count, size)]
        said: dict[str, object] = {
            "records": self.count,
            "most questions of a kind": PROBES,
            "metrics": len(self.metrics),
            "threads": torch.get_num_threads(),
        }
        pair = measure(
            "score",
            lambda: ours.extend(self.ours(rounds[len(ours) // size])),
            lambda: plain.extend(self.plainly(rounds[len(plain) // size])),
            n=self.rounds,
            unit="s per record",
            settings=said,
            per=(size, size),
        )
        said |= differences(ours, plain)
        return pair


def each(of: Callable[[Any, Any], float | None], old: Groups, new: Groups) -> Groups:
    """`of` each question's two answers."""
    pairs = zip(old, new, strict=True)
    return [[of(a, b) for a, b in zip(one, other, strict=True)] for one, other in pairs]


def differences(ours: Sequence[Scores], plain: Sequence[Scores]) -> dict[str, float]:
    """The largest difference of any record, of shares and (a lower bound by design) of KL."""
    gaps: dict[str, float] = {"largest difference": 0.0, "largest difference of KL": 0.0}
    for one, other in zip(ours, plain, strict=True):
        assert one.keys() == other.keys(), one.keys() ^ other.keys()
        for name in one:
            kind = "largest difference" + (" of KL" if "_kl" in name else "")
            gaps[kind] = max(gaps[kind], abs(one[name] - other[name]))
    return gaps


def main() -> None:
    args = arguments(__doc__ or "")
    bench = Bench(quick=args.quick)
    report([getattr(bench, name)() for name in args.pairs or ["score"]], as_json=args.json)


if __name__ == "__main__":
    main()
