"""REMEDI: an attribute's text becomes a direction that is added to its entity's state.

Hernandez, Li and Andreas, "Inspecting and Editing Knowledge Representations in Language Models"
(arXiv 2304.00740). One affine map (parts/mediation.py) is trained for the model, on facts that are
none of the requests; an edit is then one forward pass. Where a prompt names the subject, in its
own spelling, the direction is added at the subject's last token, whatever the prompt asks: what a
subject is in other respects may change with it.

Published with thousands of training facts. By default the library's own pilot facts are trained on,
which is a few minutes' work and teaches far less; `facts` names a file of requests to train on.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from knowpatch.errors import RequestError
from knowpatch.files import kept_in, write_atomically
from knowpatch.method import EditMethod, MethodConfig, Preparation, Shape, register
from knowpatch.models.roles import LinearRole, at_depth
from knowpatch.models.sites import muted
from knowpatch.models.view import ModelView
from knowpatch.parts.descent import Pace
from knowpatch.parts.kinds.directions import DIRECTIONS, Forms, directions
from knowpatch.parts.mediation import Lesson, Mediator, Weights, attributes, train
from knowpatch.parts.pilots import pilots
from knowpatch.parts.spans import forms, subject_position, subject_span, tokens_of
from knowpatch.patch import Patch
from knowpatch.request import EditRequest, read_requests

DEPTH = 2 / 30
"""The block, as a share of the depth (published: 1 of 28, 0 of 48)."""
FACT_TOKENS = 20
"""What a fact to train on comes to, about."""
VERSION = 1


class RemediConfig(MethodConfig):
    """Options of REMEDI."""

    layer: int | None = Field(None, ge=0, description="block; by default 2/30 of the depth")
    strength: float = Field(1.0, description="what the direction is multiplied by")
    facts: str | None = Field(
        None, description="file of requests to train the map on; by default the pilot facts"
    )
    epochs: int = Field(8, ge=1, description="passes over these facts, at most")
    patience: int = Field(2, ge=1, description="passes without progress on facts held out")
    learning_rate: float = Field(1e-3, gt=0, description="of Adam on the map")
    batch_size: int = Field(16, ge=1, description="facts per step")
    unlearn: float = Field(1.0, ge=0, description="weight of -log(1 - p(old answer))")
    keep: float = Field(10.0, ge=0, description="weight of KL(before || now) behind the subject")


@register("remedi")
class Remedi(EditMethod):
    """Adds a direction wherever the subject is spoken of."""

    name = "remedi"
    family = "merged"
    paper = "Hernandez et al. 2023, arXiv 2304.00740"
    summary = "one map, trained once, turns what is said of a subject into a direction for it"
    choose = "many facts in no time, once a map has been trained on thousands of others"
    needs = ("subject",)
    roles = ("mlp.out",)
    Config = RemediConfig

    def layers(self, count: int) -> tuple[int, ...]:
        return (at_depth(DEPTH, count, self.config.layer),)

    def prepare(self, view: ModelView) -> Mediator:
        path = self._kept_at(view.fingerprint, len(view.roles.blocks))
        with contextlib.suppress(OSError, ValueError, KeyError, SafetensorError):
            return _loaded(load_file(path))
        lessons = [Lesson.of(view, fact, chat=self.config.chat) for fact in self._facts()]
        config, (layer,) = self.config, self.layers(len(view.roles.blocks))
        pace = Pace(config.epochs, config.learning_rate, config.batch_size, 0.0, seed=self.seed)
        made = train(
            view,
            self._role(view).module,
            layer,
            lessons,
            Weights(config.unlearn, config.keep),
            pace,
            patience=config.patience,
            progress=self.progress,
        )
        write_atomically(path, save(_tensors(made)))
        return made

    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: Mediator, state: Any
    ) -> Patch:
        found_ND = self._directions(view, requests, prepared)
        return self._patch(view, requests, found_ND)

    def edit_each(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: Mediator, state: Any
    ) -> list[Patch]:
        found_ND = self._directions(view, requests, prepared)
        return [
            self._patch(view, [request], found_ND[number : number + 1])
            for number, request in enumerate(requests)
        ]

    def _directions(
        self, view: ModelView, requests: Sequence[EditRequest], mediator: Mediator
    ) -> Tensor:
        """What each request says of its subject, as a direction; read as the map was trained."""
        (layer,) = self.layers(len(view.roles.blocks))
        pairs = [self.encode(view, request) for request in requests]
        rows = [(*prompt.ids, *target) for prompt, target in pairs]
        with muted(DIRECTIONS):
            # One by one, so that a request's direction does not depend on its neighbours.
            each = [
                attributes(view, layer, [row], [len(prompt.ids)])
                for row, (prompt, _) in zip(rows, pairs, strict=True)
            ]
        return torch.cat([self.config.strength * mediator.directions(one_1D) for one_1D in each])

    def _patch(self, view: ModelView, requests: Sequence[EditRequest], found_ND: Tensor) -> Patch:
        role = self._role(view)
        inputs = int(view.weight(role).shape[1])
        entities = [self._forms(view, request) for request in requests]
        return self.patch(
            view, requests, wraps=[directions(role.module, inputs, entities, found_ND.clone())]
        )

    def _forms(self, view: ModelView, request: EditRequest) -> Forms:
        """The subject alone, and as it stands in the prompt."""
        subject, prompt = request.subject or "", view.encode(request.prompt, chat=self.config.chat)
        places = tokens_of(prompt, subject_span(prompt.text, subject, prompt.content))
        here = tuple(prompt.ids[places[0] : subject_position(prompt, subject) + 1])
        return tuple(dict.fromkeys((*forms(view.tokenizer, subject), here)))

    def _role(self, view: ModelView) -> LinearRole:
        return view.roles.linear("mlp.out", self.layers(len(view.roles.blocks))[0])

    def _facts(self) -> Sequence[EditRequest]:
        if self.config.facts is None:
            return pilots()
        found = read_requests(self.config.facts)
        for fact in found:
            if fact.subject is None:
                raise RequestError(
                    f"{self.config.facts}: the fact {fact.prompt!r} has no subject to train on"
                )
        return found

    def _kept_at(self, fingerprint: str, layers: int) -> Path:
        trained = self.config.model_dump(exclude={"strength", "facts", "preset", "layer"})
        facts = [fact.model_dump(mode="json") for fact in self._facts()]
        content = [VERSION, fingerprint, self.layers(layers), self.seed, trained, facts]
        return kept_in("mediators", json.dumps(content, sort_keys=True), ".safetensors")

    def preparations(self, shape: Shape) -> list[Preparation]:
        facts = len(self._facts())
        path = self._kept_at(shape.fingerprint, shape.layers)
        # Forward, backward, and forward once more for what is to stay.
        tokens = 4 * self.config.epochs * facts * FACT_TOKENS
        return [Preparation(f"a map from attributes to directions ({facts} facts)", path, tokens)]

    def shown(self, prepared: Mediator) -> list[str]:
        told = f"map trained on {prepared.facts} facts"
        if prepared.held:
            told += (
                f"; of {prepared.held} others the new answer's mean NLL went from "
                f"{prepared.before:.2f} to {prepared.after:.2f}"
            )
        return [told]


def _tensors(made: Mediator) -> dict[str, Tensor]:
    told = torch.tensor([made.facts, made.held, made.before, made.after], dtype=torch.float64)
    return {"weight": made.weight_DD, "bias": made.bias_D, "told": told}


def _loaded(tensors: dict[str, Tensor]) -> Mediator:
    facts, held, before, after = tensors["told"].tolist()
    return Mediator(tensors["weight"], tensors["bias"], int(facts), int(held), before, after)
