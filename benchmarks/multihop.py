"""Multi-hop questions end to end, and with perfect sub-answers.

    python benchmarks/multihop.py DATA/mquake/MQuAKE-hard.json [--cases 60] [--all]
                                  [--perfect] [--only NAME ...] [--rows ROWS.jsonl]

The procedures of the external family on the first cases, each with its own edits in memory, or,
with --all, those of all these cases at once. With --perfect the language model is an oracle: it
writes the gold line of a decomposition (with the entity that the procedure has come to), or the
data's relation names, and knows no edited fact itself; retrieval, gate, parsing and walk stay.
What is missing from 1 there is the method's, the rest the model's. any: a case by any of its three
phrasings (Wilson 95 % interval); each: per question, hop-wise: with every answer on the way
(bootstrap over cases). Rows are written as they are made; what is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from recipes import Rows, interval

from knowpatch import Patch, __version__, edit, load
from knowpatch.ask import Ask
from knowpatch.data.case import MULTIHOP, Case
from knowpatch.data.sets.mquake import Mquake
from knowpatch.editing import choose
from knowpatch.future import Future
from knowpatch.metrics.catalogue import catalogue
from knowpatch.parts.procedures import Asking, InForce, Say
from knowpatch.stepping import Generated

SETUPS: dict[str, tuple[str, dict[str, Any]]] = {
    "mello": ("mello", {}),
    "mello, verdict=model": ("mello", {"verdict": "model"}),
    "pokemqa": ("pokemqa", {}),
    "graph_walk": ("graph_walk", {}),
    "graph_walk, parse=model": ("graph_walk", {"parse": "model"}),
}
SCORES = ("multihop_gen_any", "multihop_gen", "hopwise_gen")
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Oracle:
    """Writes what a perfect model would, for one case; of its edited facts it knows none.

    Attributes:
        hops: question and subject of each hop; relations: their names in the data.
        facts: gold answers.
    """

    hops: tuple[tuple[str, str], ...]
    relations: tuple[str, ...]
    facts: tuple[str, ...]

    @classmethod
    def of(cls, record: dict[str, Any]) -> Oracle:
        triples = record["orig"]["new_triples_labeled"]
        pairs = zip(record["new_single_hops"], triples, strict=True)
        hops = [(hop["question"], triple[0]) for hop, triple in pairs]
        return cls(tuple(hops), tuple(t[1] for t in triples), tuple(t[2] for t in triples))

    def say(self, say: Say) -> str:
        """The continuation of a prompt, cut as the model's is."""
        asked = say.prompt.rpartition("Question: ")[2]
        if asked.rstrip().endswith("Relations:"):
            return say.cut(" " + " > ".join(self.relations))
        if "Subquestion:" in say.prompt and not asked.rstrip().endswith("Generated answer:"):
            return say.cut(self.line(asked))
        return say.cut(f" {UNKNOWN}\n")

    def line(self, asked: str) -> str:
        """The next line of a decomposition."""
        done, verdict = asked.count("Subquestion:"), ""
        came_to = re.findall(r"ntermediate answer(?: is)?: (.*)", asked)
        if asked.rstrip().rpartition("\n")[2].startswith("Retrieved fact:"):
            told = asked.rstrip().rpartition("\n")[2]
            hit = told.endswith(f" {self.facts[done - 1]}.")
            verb = "contradicts" if hit else "does not contradict"
            came_to.append(self.facts[done - 1] if hit else UNKNOWN)
            verdict = f"Retrieved fact {verb} the generated answer, so the intermediate answer is: "
            verdict += f"{came_to[-1]}\n"
        if done == len(self.hops):
            return f"{verdict}Final answer: {came_to[-1]}"
        question, subject = self.hops[done]
        question = question.replace(subject, came_to[-1]) if came_to else question
        return f"{verdict}Subquestion: {question}\nGenerated answer: {UNKNOWN}\n"


class Told:
    """An asker whose answers are there."""

    def __init__(self, said: dict[str, Generated]) -> None:
        self.said = said

    def say(self, prompt: str, tokens: int = 32) -> Future[Generated]:
        future: Future[Generated] = Future(lambda: None)
        future.set(self.said.get(prompt, Generated((), "")))  # single hops are not scored
        return future


