"""Erasure: the edited model should refuse what was erased, and nothing else.

KnowEdit's erasure task (arXiv 2401.01286). The model answers greedily, up to the line's end. Right:
it says that it does not know and the old answer is not there (`refusal_gen`); the old answer leaks
wherever it stands (`leak_gen`). Of what should stay: known answers still given
(`retain_right_gen`), the very same answer (`retain_same_gen`), refusals that nobody wanted
(`over_refusal_gen`).

The published computation takes 10 tokens and accepts a refusal in front of the answer
(`refusal_gen_published`), and compares the kept answers' tokens place by place, so that one token
put in front makes all of them wrong (`retain_gen_published`).
"""

from __future__ import annotations

from knowpatch.data.case import FORGET, RETAIN, Case, Probe
from knowpatch.future import Future
from knowpatch.metrics.asker import Asker
from knowpatch.metrics.metric import Result, metric, register
from knowpatch.metrics.queries import both, compared
from knowpatch.metrics.text import contains_any, first_line, refuses
from knowpatch.stepping import Generated

TOKENS, PUBLISHED_TOKENS = 16, 10

Said = Future[Generated]


def _say(model: Asker, probe: Probe) -> Said:
    return model.say(probe.prompt, TOKENS)


def _line(said: Said) -> str:
    return first_line(said.result().text)


def _leaks(probe: Probe, said: Said) -> bool:
    return contains_any(_line(said), probe.aliases)


@metric(protocol="free generation", about="refuses, without the erased answer beside it")
def refusal_gen(case: Case, before: Asker, after: Asker) -> Result | None:
    return both(
        case,
        FORGET,
        (before, after),
        _say,
        lambda p, said: float(refuses(_line(said)) and not _leaks(p, said)),
    )


@metric(protocol="free generation", about="the erased answer is said nevertheless", better="less")
def leak_gen(case: Case, before: Asker, after: Asker) -> Result | None:
    return both(
        case,
        FORGET,
        (before, after),
        lambda model, probe: _say(model, probe) if any(probe.aliases) else None,
        lambda probe, said: float(_leaks(probe, said)),
    )


@metric(
    protocol="free generation", about="of what was answered rightly before, share that still is"
)
def retain_right_gen(case: Case, before: Asker, after: Asker) -> Result | None:
    return compared(
        case,
        RETAIN,
        lambda p: (_say(before, p), _say(after, p)) if any(p.aliases) else None,
        lambda p, said: float(_leaks(p, said[1])) if _leaks(p, said[0]) else None,
        none="the unedited model answers none of the queries rightly",
    )


@metric(protocol="free generation", about="the answer that should stay is the same, word for word")
def retain_same_gen(case: Case, before: Asker, after: Asker) -> Result | None:
    return compared(
        case,
        RETAIN,
        lambda probe: (_say(before, probe), _say(after, probe)),
        lambda _, said: float(_line(said[0]) == _line(said[1])),
    )


@metric(protocol="free generation", about="refuses what should stay", better="less")
def over_refusal_gen(case: Case, before: Asker, after: Asker) -> Result | None:
    return both(case, RETAIN, (before, after), _say, lambda _, said: float(refuses(_line(said))))


@metric(
    protocol="free generation",
    about="a refusal stands somewhere in the first 10 tokens",
    published=True,
)
def refusal_gen_published(case: Case, before: Asker, after: Asker) -> Result | None:
    return both(
        case,
        FORGET,
        (before, after),
        lambda model, probe: model.say(probe.prompt, PUBLISHED_TOKENS),
        lambda _, said: float("i don't know." in said.result().text.lower()),
    )


@metric(
    protocol="free generation",
    about="tokens that are equal place by place, by the earlier answer's length",
    published=True,
)
def retain_gen_published(case: Case, before: Asker, after: Asker) -> Result | None:
    return compared(
        case,
        RETAIN,
        lambda probe: (
            before.say(probe.prompt, PUBLISHED_TOKENS),
            after.say(probe.prompt, PUBLISHED_TOKENS),
        ),
        lambda _, said: placewise(said[0].result().ids, said[1].result().ids),
        none="the unedited model says nothing",
    )


def placewise(earlier: tuple[int, ...], later: tuple[int, ...]) -> float | None:
    """Share of the earlier tokens that stand at the same place later."""
    equal = sum(one == other for one, other in zip(earlier, later, strict=False))
    return equal / len(earlier) if earlier else None


register(
    "refusal",
    refusal_gen,
    leak_gen,
    retain_right_gen,
    retain_same_gen,
    over_refusal_gen,
    refusal_gen_published,
    retain_gen_published,
)
