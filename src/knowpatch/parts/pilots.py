"""Pilot requests: edits that are tried on the unedited model only to calibrate, never to judge.

How large an ordinary edit is (the norm anchor of NAS, arXiv 2602.02543), or how strong a constant
has to be for a model, cannot be told without a few edits. These are counterfactuals of the kinds
that editing benchmarks have, written for this library, and part of no benchmark.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

from knowpatch.errors import OptionError
from knowpatch.request import EditRequest


@cache
def pilots(count: int | None = None) -> tuple[EditRequest, ...]:
    """The first `count` pilot requests, by default all.

    Ten kinds of subject take turns, and the subject opens every second prompt, so that any first
    few are a mix; within the first half no subject comes twice.

    Raises:
        OptionError: fewer than one is asked for, or more than there are.
    """
    text = resources.files("knowpatch").joinpath("assets", "pilots.jsonl").read_text("utf-8")
    found = tuple(EditRequest(**json.loads(line)) for line in text.splitlines())
    if count is not None and not 1 <= count <= len(found):
        raise OptionError(f"pilots: {count} is not a number from 1 to {len(found)}")
    return found[:count]