def main() -> None:
    args = _arguments()
    records = json.loads(args.file.read_text(encoding="utf-8"))[: args.cases]
    cases = list(Mquake().cases(records))
    recipe = {"cases": args.cases, "version": __version__}
    rows = Rows(args.rows, recipe)
    speaker, memory = "oracle" if args.perfect else "model", "all" if args.all else "own"
    model: Any = None
    for setup in args.only or SETUPS:
        mine = {"setup": setup, "speaker": speaker, "memory": memory}
        if any(row.items() >= mine.items() for row in rows.found):
            continue
        model = model or load()
        print(f"{setup}, {speaker}, {memory} edits", file=sys.stderr, flush=True)
        patches = list(_patches(model, setup, cases, together=args.all))
        said = _perfect(model, cases, records, patches) if args.perfect else None
        said = said or _asked(model, cases, patches)
        for case, answers in zip(cases, said, strict=True):
            rows.add({**mine, "case": case.id, **_scored(case, answers)})
    table(rows.found)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Multi-hop questions end to end.")
    parser.add_argument("file", type=Path, help="MQuAKE-hard.json")
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--all", action="store_true", help="all cases' edits in memory at once")
    parser.add_argument("--perfect", action="store_true", help="an oracle speaks for the model")
    parser.add_argument("--only", nargs="+", choices=SETUPS, metavar="NAME")
    parser.add_argument("--rows", type=Path, default=Path("results/external/multihop.jsonl"))
    args = parser.parse_args()
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    return args


def _patches(model: Any, setup: str, cases: Sequence[Case], *, together: bool) -> Iterator[Patch]:
    """One patch for each case; with `together` the same for all, of all their requests."""
    name, options = SETUPS[setup]
    if together:
        requests = [request for case in cases for request in case.requests]
        yield from [edit(model, requests, method=choose(name, options))] * len(cases)
        return
    for case in cases:
        yield edit(model, list(case.requests), method=choose(name, options))


def _asked(model: Any, cases: Sequence[Case], patches: Sequence[Patch]) -> list[list[Generated]]:
    """All questions by the model, side by side."""
    ask = Ask(model, progress=_progress)
    futures = [
        [ask.generate(p.prompt, max_new_tokens=32, patches=[patch]) for p in case.of(MULTIHOP)]
        for case, patch in zip(cases, patches, strict=True)
    ]
    return [[future.result() for future in mine] for mine in futures]


def _progress(what: str, done: int, total: int) -> None:
    if done % 16 == 0 or done == total:
        print(f"\r{what} {done} of {total}   ", end="", file=sys.stderr, flush=True)


def _perfect(
    model: Any, cases: Sequence[Case], records: Sequence[Any], patches: Sequence[Patch]
) -> list[list[Generated]]:
    """All questions by oracles."""
    said = []
    for case, record, patch in zip(cases, records, patches, strict=True):
        oracle, mine = Oracle.of(record), []
        in_force = InForce.of([patch])
        assert in_force is not None
        for probe in case.of(MULTIHOP):
            asking = Asking.begin(in_force.kind, probe.prompt, model.view)
            while asking.say is not None:
                asking.hear(oracle.say(asking.say))
            assert asking.answered is not None
            mine.append(Generated.of(asking.answered, model.view))
        said.append(mine)
    return said


def _scored(case: Case, answers: Sequence[Generated]) -> dict[str, Any]:
    said = {p.prompt: a for p, a in zip(case.of(MULTIHOP), answers, strict=True)}
    told: Any = Told(said)
    found: dict[str, Any] = {}
    for name in SCORES:
        result = catalogue()[name].ask(case, told, told)
        assert result is not None
        found[name] = [v for values in result().after.values() for v in values]
    return {
        **found,
        "answers": [answer.text for answer in answers],
        "chains": [list(answer.chain) for answer in answers],
        "failed": [any(step.kind == "failed" for step in answer.steps) for answer in answers],
    }


def wilson(right: int, of: int) -> tuple[float, float]:
    """Wilson 95 % interval of a share."""
    z2, share = 1.96**2, right / of
    middle = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = 1.96 / (1 + z2 / of) * (share * (1 - share) / of + z2 / (4 * of * of)) ** 0.5
    return middle - half, middle + half


def table(rows: Sequence[dict[str, Any]]) -> None:
    """As Markdown."""
    print("| | speaks | edits | any phrasing | each question | hop-wise | no answer |")
    print("|---|---|---|---|---|---|---|")
    kinds = dict.fromkeys((row["setup"], row["speaker"], row["memory"]) for row in rows)
    for kind in kinds:
        mine = [row for row in rows if (row["setup"], row["speaker"], row["memory"]) == kind]
        right = [row["multihop_gen_any"][0] for row in mine]
        parts = [_told(float(np.mean(right)), wilson(int(sum(right)), len(right)))]
        for name in SCORES[1:]:
            means = np.array([np.mean(row[name]) for row in mine])
            parts.append(_told(float(means.mean()), interval(means)))
        none = sum(sum(row["failed"]) for row in mine)
        total = sum(len(row["failed"]) for row in mine)
        print(f"| {' | '.join((*kind, *parts))} | {none} of {total} |")


def _told(mean: float, between: tuple[float, float]) -> str:
    return f"{mean:.3f} ({between[0]:.3f} to {between[1]:.3f})"


if __name__ == "__main__":
    main()
