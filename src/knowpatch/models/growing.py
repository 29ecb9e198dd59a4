"""Growing: restorations as one batch that grows from block to block.

A restoration changes nothing before its first position t, nor below its first block l. So its S
rows enter at block l with the corrupted states from t on, and read the corrupted keys and values of
what stands before. All restorations that begin at one t run together, each joining the batch where
it begins. The model's own forward runs over one row, whose mask and positions broadcast; the blocks
are given as many rows as there are. It runs in a twin, so nothing on the model is touched.
Axes: R restorations, S draws of noise, N rows, T tokens, C columns from t on, D hidden size, V
vocabulary, H heads of keys, E width of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from knowpatch.models.batch import Batch
from knowpatch.models.hooks import Hook, choosing, registered, seeing_nothing, shifting, tapping
from knowpatch.models.known import Known
from knowpatch.models.passes import Tap
from knowpatch.models.past import Past
from knowpatch.models.restorations import (
    Corrupted,
    Outputs,
    Placed,
    Restoration,
    logprobs_of,
)
from knowpatch.models.twin import twin
from knowpatch.models.view import ModelView
from knowpatch.progress import Progress, silent

Begun = tuple[int, int, int]
"""A restoration's first position, the block that it enters at, and its number."""
TOGETHER, LOGITS = 4096, 1 << 27
"""Tokens that run in one pass at most, and numbers that its logits are."""


