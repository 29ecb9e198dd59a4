"""Is what is located the fact, or its subject? (KnowEdit, arXiv 2401.01286, Figures 8 and 9.)

From facts with subjects, prompts are made that ought to be found in the same place, and prompts
that ought not to be:

    same fact      the fact in other words, where the data has them
    chain          a question that needs the fact and others, where the data has it
    same relation  the same prompt about another fact's subject
    same subject   another fact's prompt about this subject
    nonsense       the prompt's words in another order around the subject

If prompts of the same subject are found as near to the fact's own as the same fact in other words,
the locator finds the subject (Hase et al., arXiv 2301.04213). Axes: P prompts, L blocks.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from knowpatch.bench.statistics import Paired, Records, Summary, bootstrap, paired
from knowpatch.errors import DataError
from knowpatch.locate.facts import Fact
from knowpatch.locate.locators import Locator, located
from knowpatch.locate.overlap import EVERY, RELATED, combined, overlap, pearson, spearman
from knowpatch.models.view import ModelView
from knowpatch.parts.spans import subject_span
from knowpatch.progress import Progress, silent

FACT, CHAIN, RELATION, SUBJECT, NONSENSE = (
    "same fact",
    "chain",
    "same relation",
    "same subject",
    "nonsense",
)
KINDS = (FACT, CHAIN, RELATION, SUBJECT, NONSENSE)
MOST = 10
"""Blocks that are taken at most."""
FEWEST = 3
"""Facts that a comparison needs."""


def variants(facts: Sequence[Fact], *, seed: int = 0) -> list[dict[str, list[Fact]]]:
    """For each fact its related prompts, by kind. Only what is in the data has its answer.

    Raises:
        DataError: too few facts to compare.
    """
    if len(facts) < FEWEST:
        raise DataError(f"{len(facts)} facts cannot be compared: give {FEWEST} at least")
    found = []
    for number, fact in enumerate(facts):
        in_turn = [*facts[number + 1 :], *facts[:number]]
        others = [one for one in in_turn if _apart(one, fact)]
        made = {
            FACT: [replace(fact, prompt=text) for text in fact.rephrases],
            CHAIN: [replace(fact, prompt=text, answer=None) for text in fact.chains],
            RELATION: [_about(fact, one.subject) for one in others[:1]],
            SUBJECT: [_about(one, fact.subject) for one in others[:1]],
            NONSENSE: _shuffled(fact, random.Random(seed + number)),
        }
        found.append({kind: [bare(one) for one in some] for kind, some in made.items()})
    return found


def _apart(one: Fact, other: Fact) -> bool:
    """Whether two facts have neither subject nor relation in common."""
    return one.subject != other.subject and _template(one) != _template(other)


def _template(fact: Fact) -> str:
    start, stop = subject_span(fact.prompt, fact.subject)
    return f"{fact.prompt[:start]}\0{fact.prompt[stop:]}"


def _about(fact: Fact, subject: str) -> Fact:
    """The fact's prompt about another subject; there is no answer to it."""
    return Fact(_template(fact).replace("\0", subject), subject)


def bare(fact: Fact) -> Fact:
    """Without the words that it would be related to: what a locator sees."""
    return replace(fact, id="", rephrases=(), chains=())


def _shuffled(fact: Fact, chance: random.Random) -> list[Fact]:
    """The words around the subject in another order; none where there is only one."""
    words = _template(fact).split()
    if len(set(words)) < 3:
        return []
    order = list(words)
    while order == words:
        chance.shuffle(order)
    return [Fact(" ".join(order).replace("\0", fact.subject), fact.subject)]


@dataclass(frozen=True)
class Kind:
    """How near the prompts of one kind are found to their facts' own.

    Attributes:
        prompts: how many of them there are.
        rsim: RSim of the n highest blocks, for n from 1 on; rsim_ranks: by Spearman's correlation.
        correlation: Pearson's, of the scores of all blocks.
        peak: the highest block; centre: mean block, weighted by positive scores.
        curve: mean scores by block, each prompt's over its largest.
    """

    prompts: int
    rsim: tuple[Summary, ...]
    rsim_ranks: Summary
    correlation: Summary
    peak: Summary
    centre: Summary
    curve: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """What one locator finds.

    Attributes:
        facts: how many; left_out: prompts that have too little to do with their answers.
        blocks: L; own: of the facts' own prompts, peak, centre and curve.
        kinds: by kind.
        nearest: the kind that ought to be nearest: the same fact, or a chain.
        difference: its correlation less that of another fact of the same subject, paired.
    """

    facts: int
    left_out: int
    blocks: int
    own: tuple[Summary, Summary, tuple[float, ...]]
    kinds: dict[str, Kind]
    nearest: str
    difference: Paired | None

    @property
    def verdict(self) -> str:
        """What can be said, in one line."""
        one = None if self.difference is None else self.difference.difference
        if one is None or one.low is None or one.high is None:
            return "no rephrases and no chains, so the fact cannot be told from its subject"
        told = f"{one.mean:+.2f} ({one.low:+.2f} to {one.high:+.2f})"
        words = f"r of {self.nearest!r} less r of {SUBJECT!r} {told}"
        if one.low > 0:
            return f"what is located belongs to the fact: {words}"
        return f"what is located does not tell the fact from its subject: {words}"


