"""Forget: a memory of facts without some of them; what is left stays as it was, bit for bit.

It is for patches that hold facts side by side (a prompt rule, a procedure or wraps of kinds that
can let one go). Weights hold all facts of an edit together: such a patch is made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from knowpatch.errors import RequestError, did_you_mean, not_apart
from knowpatch.parts import procedures, rules, wraps
from knowpatch.patch import Patch
from knowpatch.request import EditRequest


def called(request: EditRequest) -> str:
    """What a fact is called: its request's id, else its prompt."""
    return request.id if request.id is not None else request.prompt


def without(patch: Patch, names: Sequence[str]) -> Patch:
    """The patch without the facts of these names, as `called` gives them.

    Of requests with one prompt the last one is in force; with it, those that it replaced go too.

    Raises:
        RequestError: a name that none has, or nothing would be left.
        PatchError: the facts of this patch cannot be taken apart.
    """
    requests = patch.provenance.requests
    known = [called(request) for request in requests]
    for name in names:
        if name not in known:
            raise RequestError(f"no fact {name!r} in this patch: {did_you_mean(name, known)}")
    newest = {request.prompt: called(request) for request in requests}
    gone = {prompt for prompt, name in newest.items() if name in names}
    left = tuple(r for r in requests if called(r) not in names and r.prompt not in gone)
    if not left:
        raise RequestError("no fact would be left: take the whole patch back instead")
    if patch.deltas or patch.traces:
        raise not_apart(f"{patch.provenance.method} (weights)")
    rule, procedure = patch.rule, patch.procedure
    return replace(
        patch,
        provenance=patch.provenance.model_copy(update={"requests": left}),
        rule=rule and rules.kind_of(rule).without(rule, gone),
        procedure=procedure and procedures.kind_of(procedure).without(procedure, gone),
        wraps=tuple(wraps.kind_of(wrap).without(wrap, gone) for wrap in patch.wraps),
    )
