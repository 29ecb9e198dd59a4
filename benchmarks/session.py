"""Many patches on one copy of a model: rows of one batch against one merge for each patch.

    python benchmarks/session.py [generate score grace_1000] [--json] [--quick]

generate, score: 32 different low-rank patches, each answering one question, in one batch of a
session; the plain side merges each patch, asks, and takes it back. grace_1000: a codebook of 1,000
entries against the unedited model, question by question; its ratio is unedited over ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pairs import Pair, arguments, measure, report

from knowpatch import Patch, __version__, load
from knowpatch.deltas import LowRank, WeightDelta
from knowpatch.models.passes import Scored
from knowpatch.parts.kinds.codebook import codebook
from knowpatch.parts.memory import Memory
from knowpatch.parts.spans import continuation
from knowpatch.patch import Provenance
from knowpatch.probes import controls

Work = Callable[[], None]
COUNT = 32
TOKENS = 16


class Bench:
    """A model, its patches, and the questions."""

    def __init__(self, *, quick: bool) -> None:
        self.model = load()
        self.view = self.model.view
        self.rounds = 1 if quick else 5
        self.tokens = 4 if quick else TOKENS
        self.prompts = [self.view.encode(text).ids for text in controls()[:COUNT]]
        generator = torch.Generator().manual_seed(0)
        self.patches = [self._low_rank(generator, seed) for seed in range(COUNT)]
        for patch in self.patches:
            self.model.hold(patch)
        answer = continuation(self.model.tokenizer, self.view.encode("It is"), "New York City")
        self.pairs = [(prompt, answer) for prompt in self.prompts]

    def _low_rank(self, generator: torch.Generator, seed: int) -> Patch:
        """A rank-one change of a twentieth of the norm: no edit, but of an edit's shape."""
        role = self.view.roles.linear("mlp.out", 5)
        weight = self.view.weight(role)
        left = torch.randn(weight.shape[0], 1, generator=generator)
        right = torch.randn(1, weight.shape[1], generator=generator)
        size = weight.norm() / 20 / (left.norm() * right.norm())
        return self._patch(seed, deltas=(WeightDelta(role.address, LowRank(left * size, right)),))

    def _patch(self, seed: int, **parts: object) -> Patch:
        provenance = Provenance(
            method="benchmark",
            config={},
            seed=seed,
            fingerprint=self.view.fingerprint,
            requests=(),
            version=__version__,
        )
        return Patch(provenance, **parts)  # type: ignore[arg-type]

    def generate(self) -> Pair:
        beside: list[tuple[int, ...]] = []
        merged: list[tuple[int, ...]] = []

        def ours() -> None:
            with self.model.session(self.patches):
                beside[:] = self.view.generate(self.prompts, max_new_tokens=self.tokens)

        def plain() -> None:
            merged.clear()
            for patch, prompt in zip(self.patches, self.prompts, strict=True):
                with self.model.applied(patch):
                    merged.extend(self.view.generate([prompt], max_new_tokens=self.tokens))

        said: dict[str, object] = {"patches": COUNT, "new tokens": self.tokens}
        pair = self._measured("generate", ours, plain, said)
        said["equal rows"] = sum(a == b for a, b in zip(beside, merged, strict=True))
        return pair

    def score(self) -> Pair:
        beside: list[Scored] = []
        merged: list[Scored] = []

        def ours() -> None:
            with self.model.session(self.patches):
                beside[:] = self.view.score(self.pairs)

        def plain() -> None:
            merged.clear()
            for patch, pair in zip(self.patches, self.pairs, strict=True):
                with self.model.applied(patch):
                    merged.extend(self.view.score([pair]))

        said: dict[str, object] = {"patches": COUNT, "answer tokens": len(self.pairs[0][1])}
        pair = self._measured("score", ours, plain, said)
        gaps = [
            abs(a - b)
            for one, other in zip(beside, merged, strict=True)
            for a, b in zip(one.logprobs, other.logprobs, strict=True)
        ]
        said["largest difference in log-probability"] = max(gaps)
        return pair

    def grace_1000(self) -> Pair:
        entries = 1000
        role = self.view.roles.linear("mlp.out", 25)
        out, into = self.view.weight(role).shape
        memory = Memory(
            torch.randn(entries, into),
            torch.randn(entries, out),
            torch.full((entries,), 1e-3),
            tuple((i,) for i in range(entries)),
        )
        patch = self._patch(0, wraps=(codebook(role.module, [memory]),))

        def asked() -> None:
            for pair in self.pairs:
                self.view.score([pair])

        def ours() -> None:
            with self.model.session([patch]):
                asked()

        ours()  # joins the entries, once
        said: dict[str, object] = {"entries": entries, "questions": COUNT}
        pair = self._measured("grace_1000", ours, asked, said)
        said["cost of ours over unedited"] = round(1 / pair.ratio, 3)
        return pair

    def _measured(self, name: str, ours: Work, plain: Work, said: dict[str, object]) -> Pair:
        said["threads"] = torch.get_num_threads()
        ours()
        return measure(
            name,
            ours,
            plain,
            n=self.rounds,
            unit="s per question",
            settings=said,
            per=(COUNT, COUNT),
        )


def main() -> None:
    args = arguments(__doc__ or "")
    names = args.pairs or ["generate", "score", "grace_1000"]
    bench = Bench(quick=args.quick)
    report([getattr(bench, name)() for name in names], as_json=args.json)


if __name__ == "__main__":
    main()
