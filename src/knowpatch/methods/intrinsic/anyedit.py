"""AnyEdit: a long answer is written window by window.

Jiang et al., "AnyEdit: Edit Any Knowledge Encoded in Language Models" (arXiv 2502.05628). One state
holds a few dozen tokens at most, so the answer is cut into windows, and each gets a value of its
own at the token before its first one, with the values of all earlier windows in place
(parts/windows.py). Then all of them, of all requests, are written at once as a host method writes:

    memit      R K^T (lambda C + Ko Ko^T + K K^T)^-1    over several layers
    alphaedit  the same in the null space of the key statistics
    unke       by training a block

with Ko the keys of all other tokens of the same texts, which should stay as they are. The published
code writes on texts that it tokenises anew; here the ids of the windows are those that are written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from knowpatch.method import Cost, Preparation, Shape, register
from knowpatch.models.passes import Tap
from knowpatch.models.view import ModelView
from knowpatch.parts.blocks import BlockConfig, Moved, preserved_item, preserved_rows, train_block
from knowpatch.parts.keep import Keep, Null, Ridge
from knowpatch.parts.nulls import NullConfig, weighed_null
from knowpatch.parts.onward import LongAnswer
from knowpatch.parts.spread import Prepared, Spread, WeighedConfig, Written, weighed
from knowpatch.parts.tasks import ValueTask
from knowpatch.parts.windows import window_values
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

PUBLISHED = {
    "layers": (4, 5, 6, 7, 8),
    "steps": 25,
    "learning_rate": 0.5,
    "clamp": 4.0,
    "weight_decay": 1e-3,
    "enough": 0.01,
    "weight": 15_000.0,
    "ridge": 0.0,
    "memory": False,
}


class AnyEditConfig(WeighedConfig, NullConfig, BlockConfig):
    """Options of AnyEdit: its own, and those of its hosts."""

    overruled: ClassVar[Mapping[str, str]] = {"gain": "weight", "null_share": "threshold"}
    # Of what the hosts take: a long answer is written behind its own question, and nothing else.
    contexts: ClassVar[int] = 0  # type: ignore[misc]
    key: ClassVar[str] = "grouped"  # type: ignore[misc]
    kl_factor: ClassVar[float] = 0.0  # type: ignore[misc]
    hits: ClassVar[None] = None  # type: ignore[misc]
    anchor: ClassVar[None] = None  # type: ignore[misc]

    window: int = Field(20, ge=1, description="tokens of the answer that one value carries")
    host: Literal["memit", "alphaedit", "unke"] = Field(
        "memit", description="how values are written: memit, alphaedit (null space), unke (a block)"
    )
    keep_others: bool = Field(
        True, description="leave alone what else is read in question and answer"
    )
    eos: bool | None = Field(
        None, description="learn to stop after the answer; by default only in a chat"
    )
    steps: int = Field(50, ge=2, description="steps of a value's optimisation, at most")
    clamp: float = Field(4.0, gt=0, description="how far a value may move, in its own length")
    enough: float = Field(0.01, gt=0, description="stop when a window's mean NLL is below this")
    gain: float = Field(
        0.9, gt=0, lt=1, description="share of a pilot fact's residual that a layer's solve writes"
    )


@register("anyedit")
class AnyEdit(Spread):
    """Writes a long answer as a chain of values."""

    name = "anyedit"
    paper = "Jiang et al. 2025, arXiv 2502.05628"
    summary = "a long answer in windows, each with a value of its own, all written at once"
    choose = "answers of many sentences (up to some hundred tokens); no subject needed"
    needs = ()
    Config = AnyEditConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "llama-2-7b": {**PUBLISHED, "window": 40},
        "llama-3-8b": {**PUBLISHED, "window": 40},
        "qwen2.5-7b": {**PUBLISHED, "window": 50},
    }

    def keep(self, second_II: Tensor, pilots_IN: Tensor) -> Ridge | Null:
        if self.config.host == "alphaedit":
            return weighed_null(second_II, pilots_IN, self.config)
        return weighed(second_II, pilots_IN, self.config)

    def besides(
        self, view: ModelView, layer: int, tasks: Sequence[ValueTask], keep: Keep
    ) -> Ridge | Null:
        """What to leave alone, with what else is read in the texts that are written on."""
        assert isinstance(keep, Ridge | Null)
        if not self.config.keep_others:
            return keep
        written: dict[tuple[int, ...], set[int]] = {}
        for task in tasks:
            row = task.contexts[0]
            written.setdefault(row.ids, set()).add(row.position)
        key = Tap(self.role(view, layer).module, "input")
        keys = []
        for ids, positions in written.items():
            run = view.run([ids], taps=[key])
            keys.append(run.at(key, [(0, i) for i in range(len(ids)) if i not in positions]))
        kept = keep.keeping(torch.cat(keys).cpu().double().T)
        # They are no facts that were written: they take up no room.
        return replace(kept, form=replace(kept.form, kept=keep.form.kept))

    # -- an edit -----------------------------------------------------------------------------------

    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: Any, state: Any
    ) -> Patch:
        answers = [self._answer(view, request) for request in requests]
        return self._made(view, requests, answers, self._values(view, answers), prepared, state)

    def edit_each(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: Any, state: Any
    ) -> list[Patch]:
        answers = [self._answer(view, request) for request in requests]
        values = self._values(view, answers)
        return [
            self._made(view, [request], [answer], [deltas_JD], prepared, state)
            for request, answer, deltas_JD in zip(requests, answers, values, strict=True)
        ]

    def _answer(self, view: ModelView, request: EditRequest) -> LongAnswer:
        prompt, answer = self.encode(view, request)
        stops = self.config.chat if self.config.eos is None else self.config.eos
        ends = view.stop_ids[:1] if stops else ()
        return LongAnswer(prompt.ids, (*answer, *ends), self.config.window)

    def task(self, view: ModelView, request: EditRequest, contexts: Sequence[str]) -> ValueTask:
        """The first window, which follows the question."""
        return self._answer(view, request).tasks[0]

    def _values(self, view: ModelView, answers: Sequence[LongAnswer]) -> list[Tensor]:
        """By what the last layer should move before each window (J, D)."""
        block = view.roles.blocks[self.layers_of(view)[-1]].module
        module = block if self.config.host == "unke" else self.gap_module(view)
        return window_values(view, module, answers, self.settings(view), self.progress)

    def _made(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        answers: Sequence[LongAnswer],
        values: Sequence[Tensor],
        prepared: Any,
        state: Written | None,
    ) -> Patch:
        if self.config.host == "unke":
            moved = [
                Moved(answer.ids, len(answer.prompt), answer.positions, deltas_JD)
                for answer, deltas_JD in zip(answers, values, strict=True)
            ]
            last, progress = self.layers_of(view)[-1], self.progress
            changes = train_block(
                view, last, moved, prepared, self.config, seed=self.seed, progress=progress
            )
            found = [self.delta(view, address, change) for address, change in changes]
            return self.patch(view, requests, deltas=found)
        tasks = [task for answer in answers for task in answer.tasks]
        deltas_ND = torch.cat(list(values)).cpu().double()
        patch = self._write(view, requests, tasks, deltas_ND, prepared, state)
        owners = [number for number, answer in enumerate(answers) for _ in answer.windows]
        return replace(patch, traces={**patch.traces, "owners": torch.tensor(owners).float()})

    # -- before an edit ----------------------------------------------------------------------------

    def contexts(self, view: ModelView) -> tuple[str, ...]:
        return ("",)

    def prepare(self, view: ModelView) -> Any:
        if self.config.host == "unke":
            return preserved_rows(view, self.config, seed=self.seed, progress=self.progress)
        return super().prepare(view)

    def fold(self, prepared: Any, state: Written | None, patch: Patch) -> Any:
        return None if self.config.host == "unke" else super().fold(prepared, state, patch)

    def room(self, prepared: Prepared, state: Written | None) -> int | None:
        return None if self.config.host == "unke" else super().room(prepared, state)

    def preparations(self, shape: Shape) -> list[Preparation]:
        if self.config.host == "unke":
            return [preserved_item(shape.fingerprint, self.config, self.seed)]
        return super().preparations(shape)[1:]  # there are no context prefixes

    def cost(self, shape: Shape, lengths: Sequence[int]) -> Cost:
        # A window's passes read all that comes before it.
        reads = sum(length * (length // self.config.window + 2) // 2 for length in lengths)
        tokens = self.config.steps * reads
        return Cost(tokens, tokens, extra_bytes=super().cost(shape, lengths).extra_bytes)