class Growing:
    """A corrupted prompt, ready for restorations of outputs of `modules` and of whole blocks.

    Attributes:
        logits_BV: behind the prompt: row 0 clean, then the S corrupted ones; float32.
    """

    def __init__(
        self, view: ModelView, prompt: Corrupted, modules: Sequence[str], *, attention: str
    ) -> None:
        self._view, self._prompt = view, prompt
        self._twin = twin(view.model, attention=attention, weight=view.stand_in(None))
        self._head = self._twin.get_submodule(view.roles.head)
        self._paths = [block.module for block in view.roles.blocks]
        self._blocks = [self._twin.get_submodule(path) for path in self._paths]
        self._block_of = {path: number for number, path in enumerate(self._paths)}
        self._block_of |= {path: view.roles.block_of(path) for path in modules}
        self._read()

    def _read(self) -> None:
        """The clean run and the corrupted ones, as one batch."""
        view, last = self._view, len(self._prompt.ids) - 1
        rows = [self._prompt.ids] * (1 + self._prompt.draws)
        batch = Batch.of(rows, pad=0, side="right", device=view.device)
        noise = self._prompt.shift(view.roles.embedding, 1)
        entry, tapped, whole = Tap(self._paths[0], "input"), dict[Tap, Tensor](), list[Any]()
        taps = [entry, *(Tap(path, "output") for path in self._block_of)]
        part = self._twin.get_submodule
        hooks = [
            shifting(part(noise.module), batch, noise),
            *(tapping(part(tap.module), batch, tap, tapped, None) for tap in taps),
            lambda: self._blocks[0].register_forward_hook(lambda m, args, out: whole.append(out)),
            choosing(self._head, batch, [(row, last) for row in range(len(rows))]),
        ]
        with registered(hooks), torch.no_grad():
            out = self._twin(**batch.inputs(), use_cache=True)
        self.logits_BV: Tensor = out.logits.float()
        self._kept = [(layer.keys[1:], layer.values[1:]) for layer in out.past_key_values.layers]
        self._outputs = Outputs({tap.module: tapped[tap] for tap in taps[1:]})
        self._entering = [tapped[entry], *(self._outputs.by_module[p] for p in self._paths)]
        self._rest = whole[0][1:] if isinstance(whole[0], tuple) else None

    def logprobs(
        self, restorations: Sequence[Restoration], token: int, *, progress: Progress = silent
    ) -> Tensor:
        """log p(token) behind the prompt in every draw of every restoration, (R, S), float32."""
        found_RS = logprobs_of(self.logits_BV[1:], token).repeat(len(restorations), 1)
        felt = [(*self._begin(one), r) for r, one in enumerate(restorations) if self._is_felt(one)]
        past, done = Past.nothing(1, self._view.device), 0
        for position, group in groupby(sorted(felt), itemgetter(0)):
            past = self._read_on(past, position)
            for piece in self._pieces(list(group), position):
                progress("restoring", done, len(felt))
                begun = [(block, restorations[number]) for _, block, number in piece]
                logits_NV = self._run(past, position, begun)
                numbers = [number for _, _, number in piece]
                found_RS[numbers] = logprobs_of(logits_NV, token).view(len(piece), -1)
                done += len(piece)
        progress("restoring", len(felt), len(felt))
        return found_RS

    def _is_felt(self, restoration: Restoration) -> bool:
        """Whether the last position can know: what the last block puts out elsewhere is lost."""
        last, top = len(self._prompt.ids) - 1, len(self._blocks) - 1
        return any(put.position == last or self._block_of[put.module] < top for put in restoration)

    def _begin(self, restoration: Restoration) -> tuple[int, int]:
        """The first position that a restoration changes, and the block that its rows enter at."""
        lowest = min(self._block_of[put.module] for put in restoration)
        inside = any(
            self._block_of[put.module] == lowest and put.module != self._paths[lowest]
            for put in restoration
        )
        return min(put.position for put in restoration), lowest + (not inside)

    def _pieces(self, group: Sequence[Begun], position: int) -> Iterator[Sequence[Begun]]:
        """Restorations that run together: those that begin in neighbouring blocks."""
        draws, columns = self._prompt.draws, len(self._prompt.ids) - position
        rows = min(TOGETHER // columns, LOGITS // self._view.vocabulary)
        size = max(1, rows // draws)
        for start in range(0, len(group), size):
            yield group[start : start + size]

    def _read_on(self, past: Past, position: int) -> Past:
        """The past of one row up to `position`: it says how much was read, not what."""
        with registered([seeing_nothing(self._head)]):
            return past.read(self._twin, [self._prompt.ids[past.columns : position]])

    def _run(self, past: Past, position: int, piece: Sequence[tuple[int, Restoration]]) -> Tensor:
        """Logits behind the prompt (N, V) of restorations, in the order of the blocks they enter.

        Args:
            past: one row, up to `position`.
            position: the first one that runs.
            piece: restorations, each with the block that it enters at.
        """
        first, ids = piece[0][0], self._prompt.ids[position:]
        batch = Batch.of([ids], pad=0, side="right", device=self._view.device)
        hooks = [*self._joining(position, piece), *self._putting(position, piece)]
        hooks.append(lambda: self._head.register_forward_pre_hook(lambda m, a: (a[0][:, -1],)))
        skipped = self._blocks[:first]
        width = len(ids), self._view.roles.hidden_size
        states_1CD = self._entering[0].new_zeros(1, *width)
        output = states_1CD if self._rest is None else (states_1CD, *self._rest)
        ready = self._knowing(skipped, output), self._reading(past, position)
        with ready[0], ready[1], registered(hooks), torch.no_grad():
            logits: Tensor = self._twin(**past.inputs(batch), use_cache=False).logits
        return logits.float()

    def _joining(self, position: int, piece: Sequence[tuple[int, Restoration]]) -> list[Hook]:
        """At each block the rows that enter there, behind those that came from below."""
        first, hooks = piece[0][0], list[Hook]()
        for begin, members in groupby(piece, itemgetter(0)):
            restorations = [restoration for _, restoration in members]
            path = self._paths[begin - 1] if begin else ""
            placed = [
                (number, put.position - position, put)
                for number, restoration in enumerate(restorations)
                for put in restoration
                if put.module == path
            ]
            states_SCD = self._entering[begin][1:, position:]
            states_NCD = self._outputs.put(states_SCD.repeat(len(restorations), 1, 1), placed)
            hooks.append(self._entering_at(begin, states_NCD, alone=begin == first))
        return hooks

    def _entering_at(self, begin: int, states_NCD: Tensor, *, alone: bool) -> Hook:
        def joined(below_NCD: Tensor) -> Tensor:
            return states_NCD if alone else torch.cat([below_NCD, states_NCD])

        if begin < len(self._blocks):
            block = self._blocks[begin]
            return lambda: block.register_forward_pre_hook(
                lambda m, args: (joined(args[0]), *args[1:])
            )
        return lambda: self._blocks[-1].register_forward_hook(
            lambda m, args, out: _with_states(out, joined(_states(out)))
        )

    def _putting(self, position: int, piece: Sequence[tuple[int, Restoration]]) -> list[Hook]:
        """What is put back above the block that a restoration enters at."""
        placed: dict[str, list[Placed]] = {}
        for number, (begin, restoration) in enumerate(piece):
            for put in restoration:
                if self._block_of[put.module] >= begin:
                    place = number, put.position - position, put
                    placed.setdefault(put.module, []).append(place)
        width = len(self._prompt.ids) - position
        return [self._putting_at(path, mine, width) for path, mine in placed.items()]

    def _putting_at(self, path: str, placed: Sequence[Placed], width: int) -> Hook:
        module = self._twin.get_submodule(path)

        def put(module: nn.Module, args: Any, output: Any) -> Any:
            states = _states(output)
            # Some models run their MLP on flattened rows (OPT).
            by_row_NCD = states.reshape(-1, width, states.shape[-1])
            changed = self._outputs.put(by_row_NCD, placed).reshape(states.shape)
            return _with_states(output, changed)

        return lambda: module.register_forward_hook(put)

    @contextlib.contextmanager
    def _knowing(self, blocks: Sequence[nn.Module], output: Any) -> Iterator[None]:
        """Within the block these blocks do not run."""
        Known(blocks, output)
        try:
            yield
        finally:
            for block in blocks:
                del vars(block)["forward"]

    @contextlib.contextmanager
    def _reading(self, past: Past, position: int) -> Iterator[None]:
        """Within the block attention sees, before `position`, the corrupted keys and values."""
        layers = past.cache.layers if past.cache is not None else ()
        for layer, (keys, values) in zip(layers, self._kept, strict=bool(layers)):
            layer.update = _behind(keys[..., :position, :], values[..., :position, :])
        try:
            yield
        finally:
            for layer in layers:
                del layer.update


def _behind(keys_SHTE: Tensor, values_SHTE: Tensor) -> Any:
    """What stands for a cache's `update`: new keys and values behind those of the draws."""

    def update(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        times = len(keys) // len(keys_SHTE), 1, 1, 1
        before = keys_SHTE.repeat(times), values_SHTE.repeat(times)
        return torch.cat([before[0], keys], dim=-2), torch.cat([before[1], values], dim=-2)

    return update


def _states(output: Any) -> Tensor:
    """The hidden states among what a module puts out."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _with_states(output: Any, states: Tensor) -> Any:
    return (states, *output[1:]) if isinstance(output, tuple) else states
