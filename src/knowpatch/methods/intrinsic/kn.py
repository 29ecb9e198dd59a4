"""KN: knowledge neurons.

Dai et al., "Knowledge Neurons in Pretrained Transformers" (arXiv 2104.08696). The neurons that a
fact's answer comes from are found by integrated gradients (parts/attribution.py). Then their value
slots are edited, the columns W_i of the MLP's output map:

    write     W_i := W_i + lambda2 e(new) - lambda1 e(old)
    erase     W_i := 0
    suppress  W_i := (1 - strength) W_i
    enhance   W_i := (1 + strength) W_i

The published lambdas (1 and 8, or 2 and 2) count in lengths of BERT's and GPT-2's embeddings. Here
they count in lengths of the slot itself, so that they mean the same in every model, in the paper's
ratio of 1 to 8; a slot that gets eight times its length breaks a small model. And a slot is
multiplied by its neuron, which in a gated MLP is as often negative: what is written takes the
neuron's sign, or it would push the other way. What is written into one layer is of rank one, since
all its slots share the direction. Axes: D hidden, I inner size of the MLP, K rank.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from knowpatch.deltas import WeightDelta
from knowpatch.errors import EditError, ModelError, OptionError, RequestError
from knowpatch.method import Cost, EditMethod, MethodConfig, Shape, register
from knowpatch.models.passes import Ids
from knowpatch.models.view import ModelView
from knowpatch.parts.attribution import (
    ROLE,
    Neuron,
    Search,
    agreed,
    slots,
)
from knowpatch.parts.depths import Layers
from knowpatch.parts.spans import Encoded, continuation
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

log = logging.getLogger(__name__)

Action = Literal["write", "erase", "suppress", "enhance"]

STRENGTH = {"suppress": 0.5, "enhance": 1.0}
"""How far a slot is scaled, where it is not said; the paper's amplified neurons are doubled."""

PUBLISHED: Mapping[str, Any] = {
    "points": 20,
    "threshold": 0.2,
    "share": 0.4,
    "vectors": "embedding",
    "tokens": "sum",
    "relative": False,
    "signed": False,
    "scale_new": 2.0,
    "scale_old": 2.0,
}
"""Of EasyEdit and of the program that it follows; for answers of several tokens it has 1, not 2."""


class KnConfig(MethodConfig):
    """Options of KN."""

    action: Action | None = Field(
        None, description="write, erase, suppress or enhance; by default erase or write, by kind"
    )
    layers: Layers | None = Field(
        None, description="blocks to look for neurons in, [4, 5] or 4-8; by default all"
    )
    points: int = Field(20, ge=1, description="steps of the integrated gradients (midpoints)")
    threshold: float = Field(
        0.2, ge=0, lt=1, description="a neuron counts above this share of the largest attribution"
    )
    share: float | None = Field(
        0.4,
        ge=0,
        lt=1,
        description="of the prompts (with rephrases) that must find a neuron; none: adapted, "
        "until 2 to 5 are left",
    )
    most: int | None = Field(None, ge=1, description="neurons at most, the highest attributed ones")
    old_tokens: int = Field(4, ge=1, description="tokens of the answer that are attributed at most")
    tokens: Literal["first", "sum"] = Field(
        "first", description="of an answer of several tokens: the first one's vector, or all summed"
    )
    vectors: Literal["head", "embedding"] = Field(
        "head", description="what is written: the tokens' rows of the output head or the embedding"
    )
    relative: bool = Field(
        True, description="scales count in lengths of the slot; else as published, of the vectors"
    )
    signed: bool = Field(True, description="what is written takes the sign of the neuron")
    scale_new: float = Field(0.5, gt=0, le=1e6, description="write: of the new answer (lambda2)")
    scale_old: float = Field(0.0625, ge=0, le=1e6, description="write: of the old answer (lambda1)")
    strength: float | None = Field(
        None, gt=0, le=1e6, description="suppress, enhance: by default 0.5 and 1"
    )

    @model_validator(mode="after")
    def _not_beyond_nothing(self) -> Self:
        if self.action == "suppress" and self.strength is not None and self.strength > 1:
            raise ValueError("a strength above 1 would turn slots around; 1 erases them")
        return self


