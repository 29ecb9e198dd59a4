"""Closed-form updates from a cached factor, against the dense solves of the published programs.

    python benchmarks/solve.py [memit_1 memit_100 alphaedit_1 alphaedit_100 sequence]
                               [--json] [--quick]

memit_N, alphaedit_N: one batch of N edits of a map of 14,336 inputs and 4,096 outputs (--quick:
4,096 and 1,024), given keys, residuals and statistics; the plain sides are those of plain/memit.py
and plain/alphaedit.py. sequence: 10,000 edits, one after the other, with all keys kept (--quick:
2,000); its ratio is seconds per edit early in the sequence over those at its end.

No model: the statistics are those of spectrum.py. Axes: I inputs, J dimensions of the null space, D
outputs, N edits, M earlier ones.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import Any

import torch
from pairs import Pair, arguments, measure, report
from plain import alphaedit, memit
from spectrum import CONDITION, Spectrum
from torch import Tensor

from knowpatch.bench.memory import Meter, in_use
from knowpatch.parts.solve import KEPT_SHARE, Form, update
from knowpatch.parts.space import Space

FULL, QUICK, CHECK = (14_336, 4_096), (4_096, 1_024), (2_048, 512)
"""Inputs and outputs; CHECK is where AlphaEdit's plain side is solved in float64, too."""
LONG, SHORT = (10_000, 1_536, 576), (2_000, 512, 192)
"""Edits in sequence, inputs and outputs."""
KEEP, RIDGE = 15_000, 10.0
"""The published lambda and L2."""
EARLIER = 100
"""Keys of earlier edits that AlphaEdit keeps."""
EARLY = 50
"""Where the first edits of a sequence end that are not counted."""
REPEATS = 5
"""Times ours runs in a round, which takes it milliseconds."""
EQUAL = 1e-6


@dataclass
class Watched:
    """Work, and the most memory that it took above what was there when it began."""

    work: Callable[[], Any]
    times: int = 1
    result: Any = None
    peak: int = 0

    def __call__(self) -> None:
        self.result = None
        before, meter = in_use(), Meter(torch.device("cpu"))
        with meter.running():
            for _ in range(self.times):
                self.result = self.work()
        self.peak = max(self.peak, meter.peak - before)


@dataclass
class Batch:
    """Keys (I, N) and residuals (D, N) of one batch of edits."""

    keys_IN: Tensor
    residuals_DN: Tensor

    @classmethod
    def of(cls, spectrum: Spectrum, outputs: int, count: int) -> Batch:
        return cls(spectrum.keys(count), spectrum.normal(outputs, count))


