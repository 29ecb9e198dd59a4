"""Calibration: from which score on a gated memory may answer, measured on the model itself.

Published thresholds belong to the models that they were found on. Here a method says how it reads a
prompt (`keys`) and how it compares two (`scores`), and gets back two samples of scores: of pilot
facts' prompts in other words, which ought to be recognised, and of prompts that ought not to be: by
default the pilot prompts about other subjects, which are the nearest of all that must be told
apart, and the control prompts. Of these the best score against all pilot keys counts, since a
memory holds many.
Kept per model and way of reading. Axes: N keys, Q queries.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from knowpatch.files import kept_in, write_atomically
from knowpatch.parts.pilots import pilots
from knowpatch.probes import LEAD_INS, controls, rephrased

RATE = 0.01
"""Share of prompts out of scope that are answered all the same."""
BANK, KINDS, OTHERS = 60, 10, 2
"""Pilot facts that keys are made of, no subject twice; kinds of subject, which take turns among
them; other subjects of its kind that each is asked about."""
VERSION = 2

Measure = Literal["similarity", "distance"]


@dataclass(frozen=True)
class Asked:
    """A prompt, and the subject in it, for methods that read there."""

    prompt: str
    subject: str | None


Keys = Callable[[Sequence[Asked]], Any]
"""Reads prompts: what stands for all of them."""
Scores = Callable[[Any, Any], Tensor]
"""Compares queries with keys: (Q, N)."""


@dataclass(frozen=True)
class Calibration:
    """Scores of prompts in scope with their own key, and the best of those out of scope with any.

    Attributes:
        measure: whether more is nearer (similarity) or less (distance).
    """

    measure: Measure
    inside: tuple[float, ...]
    outside: tuple[float, ...]

    def threshold(self, rate: float = RATE) -> float:
        """The loosest threshold that at most a share `rate` of what is out of scope passes."""
        nearest = sorted(self.outside, reverse=self.measure == "similarity")
        return nearest[min(int(rate * len(nearest)), len(nearest) - 1)]

    def parting(self) -> float:
        """The threshold that parts the two samples best: most in scope less most out of scope pass
        (Youden's J), the middle one of the best."""
        tried = sorted({*self.inside, *self.outside})
        gains = [self.share(self.inside, x) - self.share(self.outside, x) for x in tried]
        best = [x for x, gain in zip(tried, gains, strict=True) if gain >= max(gains) - 1e-9]
        return best[len(best) // 2]

    def share(self, scores: Sequence[float], threshold: float) -> float:
        """Of these scores, the share that passes a threshold."""
        if self.measure == "similarity":
            return sum(score > threshold for score in scores) / len(scores)
        return sum(score < threshold for score in scores) / len(scores)

    def told(self, threshold: float) -> str:
        """The calibration in one line, for people."""
        middle = {name: _median(values) for name, values in self._samples().items()}
        caught, wrong = (100 * self.share(values, threshold) for values in self._samples().values())
        return (
            f"threshold {threshold:.3g} ({self.measure}): passed by {caught:.0f} % of "
            f"{len(self.inside)} reworded prompts (median {middle['inside']:.3g}) and by "
            f"{wrong:.1f} % of {len(self.outside)} prompts out of scope (median "
            f"{middle['outside']:.3g})"
        )

    def _samples(self) -> dict[str, tuple[float, ...]]:
        return {"inside": self.inside, "outside": self.outside}


def kept_at(
    fingerprint: str, reading: Mapping[str, Any], outside: Sequence[Asked] | None = None
) -> Path:
    """The file that a calibration is kept in."""
    groups = (*_inside(), _outside() if outside is None else outside)
    asked = [[one.prompt for one in group] for group in groups]
    content = json.dumps([VERSION, fingerprint, reading, asked], sort_keys=True)
    return kept_in("calibrations", content, ".json")


def calibrate(
    fingerprint: str,
    reading: Mapping[str, Any],
    measure: Measure,
    keys: Keys,
    scores: Scores,
    queries: Keys | None = None,
    *,
    outside: Sequence[Asked] | None = None,
    subjects: bool = False,
) -> Calibration:
    """The calibration of one way of reading prompts.

    Args:
        fingerprint: of the model.
        reading: what names the way of reading, for the cache: method, block, options.
        measure: what scores are.
        keys, scores: read and compare.
        queries: reads what is asked, where that is not how keys are read.
        outside: prompts out of scope, other than the usual ones.
        subjects: whether a key stands for its subject, whatever is asked about it, and not for the
            prompt; a prompt that names it is in its scope then.
    """
    path = kept_at(fingerprint, reading, outside)
    with contextlib.suppress(OSError, ValueError, TypeError):
        within, without = json.loads(path.read_text(encoding="utf-8"))
        return Calibration(measure, tuple(within), tuple(without))
    queries = queries or keys
    plain, reworded = _inside()
    away = _outside() if outside is None else outside
    bank = keys(plain)
    own_QN = scores(queries(reworded), bank)
    own_Q = own_QN[torch.arange(len(reworded)), torch.arange(len(reworded)) % len(plain)]
    other_QN = scores(queries(away), bank)
    if subjects:
        mine_QN = [[(b.subject or "") in a.prompt for b in plain] for a in away]
        farthest = float("-inf" if measure == "similarity" else "inf")
        other_QN = other_QN.masked_fill(torch.tensor(mine_QN), farthest)
    best_Q = other_QN.amax(1) if measure == "similarity" else other_QN.amin(1)
    found = own_Q.tolist(), best_Q.tolist()
    write_atomically(path, json.dumps(found).encode())
    return Calibration(measure, *map(tuple, found))


def other_questions() -> list[Asked]:
    """Pilot prompts that ask something else about subjects that the bank's prompts are about."""
    known = {fact.subject for fact in pilots(BANK)}
    return [Asked(f.prompt, f.subject) for f in pilots()[BANK:] if f.subject in known]


def _inside() -> tuple[list[Asked], list[Asked]]:
    """Pilot prompts; and all of them again in other words, and once for each way of leading in."""
    plain = [Asked(fact.prompt, fact.subject) for fact in pilots(BANK)]
    reworded = [Asked(text, one.subject) for text, one in zip(rephrased(), plain, strict=True)]
    reworded += [Asked(f"{lead} {_lower(one)}", one.subject) for lead in LEAD_INS for one in plain]
    return plain, reworded


def _lower(one: Asked) -> str:
    """The prompt as it goes on in a sentence; a subject that opens it keeps its capital."""
    opens = one.subject is not None and one.prompt.startswith(one.subject)
    return one.prompt if opens else one.prompt[0].lower() + one.prompt[1:]


def about_others() -> list[list[Asked]]:
    """Each pilot prompt of the bank about other subjects of the same kind."""
    facts, found = pilots(BANK), []
    for number, fact in enumerate(facts):
        steps = range(1, OTHERS + 1)
        names = [facts[(number + step * KINDS) % BANK].subject or "" for step in steps]
        found.append([Asked(fact.prompt.replace(fact.subject or "", one), one) for one in names])
    return found


def _outside() -> list[Asked]:
    """Pilot prompts about other subjects of the same kind, and the control prompts."""
    others = [one for some in about_others() for one in some]
    return others + [Asked(prompt, None) for prompt in controls()]


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values).median())
