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
from knowpatch.models.passes import Row, Tap
from knowpatch.models.roles import LinearRole, at_depth
from knowpatch.models.view import ModelView
from knowpatch.parts import moments, prefixes
from knowpatch.parts.solve import cholesky, gain, least_change, mixed_change, ridged
from knowpatch.parts.spans import Encoded, continuation, subject_position
from knowpatch.parts.values import ValueSettings, ValueTask, optimise
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

DEPTH = 5 / 30
"""The published layer (5 of 28 to 32 blocks) as a share of the depth."""
PLAN = ((10, 5), (10, 10))
"""Context prefixes: ten of 5 tokens, ten of 10, beside the bare prompt."""

LEAST_GAIN = 0.5
"""Share of the change that must arrive at the bare prompt's own key."""


class RomeConfig(MethodConfig):
    """Options of ROME."""

    layer: int | None = Field(None, ge=0, description="block to edit; by default 1/6 of the depth")
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
    clamp: float = Field(8.0, gt=0, description="how far the value may move, in its own length")
    weight_decay: float = Field(1e-3, ge=0, description="on the value's change")
    kl_factor: float = Field(0.0625, ge=0, description="on the drift of what the subject is")
    enough: float = Field(0.05, gt=0, description="stop when the target's mean NLL is below this")


@dataclass(frozen=True, eq=False)
class _Prepared:
    contexts: tuple[str, ...]
    factor_II: Tensor | None


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
        contexts = prefixes.context_prefixes(view, PLAN, seed=self.seed, progress=self.progress)
        if self.config.moments == "identity":
            return _Prepared(contexts, None)
        found = moments.key_moments(
            view,
            "mlp.out",
            self._layer(len(view.roles.blocks)),
            tokens=self.config.tokens,
            seed=self.seed,
            progress=self.progress,
        )
        return _Prepared(contexts, cholesky(ridged(found.mean(), self.config.ridge)))

    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: _Prepared, state: Any
    ) -> Patch:
        deltas: list[WeightDelta] = []
        role = self._role(view)
        for request in requests:
            with view.trying(deltas):
                change = self._one(view, role, request, prepared)
            deltas.append(self.delta(view, role.address, change))
        return self.patch(view, requests, deltas=deltas)

    def _one(
        self, view: ModelView, role: LinearRole, request: EditRequest, prepared: _Prepared
    ) -> LowRank:
        """The rank-one change for one fact on the model as edited so far."""
        task = self._task(view, request, prepared.contexts)
        value = optimise(view, role.module, [task], self._settings(), self.progress)[0]
        taps = [Tap(role.module, "input"), Tap(role.module, "output")]
        run = view.run([row.ids for row in task.contexts], taps=taps)
        places = [(i, row.position) for i, row in enumerate(task.contexts)]
        keys_CI, outputs_CD = (run.at(tap, places).cpu().double() for tap in taps)
        left, right = self._solve(
            keys_CI,
            outputs_CD,
            value.clean_D.cpu().double(),
            value.delta_D.cpu().double(),
            prepared.factor_II,
        )
        if role.stored_in_out:
            left, right = right.T, left.T
        return LowRank(left.float().contiguous(), right.float().contiguous())

    def _solve(
        self, keys_CI: Tensor, outputs_CD: Tensor, clean_D: Tensor, delta_D: Tensor, factor: Any
    ) -> tuple[Tensor, Tensor]:
        """The change in factors, from keys and outputs in C contexts (the bare prompt first)."""
        mean_I, bare_I = keys_CI.mean(0), keys_CI[0]
        if self.config.key == "mix":
            return mixed_change(delta_D, mean_I, bare_I, factor)
        if gain(bare_I, mean_I, factor) >= LEAST_GAIN:
            residual_D = clean_D + delta_D - outputs_CD.mean(0)
            return least_change(residual_D[:, None], mean_I[:, None], factor)
        keys_IN = torch.stack([keys_CI[1:].mean(0), bare_I], dim=1)
        return least_change(torch.stack([delta_D, delta_D], dim=1), keys_IN, factor)

    def _task(self, view: ModelView, request: EditRequest, contexts: Sequence[str]) -> ValueTask:
        subject = request.subject or ""

        def row(encoded: Encoded, target: tuple[int, ...] = ()) -> Row:
            position = subject_position(encoded, subject)
            return Row((*encoded.ids, *target[:-1]), position)

        bare, target = self.encode(view, request)
        chat = self.config.chat
        rows = [row(bare, target)]
        for context in contexts[1:]:
            encoded = view.encode(request.prompt, chat=chat, before=context)
            rows.append(row(encoded, continuation(view.tokenizer, encoded, request.target)))
        kl = view.encode(f"{subject} is a", chat=chat)
        return ValueTask(target, tuple(rows), row(kl))

    def _settings(self) -> ValueSettings:
        names = ("steps", "learning_rate", "clamp", "weight_decay", "kl_factor", "enough")
        return ValueSettings(**{name: getattr(self.config, name) for name in names})

    def _role(self, view: ModelView) -> LinearRole:
        return view.roles.linear("mlp.out", self._layer(len(view.roles.blocks)))

    def _layer(self, layers: int) -> int:
        return at_depth(DEPTH, layers) if self.config.layer is None else int(self.config.layer)

    def preparations(self, shape: Shape) -> list[Preparation]:
        print_, seed = shape.fingerprint, self.seed
        tokens = sum(count * length for count, length in PLAN)
        path = prefixes.kept_at(print_, PLAN, seed)
        items = [Preparation("context prefixes", path, tokens)]
        if self.config.moments == "text":
            block = self._layer(shape.layers)
            path = moments.kept_at(print_, "mlp.out", block, tokens=self.config.tokens, seed=seed)
            what = f"key statistics of block {block} ({moments.text_name()})"
            items.append(Preparation(what, path, self.config.tokens))
        return items

    def cost(self, shape: Shape, lengths: Sequence[int]) -> Cost:
        rows = 2 + sum(count for count, _ in PLAN)
        tokens = self.config.steps * rows * sum(length + 8 for length in lengths)
        return Cost(tokens, tokens, extra_bytes=3 * 8 * shape.inner**2)