@dataclass(frozen=True, eq=False)
class Found:
    """The neurons that an answer comes from, and the sign of each at the prompt."""

    signs: Mapping[Neuron, float]

    def of(self, layer: int) -> list[int]:
        """The neurons in one block, in order."""
        return sorted(index for block, index in self.signs if block == layer)


@dataclass(frozen=True, eq=False)
class Change:
    """One request's part: its neurons, what to do, and the direction (D) if it writes."""

    found: Found
    action: Action
    direction_D: Tensor | None = None


@register("kn")
class Kn(EditMethod):
    """Edits the value slots of the neurons that an answer comes from."""

    name = "kn"
    family = "intrinsic"
    paper = "Dai et al. 2022, arXiv 2104.08696"
    summary = "finds the neurons behind an answer, and rewrites, erases or scales their value slots"
    choose = "to see and change single neurons; as an edit it is weaker than the located ones"
    roles = (ROLE,)
    exports = ("merged", "peft", "gguf", "gguf-lora")
    Config = KnConfig
    presets = dict.fromkeys(
        ("gpt2-xl", "gpt-j-6b", "llama-2-7b", "qwen2.5-7b", "mistral-7b"), PUBLISHED
    )

    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: Any, state: Any
    ) -> Patch:
        changes = [self._change(view, request) for request in requests]
        layers = sorted({layer for change in changes for layer, _ in change.found.signs})
        deltas = [self._delta(view, layer, changes) for layer in layers]
        return self.patch(view, requests, deltas=deltas)

    def layers(self, count: int) -> tuple[int, ...]:
        return self.config.layers or tuple(range(count))

    def check(self, view: ModelView) -> None:
        super().check(view)
        width = view.parameter(self._vectors(view)).shape[1]
        if self.config.action in (None, "write") and width != view.roles.hidden_size:
            raise ModelError(
                f"{self.name} cannot edit {view.roles.architecture}: its token vectors have "
                f"{width} numbers, what its MLPs put out has {view.roles.hidden_size}"
            )

    def check_requests(self, requests: Sequence[EditRequest]) -> None:
        super().check_requests(requests)
        for request in requests:
            if self.config.action in ("erase", "suppress") and request.kind != "erase":
                raise OptionError(
                    f"action={self.config.action} only forgets; {request.prompt!r} is to be "
                    "learned (kind=erase, or action=write)"
                )

    def expected(self, request: EditRequest) -> str | None:
        return request.target if self._action(request) in ("write", "enhance") else None

    def cost(self, shape: Shape, lengths: Sequence[int]) -> Cost:
        # From each layer up, which is half of the depth on average, one token a point.
        layers = len(self.layers(shape.layers))
        points = layers * self.config.points // 2 * len(lengths)
        return Cost(points + 2 * sum(lengths), points, extra_bytes=4 * shape.hidden * shape.inner)

    def _action(self, request: EditRequest) -> Action:
        by_kind: Action = "erase" if request.kind == "erase" else "write"
        return self.config.action or by_kind

    # -- finding -----------------------------------------------------------------------------------

    def _change(self, view: ModelView, request: EditRequest) -> Change:
        action = self._action(request)
        encoded, target = self.encode(view, request)
        gold = target if action == "enhance" else self._old(view, encoded, request)
        found = self._find(view, request, gold)
        if action != "write":
            return Change(found, action)
        return Change(found, action, self._direction(view, request, target, gold))

    def _old(self, view: ModelView, encoded: Encoded, request: EditRequest) -> Ids:
        """The old answer behind the prompt; where it is not given, the likeliest next token."""
        if request.old is not None:
            return continuation(view.tokenizer, encoded, request.old)
        place = (0, len(encoded.ids) - 1)
        logits_V = view.run([encoded.ids], logits_at=[place]).logits_MV[0].clone()
        special = [i for i in view.tokenizer.all_special_ids if i < len(logits_V)]
        logits_V[special] = float("-inf")
        return (int(logits_V.argmax()),)

    def _find(self, view: ModelView, request: EditRequest, gold: Ids) -> Found:
        """The neurons that most of the prompts agree on."""
        config = self.config
        prompts = [
            view.encode(text, chat=config.chat).ids for text in (request.prompt, *request.rephrases)
        ]
        search = Search(config.layers, config.points, config.threshold, config.share, config.most)
        found = agreed(view, prompts, gold[: config.old_tokens], search, progress=self.progress)
        neurons = found.neurons
        if not neurons:
            raise EditError(
                f"no neuron is found that {view.decode(gold)!r} behind {request.prompt!r} comes "
                "from: use a smaller threshold or share, other layers, or another old answer"
            )
        by_block = sorted(Counter(layer for layer, _ in neurons).items())
        told = ", ".join(f"{count} in block {layer}" for layer, count in by_block)
        log.info("%d neurons for %r: %s", len(neurons), request.prompt, told)
        values = found.read[0].neurons
        return Found({(b, i): -1.0 if float(values[b][i]) < 0 else 1.0 for b, i in neurons})

    # -- writing -----------------------------------------------------------------------------------

    def _direction(self, view: ModelView, request: EditRequest, new: Ids, old: Ids) -> Tensor:
        """lambda2 e(new) - lambda1 e(old), (D)."""
        config = self.config
        new_D, old_D = (self._vector(view, request, ids) for ids in (new, old))
        direction_D: Tensor = config.scale_new * new_D - config.scale_old * old_D
        return direction_D

    def _vector(self, view: ModelView, request: EditRequest, ids: Ids) -> Tensor:
        """e(answer), (D): of length one where scales are relative."""
        words = [i for i in ids if i not in view.tokenizer.all_special_ids]
        if not words:
            raise RequestError(f"an answer to {request.prompt!r} has no tokens but special ones")
        if self.config.tokens == "first":
            words = words[:1]
        rows_TD = view.values(self._vectors(view))[words].float().cpu()
        if not self.config.relative:
            # As published: for an answer of several tokens half the factor.
            return rows_TD.sum(0) / min(len(words), 2)
        return torch.nn.functional.normalize(rows_TD.sum(0), dim=0)

    def _vectors(self, view: ModelView) -> str:
        roles = view.roles
        return f"{roles.head if self.config.vectors == 'head' else roles.embedding}.weight"

    def _delta(self, view: ModelView, layer: int, changes: Sequence[Change]) -> WeightDelta:
        """All requests' changes of one block's slots, in factors (D, K) and (K, I)."""
        role = view.roles.linear(ROLE, layer)
        weight_DI = view.weight(role).cpu()
        pairs = [
            (change.direction_D, self._weights(weight_DI, layer, change.found))
            for change in changes
            if change.direction_D is not None and change.found.of(layer)
        ]
        # A slot that two requests scale is scaled once.
        scaled = {
            index: self._factor(change.action)
            for change in changes
            if change.direction_D is None
            for index in change.found.of(layer)
        }
        left_DK, right_KI = slots(weight_DI, scaled)
        left_DK = torch.cat([*(left_D[:, None] for left_D, _ in pairs), left_DK], dim=1)
        right_KI = torch.cat([*(right_I[None] for _, right_I in pairs), right_KI])
        return self.delta(view, role.address, role.factored(left_DK, right_KI))

    def _weights(self, weight_DI: Tensor, layer: int, found: Found) -> Tensor:
        """How much of a direction each slot of a block gets, (I)."""
        weights_I = torch.zeros(weight_DI.shape[1])
        for index in found.of(layer):
            length = float(weight_DI[:, index].norm()) if self.config.relative else 1.0
            weights_I[index] = length * (found.signs[layer, index] if self.config.signed else 1.0)
        return weights_I

    def _factor(self, action: Action) -> float:
        """What is added to a slot, as a multiple of it."""
        if action == "erase":
            return -1.0
        strength: float = self.config.strength or STRENGTH[action]
        return -strength if action == "suppress" else strength
