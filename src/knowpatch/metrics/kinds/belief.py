"""Belief by multiple choice: given both, does the model choose the new answer or the old one.

After SA-MCQ (Gu et al., arXiv 2604.05995), whose new answer is always option B, so that a model
that likes B scores full. Here every order of the options is asked, each letter's log-probability
is renormalised over the letters, and the mean over the orders counts; how much letters differ
regardless of what they stand for is `belief_mc_bias`. Asked with the two answers alone ("two") and
with a third option, to be unsure ("unsure"). No passage with evidence is given, and no text of the
model is parsed. Small models choose near chance: read the value before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from statistics import fmean

from knowpatch.data.case import Case
from knowpatch.future import Future
from knowpatch.metrics.asker import Asker
from knowpatch.metrics.metric import Result, Score, Values, metric, register
from knowpatch.metrics.queries import edits
from knowpatch.metrics.text import normalise
from knowpatch.models.passes import Scored

LETTERS = "ABC"
UNSURE = "I am not sure."
OLD_UNKNOWN = "no request says what the old answer was, or it equals the new one"


@dataclass(frozen=True)
class Choice:
    """One order of the options, and each letter forced behind the question.

    Attributes:
        new: place of the new answer among the options.
        letters: what was asked, a letter each.
    """

    new: int
    letters: tuple[Future[Scored], ...]

    def probabilities(self) -> list[float]:
        """Of each letter, all letters together 1."""
        return shares([sum(letter.result().logprobs) for letter in self.letters])


def shares(logprobs: Sequence[float]) -> list[float]:
    """Exponentials, together 1."""
    largest = max(logprobs)
    raw = [math.exp(value - largest) for value in logprobs]
    return [value / sum(raw) for value in raw]


def question(prompt: str, options: Sequence[str]) -> str:
    """The question with its options, ready for a letter."""
    task = "Answer the question." if prompt.rstrip().endswith("?") else "Complete the text."
    listed = "\n".join(f"{letter}. {o}" for letter, o in zip(LETTERS, options, strict=False))
    return f"{task} Choose one option.\n{prompt.strip()}\n{listed}\nThe right option is"


def _asked(case: Case, model: Asker) -> dict[str, list[list[Choice]]]:
    """For each way to ask, for each edited prompt, the choices in all orders."""
    found: dict[str, list[list[Choice]]] = {"two": [], "unsure": []}
    for probe, request in edits(case):
        old = request.old
        if old is None or normalise(old) == normalise(request.target):
            continue
        new = request.target.strip()
        for way, options in (("two", (new, old)), ("unsure", (new, old, UNSURE))):
            found[way].append([_choice(model, probe.prompt, o, new) for o in permutations(options)])
    return found


def _choice(model: Asker, prompt: str, options: Sequence[str], new: str) -> Choice:
    text = question(prompt, [option.strip() for option in options])
    letters = tuple(model.force(text, letter) for letter in LETTERS[: len(options)])
    return Choice(options.index(new), letters)


def chosen(choices: Sequence[Choice]) -> float:
    """Probability of the new answer, mean over the orders."""
    return fmean(choice.probabilities()[choice.new] for choice in choices)


def bias(choices: Sequence[Choice]) -> float:
    """Between the letter that is chosen most and the one that is chosen least, over all orders."""
    letters = zip(*(choice.probabilities() for choice in choices), strict=True)
    means = [fmean(letter) for letter in letters]
    return max(means) - min(means)


def _held(
    case: Case, before: Asker, after: Asker, of: Callable[[Sequence[Choice]], float]
) -> Result | None:
    if not edits(case):
        return None
    old, new = _asked(case, before), _asked(case, after)
    if not any(new.values()):
        return lambda: Score.none(OLD_UNKNOWN)

    def values(asked: Mapping[str, Sequence[Sequence[Choice]]]) -> Values:
        return {way: [of(choices) for choices in queries] for way, queries in asked.items()}

    return lambda: Score(values(new), values(old))


@metric(
    protocol="multiple choice", about="probability of the new answer beside the old, all orders"
)
def belief_mc(case: Case, before: Asker, after: Asker) -> Result | None:
    return _held(case, before, after, chosen)


@metric(
    protocol="multiple choice",
    about="difference between the most and the least chosen letter, whatever they stand for",
    better="less",
)
def belief_mc_bias(case: Case, before: Asker, after: Asker) -> Result | None:
    return _held(case, before, after, bias)


register("belief", belief_mc, belief_mc_bias)
