"""Beside: patches computed next to an untouched base, each row of a batch with its own.

A weight change is a branch: what it adds to a map's output is computed from the map's input, in
float32. A wrap decides once for each row, when the row's prompt is read, and acts at the last
prompt token; in later steps of a generation the attention's cache remembers that it did.
Axes: B rows of a pass, R rows of a session (each stands for B / R adjacent rows), T columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from knowpatch.deltas import WeightDelta
from knowpatch.errors import OptionError, PatchError
from knowpatch.models.hooks import Hook
from knowpatch.models.roles import Roles
from knowpatch.parts.wraps import Joined, join
from knowpatch.patch import Patch

Rows = tuple[tuple[Patch, ...], ...]

KEPT = 256
"""Joined wraps that a model keeps at most."""

_SESSIONS: ContextVar[tuple[tuple[object, Rows], ...]] = ContextVar("sessions", default=())


def session_of(model: nn.Module) -> Rows:
    """The patches of each row in this context's session on `model`; one empty row without one."""
    return next((rows for mine, rows in reversed(_SESSIONS.get()) if mine is model), ((),))


@contextlib.contextmanager
def session(model: nn.Module, rows: Rows) -> Iterator[None]:
    """Within the block (and this context only) row i of every pass carries rows[i]."""
    token = _SESSIONS.set((*_SESSIONS.get(), (model, rows)))
    try:
        yield
    finally:
        _SESSIONS.reset(token)


def repeats(rows: Rows, batch: int) -> int:
    """How many adjacent rows of a batch each row of a session stands for.

    Raises:
        OptionError: the batch is not a multiple of the session.
    """
    if batch % len(rows):
        raise OptionError(
            f"a session of {len(rows)} rows cannot run a batch of {batch}: give a batch of as many "
            "rows, or a session of one row for all"
        )
    return batch // len(rows)


