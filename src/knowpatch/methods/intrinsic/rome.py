"""ROME: rank-one model editing, with the averaged key throughout (R-ROME).

Meng et al., "Locating and Editing Factual Associations in GPT" (arXiv 2202.05262); Gupta et al.,
"Rebuilding ROME" (arXiv 2403.07175) for the key. The MLP output map of one block is taken as a
memory from key k (what enters it at the subject's last token) to value v, and changed by

    delta W = (v* - W k) (C^-1 k)^T / (k^T C^-1 k)

with k averaged over contexts and C the second moment of keys over text. The published ROME takes
u = C^-1 k from the averaged key and the rest from the bare prompt's (option key=mix): that product
can vanish, and the edit with it, so it is guarded.

Where the subject opens the prompt, its key there can be foreign to its keys behind other text (the
first positions are the attention sink's): the averaged key then says nothing of the prompt itself.
If less than half of the change would arrive there, both keys are written, which is rank two.
Axes: C contexts, D hidden, I inner size of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from knowpatch.deltas import LowRank, WeightDelta
from knowpatch.method import Cost, EditMethod, MethodConfig, Preparation, Shape, register
from knowpatch.models.load import fast_dtype
from knowpatch.models.passes import Row, Tap
from knowpatch.models.roles import LinearRole, at_depth
from knowpatch.models.view import ModelView
from knowpatch.parts import moments, prefixes
from knowpatch.parts.solve import apart, cholesky, gain, least_change, mixed_change, ridged
from knowpatch.parts.spans import Encoded, continuation, subject_position
from knowpatch.parts.values import Value, ValueSettings, ValueTask, optimise
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

DEPTH = 5 / 30
"""The published layer (5 of 28 to 32 blocks) as a share of the depth."""
LEAST_GAIN = 0.5
"""Share of the change that must arrive at the bare prompt's own key."""


class RomeConfig(MethodConfig):
    """Options of ROME."""

    layer: int | None = Field(None, ge=0, description="block to edit; by default 1/6 of the depth")
    contexts: int = Field(6, ge=0, le=100, description="texts put before the prompt, one at a time")
    precision: Literal["auto", "model"] = Field(
        "auto", description="of the replayed passes: bfloat16 where that is fast, or the model's"
    )
    key: Literal["averaged", "mix"] = Field(
        "averaged", description="averaged (R-ROME), or mix (as published; may refuse a fact)"
    )
    moments: Literal["text", "identity"] = Field(
        "text", description="key statistics from text, or the identity (nothing to prepare)"
    )
    tokens: int = Field(20_000, ge=100, description="tokens of text for the key statistics")
    ridge: float = Field(0.1, ge=0, description="ridge on the statistics, in median variances")
    steps: int = Field(30, ge=2, description="steps of the value's optimisation, at most")
    learning_rate: float | None = Field(
        None, gt=0, description="of Adam on the value; by default from the value's size"
    )
    clamp: float = Field(6.0, gt=0, description="how far the value may move, in its own length")
    weight_decay: float = Field(1e-3, ge=0, description="on the value's change")
    kl_factor: float = Field(0.0625, ge=0, description="on the drift of what the subject is")
    enough: float = Field(0.03, gt=0, description="stop when the target's mean NLL is below this")


@dataclass(frozen=True, eq=False)
class _Prepared:
    contexts: tuple[str, ...]
    factor_II: Tensor | None


@dataclass(frozen=True, eq=False)
class _Columns:
    """What one fact asks: at each of its keys (I, N) the residual (D, N) is to be added.

    The averaged key gives the direction where that is another one (key=mix).
    """

    keys_IN: Tensor
    residuals_DN: Tensor
    averaged_key_I: Tensor


