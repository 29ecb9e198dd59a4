"""Beside: patches computed next to an untouched base, each row of a batch with its own.

A weight change is a branch: what it adds to a map's output is computed from the map's input, in
float32. A wrap decides once for each row, when the row's prompt is read, or token by token (see
parts/wraps.py); where it goes on acting in later steps of a generation, its decision is kept with
the attention's cache.
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
from knowpatch.models.reading import Reading
from knowpatch.models.sites import Kept, Site, carried_wraps, listeners
from knowpatch.parts.wraps import Decision, refuse_pieces
from knowpatch.patch import Patch

Rows = tuple[tuple[Patch, ...], ...]

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
        model: the transformers model.
        rows: the patches of each row of the session.
        standing: live patches whose wraps every row carries, before its own.
        lasts: for each row of the batch the column of its last prompt token, what was read before
            included; None where no prompt ends in this pass.
        kept: joined wraps, and what was decided for texts that are being written.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Rows,
        standing: Sequence[Patch],
        lasts: Sequence[int] | None,
        kept: Kept,
    ) -> None:
        self._model, self._kept = model, kept
        self._rows: Rows = tuple((*standing, *row) for row in rows)
        self._own: Rows = rows
        self._lasts = torch.tensor(lasts or [])
        self._now = Reading.of(torch.empty(0, 0), {}, self._lasts)
        self._decided: dict[Any, Decision] = {}

    def hooks(self) -> list[Hook]:
        """What to register for the pass, branches before wraps."""
        hooks: list[Hook] = []
        for name, changes in self._changes().items():
            hooks.append(self._registered(name.removesuffix(".weight"), self._branch(changes)))
        sites = self._sites()
        for path in dict.fromkeys(site.source for site in sites if site.source != site.module):
            mine = [site for site in sites if site.source == path]
            hooks.append(self._registered(path, self._deciding(mine)))
        for path in dict.fromkeys(site.module for site in sites):
            mine = [site for site in sites if site.module == path]
            hooks.append(self._registered(path, self._acting(mine)))
        if hooks:
            hooks.insert(
                0, lambda: self._model.register_forward_pre_hook(self._note, with_kwargs=True)
            )
        if any(site.kind.whole() for site in sites):
            hooks.append(self._registered("", self._remember))
        return hooks

    def _registered(self, path: str, function: Callable[..., Any]) -> Hook:
        module = self._model.get_submodule(path)
        return lambda: module.register_forward_hook(function)

    def _note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The pass that begins. Texts that were begun in another pass go on as was decided then."""
        self._now = Reading.of(args[0] if args else kwargs["input_ids"], kwargs, self._lasts)
        if self._now.cache is not None and self._now.begin:
            self._decided = self._kept.decided.get(self._now.cache, self._decided)

    def _remember(self, module: nn.Module, args: Any, output: Any) -> None:
        """What was decided stays with the texts' cache."""
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self._kept.decided[cache] = self._decided

    # -- changes of weights ------------------------------------------------------------------------

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
            into = args[0].reshape(*self._now.shape, -1)
            whole = output.reshape(*self._now.shape, -1)
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
        times = self._now.shape[0] // len(self._own)
        return torch.tensor([row * times + i for row in rows for i in range(times)], device=device)

    # -- wraps -------------------------------------------------------------------------------------

    def _sites(self) -> list[Site]:
        """The joined wraps of each group of rows that carry the same patches."""
        groups: dict[tuple[Patch, ...], list[int]] = {}
        for number, patches in enumerate(self._rows):
            wrapping = tuple(patch for patch in patches if carried_wraps([patch]))
            if wrapping:
                groups.setdefault(wrapping, []).append(number)
        sites = []
        for patches, rows in groups.items():
            pairs = [(patch, wrap) for patch in patches for wrap in carried_wraps([patch])]
            for module in dict.fromkeys(wrap.module for _, wrap in pairs):
                mine = [pair for pair in pairs if pair[1].module == module]
                sites += self._kept.sites(module, mine, tuple(rows))
        return sites

    def _deciding(self, sites: Sequence[Site]) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            for site in sites:
                self._decide(site, args[0].reshape(*self._now.shape, -1))

        return look

    def _acting(self, sites: Sequence[Site]) -> Any:
        def act(module: nn.Module, args: Any, output: Any) -> Any:
            into = args[0].reshape(*self._now.shape, -1)
            whole = output.reshape(*self._now.shape, -1)
            for site in sites:
                if site.source == site.module:
                    self._decide(site, into)
                whole = self._act(site, into, whole)
            return whole.reshape(output.shape)

        return act

    def _decide(self, site: Site, into_BTI: Tensor) -> None:
        """Settle what each row does, once, when its prompt is read; or each token."""
        kind, rows, columns = site.kind, self._index(site.rows, into_BTI.device), None
        if kind.reads == "last" and not kind.whole():
            rows, columns = self._now.ends(rows)
        key = (*site.key, *rows.tolist())
        if not len(rows) or (kind.reads != "token" and key in self._decided):
            return
        if kind.whole() and not self._now.holds_prompts:
            raise refuse_pieces(kind.kind)
        tokens = self._now.tokens(into_BTI)
        tokens = tokens.of(rows) if columns is None else tokens.at(rows, columns)
        self._decided[key] = decision = kind.decide(tokens)
        for heard in listeners():
            heard += site.firings(decision, rows)

    def _act(self, site: Site, into_BTI: Tensor, whole_BTD: Tensor) -> Tensor:
        kind, rows = site.kind, self._index(site.rows, whole_BTD.device)
        if kind.acts == "last":
            rows, columns = self._now.ends(rows)
        if not len(rows) or (kind.acts == "prompt" and self._now.begin):
            return whole_BTD  # what the prompt left in the attention's cache holds the decision
        decision, tokens = self._decided[*site.key, *rows.tolist()], self._now.tokens(into_BTI)
        if kind.acts == "last":
            outputs_B1D = whole_BTD[rows, columns][:, None]
            acted = kind.act(tokens.at(rows, columns), outputs_B1D, decision)[:, 0]
            return whole_BTD.index_put((rows, columns), acted.to(whole_BTD.dtype))
        mine, outputs_BTD = tokens.of(rows), whole_BTD[rows]
        acted = kind.act(mine, outputs_BTD, decision).to(whole_BTD.dtype)
        if kind.acts == "prompt":
            acted = torch.where(mine.prompt_BT[..., None], acted, outputs_BTD)
        return acted if len(rows) == len(whole_BTD) else whole_BTD.index_put((rows,), acted)


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