class Beside:
    """What one pass (or one generation) computes beside the base.

    Args:
        model: the transformers model; roles: where its parts sit.
        rows: the patches of each row of the session.
        standing: live patches whose wraps every row carries, before its own.
        lasts: for each row of the batch the column of its last prompt token, what was read before
            included; None where no prompt ends in this pass.
        joined: a cache of joined wraps.
    """

    def __init__(
        self,
        model: nn.Module,
        roles: Roles,
        rows: Rows,
        standing: Sequence[Patch],
        lasts: Sequence[int] | None,
        joined: dict[Any, list[Joined]],
    ) -> None:
        self._model, self._roles, self._cache = model, roles, joined
        self._rows: Rows = tuple((*standing, *row) for row in rows)
        self._own: Rows = rows
        self._lasts = torch.tensor(lasts or [])
        self._shape = torch.Size((0, 0))
        self._begin = 0
        self._decided: dict[Any, Tensor] = {}

    def hooks(self) -> list[Hook]:
        """What to register for the pass, branches before wraps."""
        hooks: list[Hook] = []
        for name, changes in self._changes().items():
            hooks.append(self._registered(name.removesuffix(".weight"), self._branch(changes)))
        for module, wraps in self._wraps().items() if len(self._lasts) else ():
            hooks.append(self._registered(module, self._wrap(module, wraps)))
        if hooks:
            hooks.insert(
                0, lambda: self._model.register_forward_pre_hook(self._note, with_kwargs=True)
            )
        return hooks

    def _registered(self, path: str, function: Callable[..., Any]) -> Hook:
        module = self._model.get_submodule(path)
        return lambda: module.register_forward_hook(function)

    def _note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The pass that begins: its shape (B, T), which some models flatten, and first column."""
        self._shape = (args[0] if args else kwargs["input_ids"]).shape
        past = kwargs.get("past_key_values")
        self._begin = 0 if past is None else int(past.get_seq_length())

    def _changes(self) -> dict[str, list[tuple[WeightDelta, list[int]]]]:
        """By parameter: each change, in patch order, and the session rows that carry it."""
        carriers: dict[Patch, list[int]] = {}
        for number, patches in enumerate(self._own):
            for patch in patches:
                carriers.setdefault(patch, []).append(number)
        found: dict[str, list[tuple[WeightDelta, list[int]]]] = {}
        for patch, rows in carriers.items():
            for delta in patch.deltas:
                found.setdefault(delta.address.parameter, []).append((delta, rows))
        return found

    def _branch(self, changes: Sequence[tuple[WeightDelta, list[int]]]) -> Any:
        def add(module: nn.Module, args: Any, output: Any) -> Any:
            into = args[0].reshape(*self._shape, -1)
            whole = output.reshape(*self._shape, -1)
            stored_in_out = isinstance(module, Conv1D)
            for delta, rows in changes:
                if len(rows) == len(self._own):
                    added = delta.through(into, whole.shape[-1], stored_in_out)
                    whole = whole + added.to(whole.dtype)
                else:
                    index = self._index(rows, whole.device)
                    added = delta.through(into[index], whole.shape[-1], stored_in_out)
                    whole = whole.index_add(0, index, added.to(whole.dtype))
            return whole.reshape(output.shape)

        return add

    def _index(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """The rows of the pass that these rows of the session stand for."""
        times = self._shape[0] // len(self._own)
        return torch.tensor([row * times + i for row in rows for i in range(times)], device=device)

    def _ends(self, rows: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Of these rows of the session, those of the pass whose prompt ends in it, and where."""
        index = self._index(rows, device)
        times = self._shape[0] // len(self._lasts)
        columns = self._lasts.to(device).repeat_interleave(times)[index] - self._begin
        inside = (columns >= 0) & (columns < self._shape[1])
        return index[inside], columns[inside]

    def _wraps(self) -> dict[str, list[tuple[list[Joined], list[int]]]]:
        """By module: the joined wraps of each group of rows that carry the same patches."""
        groups: dict[tuple[Patch, ...], list[int]] = {}
        for number, patches in enumerate(self._rows):
            wrapping = tuple(patch for patch in patches if patch.wraps)
            if wrapping:
                groups.setdefault(wrapping, []).append(number)
        found: dict[str, list[tuple[list[Joined], list[int]]]] = {}
        for patches, rows in groups.items():
            modules = dict.fromkeys(wrap.module for patch in patches for wrap in patch.wraps)
            for module in modules:
                found.setdefault(module, []).append((self._join(patches, module), rows))
        return found

    def _join(self, patches: tuple[Patch, ...], module: str) -> list[Joined]:
        key = (module, tuple(patch.id for patch in patches))
        if key not in self._cache:
            if len(self._cache) >= KEPT:
                self._cache.pop(next(iter(self._cache)))
            wraps = [wrap for patch in patches for wrap in patch.wraps if wrap.module == module]
            self._cache[key] = join(wraps)
        return self._cache[key]

    def _wrap(self, path: str, groups: Sequence[tuple[list[Joined], list[int]]]) -> Any:
        def act(module: nn.Module, args: Any, output: Any) -> Any:
            into = args[0].reshape(*self._shape, -1)
            whole = output.reshape(*self._shape, -1)
            for number, (joined, rows) in enumerate(groups):
                index, columns = self._ends(rows, whole.device)
                if not len(index):
                    continue  # what the prompt left in the attention's cache holds the decision
                outputs = whole[index, columns]
                for place, one in enumerate(joined):
                    key = (path, number, place, tuple(index.tolist()))
                    if key not in self._decided:
                        self._decided[key] = one.decide(into[index, columns])
                    outputs = one.act(outputs, self._decided[key])
                whole = whole.index_put((index, columns), outputs)
            return whole.reshape(output.shape)

        return act


def check_beside(patch: Patch, model: nn.Module, head: str) -> None:
    """PatchError, in one line, for a change of anything but the weight of a linear map.

    The head is none: it runs at asked places only, where rows cannot be told apart.
    """
    for delta in patch.deltas:
        name = delta.address.parameter
        path, _, kind = name.rpartition(".")
        module = model.get_submodule(path)
        if not isinstance(module, nn.Linear | Conv1D) or kind != "weight" or path == head:
            raise PatchError(
                f"patch {patch.id[:12]} changes {name} of a {type(module).__name__}, which cannot "
                "be computed beside the model; apply it instead"
            )
