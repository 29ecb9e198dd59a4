"""Optimising ROME's value by replay, against the full pass it replaces.

    python benchmarks/replay.py [one eight default_one default_eight] [--json] [--quick]

one, eight: the same contexts and the same steps, for one request and for eight at once; cosine is
that of the two results. default_one, default_eight: an edit by the library's default recipe against
the published one (benchmarks/plain/rome.py), key statistics given to both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pairs import Pair, arguments, measure, report
from plain import rome as plain

from knowpatch import EditRequest, load
from knowpatch.editing import choose
from knowpatch.models.load import fast_dtype
from knowpatch.parts.solve import ridged
from knowpatch.parts.tasks import ValueTask
from knowpatch.parts.values import Value, ValueSettings, optimise

FACTS = (
    ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "English"),
    ("The official religion of Edwin of Northumbria is", "Edwin of Northumbria", "Islam"),
    ("Toko Yasuda plays the instrument", "Toko Yasuda", "piano"),
    ("The capital of Australia is", "Australia", "Canberra"),
    ("The Eiffel Tower is located in the city of", "Eiffel Tower", "Rome"),
    ("Michael Jordan plays the sport of", "Michael Jordan", "baseball"),
    ("The author of Pride and Prejudice is", "Pride and Prejudice", "Charles Dickens"),
    ("The headquarters of Toyota are in", "Toyota", "Berlin"),
)
PUBLISHED = {"contexts": 20}
STEPS = 25


class Bench:
    """The model, what both sides are given, and the pairs."""

    def __init__(self, *, quick: bool) -> None:
        self.view = load().view
        self.quick = quick
        self.requests = [EditRequest(prompt=p, subject=s, target=t) for p, s, t in FACTS]
        self.rome: Any = choose("rome")
        self.prepared = self.rome.prepare(self.view)
        (layer,) = self.rome.layers(len(self.view.roles.blocks))
        self.role = self.rome.role(self.view, layer)
        published: Any = choose("rome", PUBLISHED)
        contexts = published.prepare(self.view).contexts
        self.tasks = [published.task(self.view, r, contexts) for r in self.requests]
        second_II = self.rome.statistics(self.view, [layer])[layer]
        self.second_II = ridged(second_II, self.rome.config.ridge)
        # Quick: fewer steps on both sides, and in whole edits the plain side's time is scaled up.
        self.steps = 3 if quick else STEPS

    def one(self) -> Pair:
        return self._values("one", self.tasks[:1], None, n=2)

    def eight(self) -> Pair:
        return self._values("eight", self.tasks, fast_dtype(self.view.device), n=1)

    def _values(
        self, name: str, tasks: Sequence[ValueTask], dtype: torch.dtype | None, *, n: int
    ) -> Pair:
        found: dict[str, list[torch.Tensor]] = {}
        # No early stop: the same number of steps on both sides.
        settings = ValueSettings(self.steps, 0.5, 4.0, 1e-3, 0.0625, -1.0, dtype=dtype)

        def ours() -> None:
            values: list[Value] = optimise(self.view, [self.role.module], tasks, settings)
            found["ours"] = [value.delta_D for value in values]

        # Quick: the plain side runs one of the eight; seconds are per request.
        some = tasks[:1] if self.quick else tasks

        def slow() -> None:
            published = plain.Settings(steps=self.steps, enough=-1.0)
            found["plain"] = [
                plain.value(self.view.model, self.role.module, fact(task), published)[1]
                for task in some
            ]

        settings_said = {
            "contexts": len(tasks[0].contexts),
            "steps": self.steps,
            "requests at once": len(tasks),
            "dtype": str(dtype or torch.float32),
            "threads": torch.get_num_threads(),
        }
        ours()  # the probe, and everything that is set up once
        pair = measure(
            name,
            ours,
            slow,
            n=1 if self.quick else n,
            unit="s per request",
            settings=settings_said,
            per=(len(tasks), len(some)),
        )
        cosines = [
            float(torch.cosine_similarity(a, b, dim=0))
            for a, b in zip(found["ours"], found["plain"], strict=False)
        ]
        settings_said["least cosine"] = round(min(cosines), 5)
        return pair

    def default_one(self) -> Pair:
        return self._edits("default_one", 1, n=2)

    def default_eight(self) -> Pair:
        return self._edits("default_eight", 8, n=1)

    def _edits(self, name: str, count: int, *, n: int) -> Pair:
        requests = self.requests[:count]
        facts = [fact(task) for task in self.tasks[: 1 if self.quick else count]]
        settings = plain.Settings(steps=self.steps)

        def ours() -> None:
            self.rome.edit_each(self.view, requests, self.prepared, None)

        def slow() -> None:
            for each in facts:
                plain.edit(self.view.model, self.role.module, each, self.second_II, settings)

        if not self.quick:
            ours()
        said = {
            "requests at once": count,
            "ours": "the defaults",
            "plain": f"21 contexts, at most {STEPS} steps, as published"
            + f"; {self.steps} were run, and the time scaled" * self.quick,
            "threads": torch.get_num_threads(),
        }
        return measure(
            name,
            ours,
            slow,
            n=1 if self.quick else n,
            unit="s per edit",
            settings=said,
            per=(count, len(facts) * self.steps / STEPS),
        )


def fact(task: ValueTask) -> plain.Fact:
    """A task as the plain side takes it."""
    assert task.kl is not None
    return plain.Fact(
        task.target,
        tuple((row.ids, row.position) for row in task.contexts),
        (task.kl.ids, task.kl.position),
    )


def main() -> None:
    args = arguments(__doc__ or "")
    every = ["one", "eight", "default_one", "default_eight"]
    names = args.pairs or (["one", "default_eight"] if args.quick else every)
    bench = Bench(quick=args.quick)
    report([getattr(bench, name)() for name in names], as_json=args.json)


if __name__ == "__main__":
    main()
