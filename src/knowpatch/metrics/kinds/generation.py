"""Free answers that end by themselves: success, rephrases, portability and locality.

"The Mirage of Model Editing" (arXiv 2502.11177): the model answers greedily, nobody tells it the
length or the beginning, and the answer up to its natural stop (text.py) is compared: equal after
normalisation (`_exact`), or containing an accepted answer as whole words and, where an old answer
is known, not that one too (`_contains`). A text that goes on and contradicts itself still contains
the answer: the truth lies between the two, see judge.py. Where a fact is erased the wanted answer
is the refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from knowpatch.data.case import LOCALITY, PORTABILITY, REPHRASE, REWRITE, Case, Probe
from knowpatch.metrics.asker import Asker
from knowpatch.metrics.metric import Result, metric, register
from knowpatch.metrics.queries import both, compared, request_of
from knowpatch.metrics.text import (
    REFUSALS,
    contains_any,
    equals_any,
    natural_stop,
    normalise,
)

Right = Callable[[str, Sequence[str], str | None], bool]


def _exact(text: str, answers: Sequence[str], old: str | None) -> bool:
    return equals_any(natural_stop(text), answers)


def _contains(text: str, answers: Sequence[str], old: str | None) -> bool:
    return contains_any(natural_stop(text), answers, old)


def _wanted(case: Case, probe: Probe) -> tuple[tuple[str, ...], str | None]:
    """What the edit wants said to the edited prompt or a rephrase, and the old answer."""
    request = request_of(case, probe)
    if request is None:
        return probe.aliases, None
    if request.kind == "erase":
        return (request.target, *REFUSALS), request.old
    return probe.aliases, request.old


def _said(
    case: Case, kind: str, before: Asker, after: Asker, right: Right, *, edited: bool = True
) -> Result | None:
    """Both models' free answers; `edited` where the request says what is wanted."""

    def wanted(probe: Probe) -> tuple[tuple[str, ...], str | None]:
        return _wanted(case, probe) if edited else (probe.aliases, None)

    return both(
        case,
        kind,
        (before, after),
        lambda model, probe: model.say(probe.prompt) if any(wanted(probe)[0]) else None,
        lambda probe, said: float(right(said.result().text, *wanted(probe))),
    )


@metric(protocol="free generation", about="the free answer is the target, edited prompt")
def success_gen_exact(case: Case, before: Asker, after: Asker) -> Result | None:
    return _said(case, REWRITE, before, after, _exact)


@metric(protocol="free generation", about="the free answer has the target in it, edited prompt")
def success_gen_contains(case: Case, before: Asker, after: Asker) -> Result | None:
    return _said(case, REWRITE, before, after, _contains)


@metric(protocol="free generation", about="the free answer is the target, rephrases")
def rephrase_gen_exact(case: Case, before: Asker, after: Asker) -> Result | None:
    return _said(case, REPHRASE, before, after, _exact)


@metric(protocol="free generation", about="the free answer has the target in it, rephrases")
def rephrase_gen_contains(case: Case, before: Asker, after: Asker) -> Result | None:
    return _said(case, REPHRASE, before, after, _contains)


@metric(protocol="free generation", about="the free answer has an accepted one in it, what follows")
def portability_gen_contains(case: Case, before: Asker, after: Asker) -> Result | None:
    return _said(case, PORTABILITY, before, after, _contains, edited=False)


@metric(protocol="free generation", about="the free answer says the same as before, locality")
def locality_gen_same(case: Case, before: Asker, after: Asker) -> Result | None:
    return compared(
        case,
        LOCALITY,
        lambda probe: (before.say(probe.prompt), after.say(probe.prompt)),
        lambda _, said: float(_plain(said[0].result().text) == _plain(said[1].result().text)),
    )


def _plain(text: str) -> str:
    return normalise(natural_stop(text))


@metric(
    protocol="free generation",
    about="of queries answered rightly before, share still answered rightly, locality",
)
def locality_gen_right(case: Case, before: Asker, after: Asker) -> Result | None:
    def right(probe: Probe, text: str) -> bool:
        return _contains(text, probe.aliases, None)

    return compared(
        case,
        LOCALITY,
        lambda p: (before.say(p.prompt), after.say(p.prompt)) if any(p.aliases) else None,
        lambda p, said: (
            float(right(p, said[1].result().text)) if right(p, said[0].result().text) else None
        ),
        none="the unedited model answers none of the queries rightly",
    )


register(
    "generation",
    success_gen_exact,
    success_gen_contains,
    rephrase_gen_exact,
    rephrase_gen_contains,
    portability_gen_contains,
    locality_gen_same,
    locality_gen_right,
)
