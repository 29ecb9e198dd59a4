"""Whether a patch fits a model: made for it, of known kinds, and of the right shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from knowpatch.deltas import WeightDelta
from knowpatch.errors import ForeignModelError, PatchError
from knowpatch.models.view import ModelView
from knowpatch.parts.procedures import check_procedure
from knowpatch.parts.rules import check_rule
from knowpatch.parts.wraps import Site, check_wrap
from knowpatch.patch import Patch


def check_fits(
    patch: Patch, view: ModelView, canonical: Mapping[str, str], tied: Sequence[str] = ()
) -> None:
    """Refuse, in one line, a patch that `view`'s model cannot carry.

    Args:
        patch: what is to be applied or held.
        view: the model.
        canonical: from `canonical_names`.
        tied: names of tied parameters that may be changed all the same.

    Raises:
        ForeignModelError: made for another model; PatchError: does not fit.
    """
    made_for, mine = patch.provenance.fingerprint, view.fingerprint
    if made_for != mine:
        raise ForeignModelError(
            f"patch {patch.id[:12]} was made for the model with fingerprint {made_for[:16]}, "
            f"{view.source} has {mine[:16]}; load the model it was made for"
        )
    if patch.rule is not None:
        check_rule(patch.rule)
    if patch.procedure is not None:
        check_procedure(patch.procedure)
    if patch.wraps:
        shapes = _shapes(view)
        for wrap in patch.wraps:
            check_wrap(wrap, shapes, view.source)
    for delta in patch.deltas:
        _check_delta(delta, view, canonical, tied)


def _shapes(view: ModelView) -> dict[Site, dict[str, tuple[int, int]]]:
    """Output and input size of all that a wrap may sit on."""
    found: dict[Site, dict[str, tuple[int, int]]] = {"map": {}, "feed-forward": {}}
    size = view.roles.hidden_size
    for block in view.roles.blocks:
        for role in block.linears.values():
            out, into = role.oriented(view.parameter(role.address.parameter)).shape
            found["map"][role.module] = int(out), int(into)
        if block.whole_mlp is not None:
            found["feed-forward"][block.whole_mlp] = size, size
    return found


def _check_delta(
    delta: WeightDelta, view: ModelView, canonical: Mapping[str, str], tied: Sequence[str]
) -> None:
    name = delta.address.parameter
    if name not in canonical:
        raise PatchError(f"the patch changes {name!r}, which {view.source} does not have")
    delta.check(tuple(view.parameter(name).shape))
    shared = [other for other, first in canonical.items() if first == canonical[name]]
    if len(shared) > 1 and name not in tied:
        raise PatchError(
            f"{name} is tied ({' = '.join(shared)}): changing it changes all of them; "
            f"allow it by name: tied=[{name!r}]"
        )
    stored = view.identity.stored_digest(name)
    if delta.base and stored and stored != delta.base:
        raise ForeignModelError(
            f"the stored tensor {name} of {view.source} ({stored[:16]}) is not the one "
            f"the patch was made on ({delta.base[:16]})"
        )


def canonical_names(model: Any) -> dict[str, str]:
    """Each parameter's name to the first name of the same parameter, so that tied ones are one."""
    first: dict[Any, str] = {}
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # A quantised tensor has no address of its own; it is tied where it is one object.
        key = (parameter.data_ptr(), tuple(parameter.shape)) if parameter.data_ptr() else parameter
        names[name] = first.setdefault(key, name) if parameter.numel() else name
    return names


def beyond_weights(patch: Patch) -> str | None:
    """What a patch does that no weight can carry; None where it only changes weights."""
    if patch.rule is not None:
        return "is a prompt rule"
    if patch.procedure is not None:
        return "answers by a procedure"
    return "acts while the model runs" if patch.wraps else None
