"""The whole of an edit in two calls: `load` a model, `edit` it into a patch."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from knowpatch.deltas import is_finite
from knowpatch.edited import EditedModel
from knowpatch.errors import EditError, InputError, OptionError, RequestError
from knowpatch.method import METHODS, EditMethod
from knowpatch.methods import DEFAULT
from knowpatch.models.beside import session_of
from knowpatch.models.load import load as load_view
from knowpatch.models.roles import ROLES, WHOLE
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
    lacking = {role: view.roles.lacks(role) for role in (*ROLES, WHOLE)}
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
    ready = prepare(model, method, asked)
    between = perf_counter()
    patch = method.edit(model.view, asked, ready.prepared, ready.state)
    _check_finite(patch)
    if seconds is not None:
        seconds.prepare, seconds.edit = between - start, perf_counter() - between
    return patch


def edit_in_turn(
    model: EditedModel,
    requests: Sequence[EditRequest],
    folder: Path,
    *,
    method: EditMethod,
    progress: Progress = silent,
    seconds: Seconds | None = None,
) -> list[Patch]:
    """A patch for each request, each made on the model with the earlier ones live.

    Patches are kept in `folder` (000001.safetensors, ...) as they come, and those that are there
    already are not made again: a run that was stopped goes on. The model is given back as it was.

    Raises:
        InputError, EditError: as `edit`, naming the request; or the folder holds other patches.
    """
    if model.view.quantised:
        raise OptionError(
            "edits one after the other need weights that can be written: load the model in float32 "
            "or bfloat16"
        )
    for request in requests:
        method.check_requests([request])
    paths = numbered(folder, len(requests))
    if others := sorted(set(folder.glob("*.safetensors")) - set(paths)):
        raise InputError(f"{others[0]}: is no patch of these requests; name another folder")
    start = perf_counter()
    prepare(model, method)
    between = perf_counter()
    patches: list[Patch] = []
    with model.growing() as add:
        for path, request in zip(paths, requests, strict=True):
            progress("editing one after the other", len(patches), len(requests))
            patch = _found(path, model, method, request)
            if patch is None:
                patch = _next(model, method, request, len(patches) + 1)
                patch.save(path)
            patches.append(patch)
            add(patch)
    progress("editing one after the other", len(requests), len(requests))
    if seconds is not None:
        seconds.prepare, seconds.edit = between - start, perf_counter() - between
    return patches


def numbered(folder: Path, count: int) -> list[Path]:
    """The files of so many patches that were made one after the other."""
    return [folder / f"{number:06}.safetensors" for number in range(1, count + 1)]


def _next(model: EditedModel, method: EditMethod, request: EditRequest, number: int) -> Patch:
    """The patch of one of several requests; an error names it."""
    try:
        patch = edit(model, request, method=method)
    except EditError as error:
        raise EditError(f"request {number}, {request.prompt!r}: {error}") from None
    if patch in model.live:
        raise RequestError(f"request {number}, {request.prompt!r}: repeats an earlier one")
    return patch


def _found(
    path: Path, model: EditedModel, method: EditMethod, request: EditRequest
) -> Patch | None:
    """The patch at `path`, if one is there; InputError if it is not this request's."""
    if not path.exists():
        return None
    patch = Patch.load(path)
    made = patch.provenance
    same = (method.name, method.config.model_dump(mode="json"), method.seed, (request,))
    if (made.method, made.config, made.seed, made.requests) != same:
        raise InputError(f"{path}: is the patch of another edit; name another folder")
    if made.fingerprint != model.view.fingerprint:
        raise InputError(f"{path}: was made for another model; name another folder")
    return patch


def room(model: EditedModel, method: EditMethod, patches: Sequence[Patch] = ()) -> int | None:
    """How many more facts the method could write after `patches`; None where it knows no limit."""
    ready = prepare(model, method)
    state = ready.state
    for patch in patches:
        state = method.fold(ready.prepared, state, patch)
    return method.room(ready.prepared, state)


def edit_each(
    model: EditedModel, requests: Sequence[EditRequest], *, method: EditMethod
) -> list[Patch]:
    """A patch for each request alone, as `edit` would make it; computed together where possible.

    Raises:
        InputError, EditError: as `edit`.
    """
    ready = prepare(model, method, requests)
    patches = method.edit_each(model.view, requests, ready.prepared, ready.state)
    for patch in patches:
        _check_finite(patch)
    return patches


@dataclass
class Ready:
    """What a method has at hand for a model: what it prepared, and its state.

    Attributes:
        key: the method, its options and its seed.
        prepared: as `prepare` gave it.
        state: folded from the live patches of the method, whose ids are `folded`.
    """

    key: tuple[str, str, int]
    prepared: Any
    state: Any = None
    folded: tuple[str, ...] = ()

    def follow(self, method: EditMethod, live: Sequence[Patch]) -> None:
        """Bring the state up to the live patches: on from it where they only became more."""
        mine = [patch for patch in live if patch.provenance.method == method.name]
        ids = tuple(patch.id for patch in mine)
        if ids[: len(self.folded)] != self.folded:
            self.state, self.folded = None, ()
        for patch in mine[len(self.folded) :]:
            self.state = method.fold(self.prepared, self.state, patch)
        self.folded = ids


def prepare(
    model: EditedModel, method: EditMethod, requests: Sequence[EditRequest] | None = None
) -> Ready:
    """What the method needs for this model, made where it is not there; for requests, checked.

    What edits need of a model is that of the model as it came: live patches are taken back while
    it is made.

    Raises:
        InputError: requests or a model that the method cannot work with.
    """
    if any(session_of(model.model)):
        raise OptionError("an edit is made on a model without a session: leave the session first")
    if requests is not None:
        method.check_requests(requests)
    method.check(model.view)
    key = (method.name, method.config.model_dump_json(), method.seed)
    ready: Ready | None = model.ready
    if ready is None or ready.key != key:
        with bare(model):
            model.ready = ready = Ready(key, method.prepare(model.view))
    ready.follow(method, model.live)
    return ready


@contextlib.contextmanager
def bare(model: EditedModel) -> Iterator[None]:
    """The model as it came, within the block."""
    live = model.live
    with model.view.lock:  # no other thread is served the bare model meanwhile
        model.drop(*(patch.id for patch in live))
        try:
            yield
        finally:
            for patch in live:
                model.apply(patch, tied=[delta.address.parameter for delta in patch.deltas])


def _check_finite(patch: Patch) -> None:
    for delta in patch.deltas:
        if not all(is_finite(tensor) for tensor in delta.change.tensors().values()):
            raise EditError(
                f"{patch.provenance.method} came to a change that is not finite: use a smaller "
                "learning_rate or clamp, or load the model in float32"
            )
