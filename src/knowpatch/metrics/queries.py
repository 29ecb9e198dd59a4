"""Queries: asking one thing about each probe of a kind, and making values of the answers.

Most metrics differ only in what they ask of a probe and in what they make of the answer; the rest
is here. It knows kinds of probes, never a dataset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from knowpatch.data.case import REWRITE, Case, Probe
from knowpatch.metrics.asker import Asker
from knowpatch.metrics.metric import Result, Score, Values
from knowpatch.request import EditRequest

A = TypeVar("A")
Asked = dict[str, list[tuple[Probe, A]]]
"""Sub-kind to its probes, each with what was asked about it."""


def per_probe(case: Case, kind: str, ask: Callable[[Probe], A | None]) -> Asked[A]:
    """Ask about each probe of `kind`; those about which `ask` gives None are left out."""
    found: Asked[A] = {}
    for sub, probes in case.by_sub_kind(kind).items():
        asked = [(probe, question) for probe in probes if (question := ask(probe)) is not None]
        if asked:
            found[sub] = asked
    return found


def values_of(asked: Asked[A], of: Callable[[Probe, A], float | None]) -> Values:
    """The values of what was asked; queries, and sub-kinds, without one are left out."""
    found: dict[str, list[float]] = {}
    for sub, queries in asked.items():
        values = [value for probe, answer in queries if (value := of(probe, answer)) is not None]
        if values:
            found[sub] = values
    return found


def both(
    case: Case,
    kind: str,
    models: tuple[Asker, Asker],
    ask: Callable[[Asker, Probe], A | None],
    of: Callable[[Probe, A], float | None],
    *,
    none: str = "no query has a value",
) -> Result | None:
    """The same measured of both models, (before, after); `none` says why there may be no value."""
    old, new = (per_probe(case, kind, partial(ask, model)) for model in models)
    if not new:
        return None

    def result() -> Score:
        before, after = values_of(old, of), values_of(new, of)
        return Score(after, before) if after else Score.none(none, before)

    return result


def compared(
    case: Case,
    kind: str,
    ask: Callable[[Probe], A | None],
    of: Callable[[Probe, A], float | None],
    *,
    none: str = "no query has a value",
) -> Result | None:
    """A comparison of the two models, both asked by `ask`; there is no value before."""
    asked = per_probe(case, kind, ask)
    if not asked:
        return None

    def result() -> Score:
        after = values_of(asked, of)
        return Score(after) if after else Score.none(none)

    return result


def forcible(answers: Sequence[str]) -> tuple[str, ...]:
    """The answers that can be forced: empty ones cannot."""
    return tuple(answer for answer in answers if answer.strip())


def request_of(case: Case, probe: Probe) -> EditRequest | None:
    """The request that a probe belongs to, if it is one."""
    if probe.request is not None:
        return case.requests[probe.request]
    return case.requests[0] if len(case.requests) == 1 else None


def edits(case: Case) -> list[tuple[Probe, EditRequest]]:
    """The edited prompts, with their requests, where a new answer is taught (not an erasure)."""
    pairs = [(probe, request_of(case, probe)) for probe in case.of(REWRITE)]
    return [(p, request) for p, request in pairs if request and request.kind != "erase"]
