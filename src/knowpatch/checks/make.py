"""A first suite from edits: what they were to change, and what the model knew beside it.

The neighbours and control prompts that show what an edit moved (probes.py) become questions that
must keep their answers: those of which the unedited model is sure, up to where its answer first
pauses. A person then strikes out what does not matter and adds what does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest

from knowpatch.ask import Ask
from knowpatch.checks.suite import Change, Keep, MultipleChoice, Perplexity, Suite, Thresholds
from knowpatch.data.case import NEIGHBOUR
from knowpatch.edited import EditedModel
from knowpatch.editing import bare, choose
from knowpatch.effects import ANSWER_TOKENS
from knowpatch.errors import OptionError
from knowpatch.patch import Patch
from knowpatch.probes import CONTROL, derive
from knowpatch.progress import Progress, silent
from knowpatch.request import EditRequest

MOST_EDITED, MOST_KEPT = 24, 60
"""Edited facts whose neighbours are asked, the newest ones; questions that must keep an answer."""
SURE = 0.5
"""Mean probability of an answer's tokens (geometric), from which on the model answered."""
PAUSE = re.compile(r"[,;:!?\n(]|\.(?!\d)")
LEAST_KEPT, RISE, FALL = 0.9, 0.05, 0.05
"""Thresholds of a first suite."""


def first_suite(
    model: EditedModel,
    patches: Sequence[Patch],
    *,
    questions: int | None = None,
    progress: Progress = silent,
) -> Suite:
    """A suite of what these patches were to change, and of what the unedited model answers.

    Args:
        model: the model, whatever is live on it.
        patches: the edits, in order: of two about the same question the later one counts.
        questions: how many general questions are asked, if any.
        progress: told how far the asking is.
    """
    change = _changes(patches)
    edited = {one.prompt for one in change}
    requests = [request for patch in patches for request in patch.provenance.requests]
    with bare(model):
        probes = derive(model.view, newest := requests[-MOST_EDITED:], _none(newest), chat=False)
        near, controls = (
            [p.prompt for p in probes if p.kind == kind and p.prompt not in edited]
            for kind in (NEIGHBOUR, CONTROL)
        )
        keep = _known(model, [*_in_turn(near, controls)], progress)
    return Suite(
        change=change,
        keep=keep,
        thresholds=Thresholds(keep=LEAST_KEPT),
        perplexity=Perplexity(rise=RISE),
        multiple_choice=MultipleChoice(fall=FALL, questions=questions) if questions else None,
    )


def _none(requests: Sequence[EditRequest]) -> list[None]:
    """No promised answers: those are in `change`."""
    return [None] * len(requests)


def _in_turn(*lists: Sequence[str]) -> Iterator[str]:
    """One of each list after the other, each text once."""
    mixed = chain.from_iterable(zip_longest(*lists))
    return iter(dict.fromkeys(text for text in mixed if text is not None))


def _changes(patches: Sequence[Patch]) -> tuple[Change, ...]:
    found: dict[tuple[str, bool], Change] = {}
    for patch in patches:
        chat = bool(patch.provenance.config.get("chat", False))
        for request in patch.provenance.requests:
            place = request.prompt.strip(), chat
            found.pop(place, None)
            if one := _change(patch, request, chat=chat):
                found[place] = one
    return tuple(found.values())


def _change(patch: Patch, request: EditRequest, *, chat: bool) -> Change | None:
    """What an edit promised; None where that is only that an answer is gone, and it is not known
    which."""
    made = patch.provenance
    promised: str | None
    try:
        method = choose(made.method, made.config, seed=made.seed)
        promised = method.expected(request)
    except OptionError:  # a method of someone else's: its request says enough
        promised = request.target
    gone = (request.old,) if request.old and request.kind == "erase" else ()
    answer = () if promised is None else (promised,)
    if not answer and not gone:
        return None
    return Change(prompt=request.prompt, answer=answer, gone=gone, chat=chat)


def _known(model: EditedModel, prompts: Sequence[str], progress: Progress) -> tuple[Keep, ...]:
    """The first of these prompts that the model answers and is sure of, with the answers."""
    ask = Ask(model, progress=progress)
    said = [ask.generate(p, max_new_tokens=ANSWER_TOKENS, patches=()) for p in prompts]
    answers = [_beginning(one.result().text) for one in said]
    pairs = [(p, a) for p, a in zip(prompts, answers, strict=True) if a]
    scored = [ask.score(prompt, answer, patches=()) for prompt, answer in pairs]
    sure = [
        Keep(prompt=prompt, answer=(answer,))
        for (prompt, answer), one in zip(pairs, scored, strict=True)
        if all(one.result().correct) and one.result().mean_logprob >= math.log(SURE)
    ]
    return tuple(sure[:MOST_KEPT])


def _beginning(text: str) -> str:
    """An answer up to where it first pauses; empty where it says nothing."""
    first = PAUSE.split(text.strip(), maxsplit=1)[0].strip()
    return first if any(letter.isalnum() for letter in first) else ""
