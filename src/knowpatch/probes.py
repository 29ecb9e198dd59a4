"""The questions that show what an edit did, made from the request alone.

A person who fixes one fact should not have to think of what else may have moved: the same subject
asked otherwise, the same prompt about other subjects, and a fixed set of control prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources

import torch

from knowpatch.data.case import NEIGHBOUR, REPHRASE, REWRITE, Probe, accepted
from knowpatch.models.passes import Tap
from knowpatch.models.view import ModelView
from knowpatch.parts.spans import subject_span
from knowpatch.request import EditRequest

SUBJECT, CONTROL = "locality.subject", "locality.control"
OUGHT_TO_STAY = (SUBJECT, NEIGHBOUR, CONTROL)

NEIGHBOURS = 8
LEAD_INS = ("It is well known that", "As everyone knows,")
ABOUT = (
    "{} is",
    "{} is best known for",
    "Here is a short description of {}:",
    "Many people talk about {} because",
    "The name {} comes from",
)


@cache
def controls() -> tuple[str, ...]:
    """The control prompts that ship with the library."""
    return _lines("controls.txt")


@cache
def subjects() -> tuple[str, ...]:
    """The names that ship with the library, to ask the same of other subjects."""
    return _lines("subjects.txt")


@cache
def rephrased() -> tuple[str, ...]:
    """The first pilot facts' prompts in other words, each with its subject."""
    return _lines("rephrased.txt")


def _lines(name: str) -> tuple[str, ...]:
    text = resources.files("knowpatch").joinpath("assets", name).read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)


def derive(
    view: ModelView,
    requests: Sequence[EditRequest],
    expected: Sequence[str | None],
    *,
    chat: bool,
) -> list[Probe]:
    """All probes for `requests`, whose promised answers are `expected`.

    The edited prompt and its rephrases are asked both ways where the model has a chat template,
    everything else in the way that was edited.
    """
    ways = (False, True) if view.has_chat else (False,)
    probes: list[Probe] = []
    for number, (request, answer) in enumerate(zip(requests, expected, strict=True)):
        wanted = answer if answer is not None else request.old
        answers = () if wanted is None else accepted(wanted)
        for kind, prompt in _worded(request):
            probes += [Probe(kind, prompt, answers, way, number) for way in ways]
        if request.subject is not None:
            probes += [Probe(SUBJECT, p, (), chat, number) for p in _same_subject(request)]
            near = _neighbours(view, request)
            probes += [Probe(NEIGHBOUR, p, (), chat, number) for p in near]
    edited = {request.prompt.strip() for request in requests}
    probes += [Probe(CONTROL, p, (), chat) for p in controls() if p not in edited]
    return probes


def _worded(request: EditRequest) -> list[tuple[str, str]]:
    """The prompt, and its rephrases: those given, else the prompt behind neutral lead-ins."""
    given = list(request.rephrases) or [f"{lead} {_inside(request)}" for lead in LEAD_INS]
    return [(REWRITE, request.prompt), *((REPHRASE, text) for text in given)]


def _inside(request: EditRequest) -> str:
    """The prompt as the middle of a sentence: its article in lower case, a name as it is."""
    first, _, rest = request.prompt.partition(" ")
    named = (request.subject or "").startswith(first)
    return request.prompt if named or not rest else f"{first[0].lower()}{first[1:]} {rest}"


def _same_subject(request: EditRequest) -> list[str]:
    return [text.replace("{}", request.subject or "") for text in ABOUT]


def _neighbours(view: ModelView, request: EditRequest) -> list[str]:
    """The prompt about other subjects: those that the model itself holds to be most alike."""
    subject = request.subject or ""
    others = [name for name in subjects() if name.lower() not in request.prompt.lower()]
    start, stop = subject_span(request.prompt, subject)
    before = request.prompt[:start]
    if before.lower().endswith("the "):
        others = [name.removeprefix("The ") for name in others]
    near = _most_alike(view, subject, others)[:NEIGHBOURS]
    return [f"{before}{name}{request.prompt[stop:]}" for name in near]


def _most_alike(view: ModelView, subject: str, others: Sequence[str]) -> list[str]:
    """`others` by the cosine of their last token's state, halfway up, with the subject's."""
    block = view.roles.blocks[len(view.roles.blocks) // 2].module
    tap = Tap(block, "output")
    rows = [view.encode(f"About {name}").ids for name in [subject, *others]]
    run = view.run(rows, taps=[tap])
    states = run.at(tap, [(i, len(row) - 1) for i, row in enumerate(rows)])
    centred = states - states.mean(0)
    alike = torch.nn.functional.cosine_similarity(centred[:1], centred[1:])
    return [others[i] for i in alike.argsort(descending=True).tolist()]