@dataclass
class Null:
    """What both sides of AlphaEdit hold between edits."""

    space: Space
    form: Form
    projector_II: Tensor
    earlier_II: Tensor

    @classmethod
    def of(cls, spectrum: Spectrum, dtype: torch.dtype) -> Null:
        space, keys_IM = spectrum.space(), spectrum.keys(EARLIER)
        form = Form.even(RIDGE, space.coordinates).keeping(space.inside(keys_IM))
        projector_II = spectrum.projector().to(dtype)
        return cls(space, form, projector_II, (keys_IM @ keys_IM.T).to(dtype))

    def ours(self, batch: Batch) -> tuple[Tensor, Tensor, Form]:
        """The factors of the change, and the form that keeps its keys."""
        keys_JN = self.space.inside(batch.keys_IN)
        basis_IJ = self.space.basis_IJ
        left, right = update(batch.residuals_DN, keys_JN, self.form, slack=1.0, basis_IJ=basis_IJ)
        return left, right, self.form.keeping(keys_JN)

    def plain(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The dense change, and Cp with the new keys in it."""
        keys = batch.keys_IN.to(self.projector_II)
        delta_DI = alphaedit.closed_form(
            keys, batch.residuals_DN, self.projector_II, self.earlier_II, RIDGE
        )
        return delta_DI, self.earlier_II + keys @ keys.T


class Bench:
    """The pairs, each with statistics of its own."""

    def __init__(self, *, quick: bool) -> None:
        self.quick = quick
        self.inputs, self.outputs = QUICK if quick else FULL
        self.rounds = 1 if quick else 2

    def memit_1(self) -> Pair:
        return self._memit(1)

    def memit_100(self) -> Pair:
        return self._memit(100)

    def alphaedit_1(self) -> Pair:
        return self._alphaedit(1)

    def alphaedit_100(self) -> Pair:
        return self._alphaedit(100)

    def _memit(self, count: int) -> Pair:
        spectrum = Spectrum(self.inputs)
        say(f"memit_{count}: statistics and factor")
        second_II, batch = spectrum.second(), Batch.of(spectrum, self.outputs, count)
        factored = Watched(lambda: Form.of(second_II).scaled(KEEP))
        seconds = timed(factored)
        form = factored.result

        def ours() -> tuple[Tensor, Tensor]:
            return update(batch.residuals_DN, batch.keys_IN, form, slack=1.0)

        def plain() -> Tensor:
            return memit.closed_form(batch.keys_IN, batch.residuals_DN, second_II, KEEP)

        fast, slow = Watched(ours, REPEATS), Watched(plain)
        pair = self._measured(f"memit_{count}", count, fast, slow)
        gap = apart(*fast.result, slow.result)
        assert gap < EQUAL, gap
        pair.settings.update(
            {
                "relative difference": f"{gap:.1e}",
                "factorisation, s": round(seconds, 2),
                "pays from edit" if count == 1 else "pays from batch": pays(seconds, pair),
                "GB: factorisation works in": gigabytes(factored.peak),
                "GB: ours holds": gigabytes(held(form)),
                "GB: plain holds": 0.0,
            }
        )
        return pair

    def _alphaedit(self, count: int) -> Pair:
        spectrum = Spectrum(self.inputs)
        say(f"alphaedit_{count}: statistics")
        batch = Batch.of(spectrum, self.outputs, count)
        null = Null.of(spectrum, torch.float32)
        fast, slow = Watched(lambda: null.ours(batch), REPEATS), Watched(lambda: null.plain(batch))
        pair = self._measured(f"alphaedit_{count}", count, fast, slow)
        gap, exact = apart(*fast.result[:2], slow.result[0]), exact_gap(count)
        assert exact < EQUAL, exact
        say("eigendecomposition")
        pair.settings.update(
            {
                "null space, J": null.space.width,
                "earlier keys kept": EARLIER,
                "relative difference from float32": f"{gap:.1e}",
                f"relative difference from float64, at I = {CHECK[0]}": f"{exact:.1e}",
                f"eigendecomposition, s, at I = {QUICK[0]}": round(eigen_seconds(QUICK[0]), 2),
                "GB: ours holds": gigabytes(held(null.space, null.form)),
                "GB: plain holds": gigabytes(held(null.projector_II, null.earlier_II)),
            }
        )
        return pair

    def _measured(self, name: str, count: int, fast: Watched, slow: Watched) -> Pair:
        fast()  # once, for what is set up only once
        pair = measure(
            name,
            fast,
            slow,
            n=self.rounds,
            unit="s per edit" if count == 1 else f"s per batch of {count}",
            settings={"inputs": self.inputs, "outputs": self.outputs},
            per=(REPEATS, 1),
        )
        matrix = gigabytes(8 * self.inputs**2)
        pair.settings.update(
            {
                "condition": CONDITION,
                "threads": torch.get_num_threads(),
                "GB: one I x I float64 matrix": matrix,
                "GB: ours works in": gigabytes(fast.peak),
                "GB: plain works in": gigabytes(slow.peak),
            }
        )
        return pair

    def sequence(self) -> Pair:
        return Sequence(*(SHORT if self.quick else LONG)).pair()


class Sequence:
    """Many edits of one map, each with the keys of all before it kept."""

    def __init__(self, count: int, inputs: int, outputs: int) -> None:
        self.spectrum = Spectrum(inputs)
        self.keys_IN = self.spectrum.keys(count)
        self.wanted_DN = self.spectrum.normal(outputs, count)
        self.window = inputs // KEPT_SHARE + 1
        """Edits from one factorisation to the next: any as many in a row hold just one."""
        self.seconds: list[float] = []
        self.most = 0

    def pair(self) -> Pair:
        second_II = self.spectrum.second()
        form = Form.of(second_II).scaled(KEEP)
        count, window = self.keys_IN.shape[1], self.window
        delta_DI, form = self._run(form)
        early_N = torch.tensor(self.seconds[EARLY : EARLY + window])
        late_N = torch.tensor(self.seconds[-window:])
        gap = self._from_one_shot(delta_DI, second_II)
        assert gap < EQUAL, gap
        early, late = float(early_N.mean()), float(late_N.mean())
        ratio, medians = early / late, float(early_N.median() / late_N.median())
        said = {
            "edits": count,
            "inputs": self.keys_IN.shape[0],
            "outputs": self.wanted_DN.shape[0],
            "ours": f"mean of the last {window} edits, one factorisation among them",
            "plain": f"the same of {window} edits from number {EARLY} on",
            "spread": "of the means and of the medians",
            "s per factorisation": round(max(self.seconds[-window:]), 4),
            "relative difference from one shot": f"{gap:.1e}",
            "MB: state at most": round(self.most / 1e6, 2),
            "MB: state at the end": round(held(form) / 1e6, 2),
            "MB: one I x I float64 matrix": round(8 * self.keys_IN.shape[0] ** 2 / 1e6, 2),
            "threads": torch.get_num_threads(),
        }
        low, high = sorted((round(ratio, 3), round(medians, 3)))
        fast, slow = round(late, 5), round(early, 5)
        return Pair("sequence", round(ratio, 3), low, high, fast, slow, "s per edit", count, said)

    def _run(self, form: Form) -> tuple[Tensor, Form]:
        """The sum of all changes (D, I) of a map that began as 0, and the last form."""
        delta_DI = torch.zeros(len(self.wanted_DN), len(self.keys_IN), dtype=torch.float64)
        count = self.keys_IN.shape[1]
        for number in range(count):
            if number % 1000 == 0:
                say(f"sequence: edit {number} of {count}")
            key_I1 = self.keys_IN[:, number : number + 1]
            residual_D1 = self.wanted_DN[:, number : number + 1] - delta_DI @ key_I1
            start = perf_counter()
            left, right = update(residual_D1, key_I1, form, slack=1.0)
            form = form.keeping(key_I1)
            self.seconds.append(perf_counter() - start)
            delta_DI.addmm_(left, right)
            self.most = max(self.most, held(form))
        return delta_DI, form

    def _from_one_shot(self, delta_DI: Tensor, second_II: Tensor) -> float:
        """How far the sum is from the ridge solution of all edits at once (memit.md, section 4)."""
        keys = self.keys_IN
        system_II = KEEP * second_II + keys @ keys.T
        once_DI = torch.linalg.solve(system_II, keys @ self.wanted_DN.T).T
        return float((delta_DI - once_DI).norm() / once_DI.norm())


@cache
def exact_gap(count: int) -> float:
    """The relative difference of AlphaEdit's two sides, the plain one in float64, at CHECK."""
    spectrum = Spectrum(CHECK[0])
    batch, null = Batch.of(spectrum, CHECK[1], count), Null.of(spectrum, torch.float64)
    return apart(*null.ours(batch)[:2], null.plain(batch)[0])


@cache
def eigen_seconds(inputs: int) -> float:
    """Of the eigendecomposition that our space comes from, once a map."""
    second_II = Spectrum(inputs).second()
    return timed(lambda: torch.linalg.eigh(second_II))


def apart(left: Tensor, right: Tensor, plain_DI: Tensor) -> float:
    """|left right - plain| / |plain|, in one (D, I) matrix at a time."""
    size = plain_DI.norm().double()
    difference_DI = torch.addmm(plain_DI.double(), left, right, alpha=-1)
    return float(difference_DI.norm() / size)


def pays(once: float, pair: Pair) -> int:
    """From how many edits on what is done once has paid for itself."""
    return math.ceil(once / max(pair.plain - pair.ours, 1e-9))


def held(*things: Form | Space | Tensor) -> int:
    """Bytes of matrices, forms and spaces."""
    parts = [[thing] if isinstance(thing, Tensor) else vars(thing).values() for thing in things]
    return sum(part.nbytes for some in parts for part in some if isinstance(part, Tensor))


def gigabytes(count: int) -> float:
    return round(count / 1e9, 3)


def timed(work: Callable[[], Any]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    args = arguments(__doc__ or "")
    every = ["memit_1", "memit_100", "alphaedit_1", "alphaedit_100", "sequence"]
    bench = Bench(quick=args.quick)
    report([getattr(bench, name)() for name in args.pairs or every], as_json=args.json)


if __name__ == "__main__":
    main()
