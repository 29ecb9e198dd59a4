"""The whole of an edit in two calls: `load` a model, `edit` it into a patch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from knowpatch.deltas import is_finite
from knowpatch.edited import EditedModel
from knowpatch.errors import EditError, OptionError
from knowpatch.method import METHODS, EditMethod
from knowpatch.methods import DEFAULT
from knowpatch.models.beside import session_of
from knowpatch.models.load import load as load_view
from knowpatch.models.roles import ROLES
from knowpatch.models.view import ModelView
from knowpatch.patch import Patch
from knowpatch.progress import Progress, silent
from knowpatch.request import EditRequest

log = logging.getLogger(__name__)


def load(
    name: str | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = silent,
) -> EditedModel:
    """Load a model to edit.

    Args:
        name: a hub id, a folder, a GGUF file, or None for the bundled SmolLM2-135M-Instruct.
        device: auto, cpu, cuda or mps.
        dtype: auto, float32, bfloat16, stored (as in the checkpoint), or 8bit.
        progress: told how far a conversion is.

    Raises:
        ModelError: nothing there, nothing loadable, or not a decoder; OptionError: device, dtype.
    """
    view = load_view(name, device=device, dtype=dtype, progress=progress)
    refused = unable(view)
    if refused:
        able = [name for name in METHODS.names() if name not in refused]
        reason = next(iter(refused.values()))
        log.warning(
            "%s cannot be edited by %s: %s; methods that can: %s",
            view.source,
            ", ".join(refused),
            reason,
            ", ".join(able) or "none",
        )
    return EditedModel(view)


def unable(view: ModelView) -> dict[str, str]:
    """The methods that cannot edit this model as they come, with the reason."""
    lacking = {role: view.roles.lacks(role) for role in ROLES}
    if not any(lacking.values()):
        return {}
    refused = {}
    for name in METHODS.names():
        for role in METHODS.get(name).roles:
            if reason := lacking[role]:
                refused[name] = reason
    return refused


@dataclass
class Seconds:
    """How long the parts of an edit took."""

    prepare: float = 0.0
    edit: float = 0.0


def choose(
    method: str | None,
    options: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> EditMethod:
    """The method called `method` (by default the library's own choice), configured.

    Raises:
        OptionError: an unknown method or option, or a value that is not allowed.
    """
    cls = METHODS.get(method or DEFAULT)
    return cls(cls.configure(options or {}), seed=seed, progress=progress)


def edit(
    model: EditedModel,
    requests: EditRequest | Sequence[EditRequest],
    *,
    method: str | EditMethod | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress = silent,
    seconds: Seconds | None = None,
) -> Patch:
    """Compute the patch for `requests`; the model stays as it is until the patch is applied.

    Args:
        model: what to edit, with whatever patches are live on it.
        requests: one or several.
        method: a method's name, or a configured method.
        options: of the method, by name, where `method` is a name.
        seed: of everything that is sampled.
        progress: told how far the work is.
        seconds: filled with how long preparing and editing took.

    Raises:
        InputError: requests, options or a model that the method cannot work with.
        EditError: the edit could not be computed.
    """
    asked = [requests] if isinstance(requests, EditRequest) else list(requests)
    if not isinstance(method, EditMethod):
        method = choose(method, options, seed=seed, progress=progress)
    start = perf_counter()
    prepared = _prepare(model, asked, method)
    ready = perf_counter()
    patch = method.edit(model.view, asked, prepared, _state(model, method))
    _check_finite(patch)
    if seconds is not None:
        seconds.prepare, seconds.edit = ready - start, perf_counter() - ready
    return patch


def edit_each(
    model: EditedModel, requests: Sequence[EditRequest], *, method: EditMethod
) -> list[Patch]:
    """A patch for each request alone, as `edit` would make it; computed together where possible.

    Raises:
        InputError, EditError: as `edit`.
    """
    prepared = _prepare(model, requests, method)
    patches = method.edit_each(model.view, requests, prepared, _state(model, method))
    for patch in patches:
        _check_finite(patch)
    return patches


def _prepare(model: EditedModel, requests: Sequence[EditRequest], method: EditMethod) -> Any:
    if any(session_of(model.model)):
        raise OptionError("an edit is made on a model without a session: leave the session first")
    method.check_requests(requests)
    method.check(model.view)
    return method.prepare(model.view)


def _state(model: EditedModel, method: EditMethod) -> Any:
    """The method's running state from its patches that are live."""
    return method.fold([patch for patch in model.live if patch.provenance.method == method.name])


def _check_finite(patch: Patch) -> None:
    for delta in patch.deltas:
        if not all(is_finite(tensor) for tensor in delta.change.tensors().values()):
            raise EditError(
                f"{patch.provenance.method} came to a change that is not finite: use a smaller "
                "learning_rate or clamp, or load the model in float32"
            )