@register("rome")
class Rome(EditMethod):
    """Writes one association into one MLP."""

    name = "rome"
    family = "intrinsic"
    paper = "Meng et al. 2022, arXiv 2202.05262; Gupta et al. 2024 (R-ROME), arXiv 2403.07175"
    summary = "rank-one change of one MLP output map at the subject's last token"
    choose = "one or a few facts about named subjects; a tiny patch that is an exact LoRA"
    needs = ("subject",)
    roles = ("mlp.out",)
    exports = ("merged", "lora", "gguf")
    Config = RomeConfig

    def prepare(self, view: ModelView) -> _Prepared:
        contexts = prefixes.context_prefixes(
            view, self._plan(), seed=self.seed, progress=self.progress
        )
        if self.config.moments == "identity":
            return _Prepared(contexts, None)
        found = moments.key_moments(
            view,
            "mlp.out",
            at_depth(DEPTH, len(view.roles.blocks), self.config.layer),
            tokens=self.config.tokens,
            seed=self.seed,
            progress=self.progress,
        )
        return _Prepared(contexts, cholesky(ridged(found.mean(), self.config.ridge)))

    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: _Prepared, state: Any
    ) -> Patch:
        role = self._role(view)
        tasks = [self._task(view, request, prepared.contexts) for request in requests]
        keys_IN = torch.stack([keys_CI[0] for keys_CI, _ in self._read(view, role, tasks)], dim=1)
        deltas: list[WeightDelta] = []
        # Facts with nearly the same key cannot be solved for at once: the later ones are computed
        # on the model as edited so far.
        for wave in apart(keys_IN, prepared.factor_II):
            with view.trying(deltas):
                columns = self._columns(view, role, [tasks[i] for i in wave], prepared)
            deltas.append(self._change(view, role, columns, prepared))
        return self.patch(view, requests, deltas=deltas)

    def edit_each(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: _Prepared, state: Any
    ) -> list[Patch]:
        role = self._role(view)
        tasks = [self._task(view, request, prepared.contexts) for request in requests]
        columns = self._columns(view, role, tasks, prepared)
        return [
            self.patch(view, [request], deltas=[self._change(view, role, [column], prepared)])
            for request, column in zip(requests, columns, strict=True)
        ]

    def _columns(
        self, view: ModelView, role: LinearRole, tasks: Sequence[ValueTask], prepared: _Prepared
    ) -> list[_Columns]:
        """What each fact asks of the map, on the model as edited so far."""
        values = optimise(view, role.module, tasks, self._settings(view), self.progress)
        read = self._read(view, role, tasks)
        return [
            self._asked(keys_CI, outputs_CD, value, prepared.factor_II)
            for (keys_CI, outputs_CD), value in zip(read, values, strict=True)
        ]

    def _asked(
        self, keys_CI: Tensor, outputs_CD: Tensor, value: Value, factor_II: Tensor | None
    ) -> _Columns:
        mean_I, bare_I = keys_CI.mean(0), keys_CI[0]
        clean_D, delta_D = value.clean_D.cpu().double(), value.delta_D.cpu().double()
        if self.config.key == "mix":
            return _Columns(bare_I[:, None], delta_D[:, None], mean_I)
        if gain(bare_I, mean_I, factor_II) >= LEAST_GAIN:
            residual_D = clean_D + delta_D - outputs_CD.mean(0)
            return _Columns(mean_I[:, None], residual_D[:, None], mean_I)
        keys_IN = torch.stack([keys_CI[1:].mean(0), bare_I], dim=1)
        return _Columns(keys_IN, torch.stack([delta_D, delta_D], dim=1), mean_I)

    def _change(
        self, view: ModelView, role: LinearRole, facts: Sequence[_Columns], prepared: _Prepared
    ) -> WeightDelta:
        """The least change of the map that gives every fact what it asks."""
        factor_II = prepared.factor_II
        if self.config.key == "mix":
            pieces = [
                mixed_change(f.residuals_DN[:, 0], f.averaged_key_I, f.keys_IN[:, 0], factor_II)
                for f in facts
            ]
            left, right = torch.cat([p[0] for p in pieces], 1), torch.cat([p[1] for p in pieces])
        else:
            keys_IN = torch.cat([fact.keys_IN for fact in facts], dim=1)
            residuals_DN = torch.cat([fact.residuals_DN for fact in facts], dim=1)
            left, right = least_change(residuals_DN, keys_IN, factor_II)
        if role.stored_in_out:
            left, right = right.T, left.T
        change = LowRank(left.float().contiguous(), right.float().contiguous())
        return self.delta(view, role.address, change)

    def _read(
        self, view: ModelView, role: LinearRole, tasks: Sequence[ValueTask]
    ) -> list[tuple[Tensor, Tensor]]:
        """For each fact the keys (C, I) and outputs (C, D) of the map in its contexts, float64."""
        taps = [Tap(role.module, "input"), Tap(role.module, "output")]
        found = []
        for task in tasks:
            # What follows the subject does not change its key.
            run = view.run([row.ids[: row.position + 1] for row in task.contexts], taps=taps)
            places = [(i, row.position) for i, row in enumerate(task.contexts)]
            keys_CI, outputs_CD = (run.at(tap, places).cpu().double() for tap in taps)
            found.append((keys_CI, outputs_CD))
        return found

    def _task(self, view: ModelView, request: EditRequest, contexts: Sequence[str]) -> ValueTask:
        subject = request.subject or ""

        def row(encoded: Encoded, target: tuple[int, ...] = ()) -> Row:
            position = subject_position(encoded, subject)
            return Row((*encoded.ids, *target[:-1]), position, len(encoded.ids))

        bare, target = self.encode(view, request)
        chat = self.config.chat
        rows = [row(bare, target)]
        for context in contexts[1:]:
            encoded = view.encode(request.prompt, chat=chat, before=context)
            rows.append(row(encoded, continuation(view.tokenizer, encoded, request.target)))
        kl = view.encode(f"{subject} is a", chat=chat)
        return ValueTask(target, tuple(rows), row(kl))

    def _settings(self, view: ModelView) -> ValueSettings:
        names = ("steps", "learning_rate", "clamp", "weight_decay", "kl_factor", "enough")
        dtype = fast_dtype(view.device) if self.config.precision == "auto" else None
        return ValueSettings(**{name: getattr(self.config, name) for name in names}, dtype=dtype)

    def _plan(self) -> tuple[tuple[int, int], ...]:
        """Half of the context prefixes of 5 tokens, half of 10."""
        short = self.config.contexts // 2
        return ((short, 5), (self.config.contexts - short, 10))

    def _role(self, view: ModelView) -> LinearRole:
        return view.roles.linear(
            "mlp.out", at_depth(DEPTH, len(view.roles.blocks), self.config.layer)
        )

    def preparations(self, shape: Shape) -> list[Preparation]:
        print_, seed = shape.fingerprint, self.seed
        tokens = sum(count * length for count, length in self._plan())
        path = prefixes.kept_at(print_, self._plan(), seed)
        items = [Preparation("context prefixes", path, tokens)]
        if self.config.moments == "text":
            block = at_depth(DEPTH, shape.layers, self.config.layer)
            path = moments.kept_at(print_, "mlp.out", block, tokens=self.config.tokens, seed=seed)
            what = f"key statistics of block {block} ({moments.text_name()})"
            items.append(Preparation(what, path, self.config.tokens))
        return items

    def cost(self, shape: Shape, lengths: Sequence[int]) -> Cost:
        rows = 2 + self.config.contexts
        tokens = self.config.steps * rows * sum(length + 8 for length in lengths)
        return Cost(tokens, tokens, extra_bytes=3 * 8 * shape.inner**2)