def compared(
    view: ModelView,
    how: Locator,
    facts: Sequence[Fact],
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> Comparison:
    """Make related prompts of facts, locate all of them, and compare.

    Raises:
        DataError: too few facts, or too few that could be located.
    """
    made = variants(facts, seed=seed)
    every = [bare(fact) for fact in facts]
    every += [one for some in made for more in some.values() for one in more]
    scores = dict(zip(every, located(view, how, every, progress=progress), strict=True))
    return compare(
        [scores[bare(fact)] for fact in facts],
        [{kind: [scores[one] for one in more] for kind, more in some.items()} for some in made],
        [[_apart(one, other) for other in facts] for one in facts],
    )


def compare(
    own: Sequence[Tensor | None],
    made: Sequence[Mapping[str, Sequence[Tensor | None]]],
    apart: Sequence[Sequence[bool]],
) -> Comparison:
    """Compare located prompts.

    Args:
        own: scores (L) of each fact's own prompt.
        made: for each fact, by kind, those of the prompts that `variants` made.
        apart: which two facts have nothing in common, so that they are among all pairs.

    Raises:
        DataError: too few prompts could be located.
    """
    kept = [i for i, one in enumerate(own) if one is not None]
    left_out = len(own) - len(kept)
    left_out += sum(one is None for some in made for more in some.values() for one in more)
    if len(kept) < FEWEST:
        raise DataError(f"only {len(kept)} facts could be located: {FEWEST} are needed")
    own_PL = torch.stack([one for one in own if one is not None])
    related = {
        kind: [[x for x in made[i].get(kind, ()) if x is not None] for i in kept] for kind in KINDS
    }
    apart_PP = torch.tensor([[apart[i][j] for j in kept] for i in kept])
    kinds = {kind: _kind(own_PL, some, apart_PP) for kind, some in related.items() if any(some)}
    nearest = FACT if FACT in kinds else CHAIN
    difference = None
    if nearest in kinds and SUBJECT in kinds:
        near, far = (_correlations(own_PL, related[kind]) for kind in (nearest, SUBJECT))
        difference = paired(near, far)
    flat = _described([[one] for one in own_PL])
    return Comparison(len(kept), left_out, own_PL.shape[1], flat, kinds, nearest, difference)


def _kind(own_PL: Tensor, related: Sequence[Sequence[Tensor]], apart_PP: Tensor) -> Kind:
    most = min(MOST, own_PL.shape[1] - 1)
    rsims = []
    for n in range(1, most + 1):
        rsims.append(_sure(bootstrap(_likenesses(own_PL, related, apart_PP, n), combined)))
    peak, centre, curve = _described(related)
    return Kind(
        sum(map(len, related)),
        tuple(rsims),
        _sure(bootstrap(_likenesses(own_PL, related, apart_PP, None), combined)),
        _sure(bootstrap(_correlations(own_PL, related))),
        peak,
        centre,
        curve,
    )


def _sure(summary: Summary | None) -> Summary:
    if summary is None:
        raise DataError("no two facts differ in both subject and relation: nothing to compare with")
    return summary


def _likenesses(
    own_PL: Tensor, related: Sequence[Sequence[Tensor]], apart_PP: Tensor, n: int | None
) -> Records:
    """For each fact, how alike its own prompt and the related ones are, and those of other facts:
    by the n highest blocks, or by the ranks of all."""

    def alike(one: Tensor, other: Tensor) -> Tensor:
        return spearman(one, other) if n is None else overlap(one, other, n)

    every_PP = alike(own_PL, own_PL)
    records: list[dict[str, float] | None] = []
    for number, some in enumerate(related):
        others = every_PP[number][apart_PP[number]]
        record = {EVERY: float(others.mean())} if len(others) else {}
        if some:
            mine = own_PL[number : number + 1]
            record[RELATED] = float(alike(mine, torch.stack(list(some))).mean())
        records.append(record)
    return records


def _correlations(own_PL: Tensor, related: Sequence[Sequence[Tensor]]) -> Records:
    return [
        {"value": float(pearson(own_PL[i : i + 1], torch.stack(list(some))).mean())}
        if some
        else None
        for i, some in enumerate(related)
    ]


def _described(
    related: Sequence[Sequence[Tensor]],
) -> tuple[Summary, Summary, tuple[float, ...]]:
    """Peak, centre of mass, and mean curve, each prompt's over its largest score."""
    peaks: list[dict[str, float] | None] = []
    centres: list[dict[str, float] | None] = []
    curves = []
    for some in related:
        if not some:
            peaks.append(None)
            centres.append(None)
            continue
        scores_PL = torch.stack(list(some))
        positive_PL = scores_PL.clamp(min=0)
        block_L = torch.arange(scores_PL.shape[1], dtype=scores_PL.dtype)
        mass_P = positive_PL.sum(1).clamp(min=1e-30)
        peaks.append({"value": float(scores_PL.argmax(1).double().mean())})
        centres.append({"value": float(((positive_PL @ block_L) / mass_P).mean())})
        largest_P1 = scores_PL.abs().amax(1, keepdim=True).clamp(min=1e-30)
        curves.append((scores_PL / largest_P1).mean(0))
    curve = torch.stack(curves).mean(0).tolist()
    return _sure(bootstrap(peaks)), _sure(bootstrap(centres)), tuple(curve)
