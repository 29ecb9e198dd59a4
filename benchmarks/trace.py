"""Tracing: every token and layer of one prompt, ours against a full pass for each restored state.

    python benchmarks/trace.py known_facts_600.json [trace trace_bfloat16 attribution]
                               [--json] [--quick]

The prompt is the first of the file that the model knows and the noise takes away, and that begins
with its subject, so that nothing in front of it is saved (--quick: the shortest, two draws).
trace: exact causal tracing of all tokens and layers in float32, by plain/trace.py and by the
library; the largest difference of any effect is printed. trace_bfloat16: the same, ours in
bfloat16, with the rank correlation of both maps. attribution: the plain side again, against one
forward and one backward pass, with the rank correlation. 10 draws of the noise; windows of one
layer. Axes: T tokens, L layers, S draws.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pairs import Pair, measure, report
from plain import trace as plain
from torch import Tensor

from knowpatch import load
from knowpatch.locate.attribution import attribute
from knowpatch.locate.averages import correlation
from knowpatch.locate.facts import Fact, asked, read_facts
from knowpatch.locate.noise import Noise
from knowpatch.locate.tracing import Tracing

DRAWS, FEW = 10, 2
FACTS = 80
"""Facts that the model is asked about."""


class Bench:
    """The model, a fact that it knows, and what both sides make of it."""

    def __init__(self, file: Path, *, quick: bool) -> None:
        self.model = load(dtype="float32")
        self.noise = Noise.of(self.model.view, draws=FEW if quick else DRAWS)
        self.fact = self._first(read_facts(file), shortest=quick)
        self.found: dict[str, Any] = {}

    def _first(self, facts: list[Fact], *, shortest: bool) -> Fact:
        known = [fact for fact, knows in asked(self.model, facts[:FACTS]) if knows]
        opening = [fact for fact in known if fact.prompt.startswith(fact.subject)]
        if shortest:
            opening.sort(key=lambda fact: len(self.model.encode(fact.prompt).ids))
        for fact in opening:
            if Tracing(self.model.view, fact, self.noise).runs.enough:
                return fact
        raise SystemExit(f"the model knows none of {FACTS} facts that begins with its subject")

    def trace(self) -> Pair:
        view = self.model.view
        Tracing(view, self.fact, self.noise)  # the probe, once for a model

        def ours() -> Tensor:
            return Tracing(view, self.fact, self.noise).trace().effects_TL

        return self._measured("trace", ours)

    def trace_bfloat16(self) -> Pair:
        view = load(dtype="bfloat16").view
        Tracing(view, self.fact, self.noise)

        def ours() -> Tensor:
            return Tracing(view, self.fact, self.noise).trace().effects_TL

        return self._measured("trace_bfloat16", ours)

    def attribution(self) -> Pair:
        view = self.model.view

        def ours() -> Tensor:
            return attribute(view, self.fact, self.noise).effects_TL

        return self._measured("attribution", ours)

    def _measured(self, name: str, ours: Callable[[], Tensor]) -> Pair:
        def mine() -> None:
            self.found["ours"] = ours()

        def theirs() -> None:
            self.found["plain"] = self._plain()

        settings: dict[str, Any] = {
            "prompt": self.fact.prompt,
            "draws": self.noise.draws,
            "threads": torch.get_num_threads(),
        }
        pair = measure(name, mine, theirs, n=1, unit="s", settings=settings)
        one, other = self.found["ours"], self.found["plain"]
        maps = [{"effects": each.tolist()} for each in (one, other)]
        settings |= {
            "tokens, layers": tuple(one.shape),
            "largest effect": round(float(other.max()), 4),
            "largest difference": float(f"{float((one - other).abs().max()):.2g}"),
            "rank correlation": round(correlation(*maps), 4),
        }
        return pair

    def _plain(self) -> Tensor:
        """The effects (T, L) by a full pass for every state."""
        view = self.model.view
        begun = Tracing(view, self.fact, self.noise).runs.corruption
        prompt, roles = begun.prompt, view.roles
        setup = plain.Setup(view.model, roles.embedding, prompt.ids, prompt.first, prompt.noise_SKD)
        base_BV = setup.run({})
        answer = int(base_BV[0].argmax())
        blocks = [block.module for block in roles.blocks]
        scores_TLS = plain.trace(setup, blocks, 1, answer)
        return (scores_TLS - base_BV[1:, answer]).mean(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="facts: known_facts_600.json, or prompt, subject")
    parser.add_argument("pairs", nargs="*", help="names of pairs; all by default")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON value")
    parser.add_argument("--quick", action="store_true", help="two draws, one round")
    args = parser.parse_args()
    bench = Bench(args.file, quick=args.quick)
    names = args.pairs or ["trace", "trace_bfloat16", "attribution"]
    report([getattr(bench, name)() for name in names], as_json=args.json)


if __name__ == "__main__":
    main()
