"""NeuralDB: an explicit table of keys and residuals, gated by the cosine.

Fei et al., "NeuralDB" (arXiv 2507.18028). A linear locate-then-edit update is a soft query of a
table; here the table itself stands beside the MLP output map of one block:

    y = W k + r_j   where cos(k, k_j) > gamma for the nearest key k_j, else y = W k

k_j is what enters the map at the subject's last token, averaged over contexts, and r_j what must be
added there for the target to follow. The gate protects all other text, so that no key statistics
are needed, and so that the value may be trained harder than one that is written into weights.

Where this is not the paper (whose code is not published): values and keys are read behind other
wordings, too (parts/wordings.py); one block; keys are centred by a mean
before the cosine is taken, gamma is calibrated, and the subject's last token must match
(parts/kinds/residuals.py). Where the bare prompt's own key is foreign to that behind other text, it
is an entry of its own. Facts of one call about one subject share one residual, trained on them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from knowpatch.errors import RequestError
from knowpatch.method import Preparation, Shape, register
from knowpatch.models.roles import at_depth
from knowpatch.models.view import ModelView
from knowpatch.parts.calibration import Asked, Calibration, calibrate, kept_at
from knowpatch.parts.inputs import centre, read_inputs
from knowpatch.parts.kinds.residuals import Entry, residuals, unit
from knowpatch.parts.tasks import ValueTask, merged
from knowpatch.parts.valued import WORDINGS, Valued, ValuedConfig
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

DEPTH = 6 / 30
"""The block, as a share of the depth; published are 7 or 8 of 32, no better here."""
FOREIGN = 0.8
"""Cosine with the keys behind other text below which the bare prompt's own key is kept as well."""
OPENING = 0.99
"""Threshold of a key that was read behind a text's first token: that very beginning, no other."""
CALIBRATION_TOKENS = 8_000
"""What the prompts to measure with come to, about."""


class NeuralDBConfig(ValuedConfig):
    """Options of NeuralDB."""

    layer: int | None = Field(None, ge=0, description="block; by default 1/5 of the depth")
    kl_factor: float = Field(0.0, ge=0, description="on the drift of what the subject is")
    enough: float = Field(0.005, gt=0, description="stop when the target's mean NLL is below this")
    wordings: bool = Field(True, description=WORDINGS)
    threshold: float | None = Field(
        None, gt=-1, lt=1, description="cosine above which an entry answers; by default calibrated"
    )


@dataclass(frozen=True, eq=False)
class _Prepared:
    contexts: tuple[str, ...]
    mean_I: Tensor
    threshold: float
    calibration: Calibration | None


@dataclass(frozen=True, eq=False)
class _Key:
    """A key (I) with the token it stands at; opens: behind the subject that is the first token."""

    key_I: Tensor
    token: int
    opens: bool


@register("neuraldb")
class NeuralDB(Valued):
    """Adds a residual wherever a subject is recognised."""

    name = "neuraldb"
    family = "merged"
    paper = "Fei et al. 2025, arXiv 2507.18028"
    summary = "a table beside one MLP: where a subject is recognised, its residual is added"
    choose = "many facts about named subjects, also where they are asked in other words"
    Config = NeuralDBConfig

    def layers(self, count: int) -> tuple[int, ...]:
        return (at_depth(DEPTH, count, self.config.layer),)

    def module(self, view: ModelView) -> str:
        return self.value_modules(view)[0]

    # -- preparing ---------------------------------------------------------------------------------

    def prepare(self, view: ModelView) -> _Prepared:
        contexts = self.contexts(view)
        mean_I = centre(view, self.module(view), self.progress)
        if self.config.threshold is not None:
            return _Prepared(contexts, mean_I, self.config.threshold, None)
        found = self._calibrate(view, contexts, mean_I)
        return _Prepared(contexts, mean_I, found.threshold(), found)

    def _calibrate(self, view: ModelView, contexts: tuple[str, ...], mean_I: Tensor) -> Calibration:
        """By pilot facts' keys, and the best of all tokens of a prompt, whatever they are."""
        module, chat = self.module(view), self.config.chat

        def keys(asked: Sequence[Asked]) -> list[Tensor]:
            requests = [
                EditRequest(prompt=one.prompt, subject=one.subject, target="it") for one in asked
            ]
            tasks = [self.task(view, request, contexts) for request in requests]
            return [
                torch.stack([key.key_I for key in keys if not key.opens])
                for keys in self._keys(view, tasks, mean_I)
            ]

        def queries(asked: Sequence[Asked]) -> list[Tensor]:
            prompts = [one.prompt for one in asked]
            read = read_inputs(view, module, prompts, chat=chat, progress=self.progress)
            return [unit(one.inputs_TI[1:], mean_I) for one in read]

        def scores(queries: list[Tensor], keys: list[Tensor]) -> Tensor:
            rows = [
                torch.stack([(key_MI @ query_TI.T).max() for key_MI in keys])
                for query_TI in queries
            ]
            return torch.stack(rows)

        reading = self._reading(self.layers_of(view)[0])
        return calibrate(
            view.fingerprint, reading, "similarity", keys, scores, queries, subjects=True
        )

    def _reading(self, layer: int) -> dict[str, Any]:
        named = ("contexts", "chat", "wordings")
        return {"by": self.name, "of": "subjects", "layer": layer, "seed": self.seed} | {
            name: getattr(self.config, name) for name in named
        }

    # -- editing -----------------------------------------------------------------------------------

    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: _Prepared, state: Any
    ) -> Patch:
        tasks = [self.task(view, request, prepared.contexts) for request in requests]
        about: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            about.setdefault(request.subject or "", []).append(number)
        joint = [merged([tasks[i] for i in numbers]) for numbers in about.values()]
        entries = self._entries(view, list(about), joint, prepared)
        return self._patch(view, requests, [e for mine in entries for e in mine], prepared)

    def edit_each(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: _Prepared, state: Any
    ) -> list[Patch]:
        tasks = [self.task(view, request, prepared.contexts) for request in requests]
        subjects = [request.subject or "" for request in requests]
        return [
            self._patch(view, [request], mine, prepared)
            for request, mine in zip(
                requests, self._entries(view, subjects, tasks, prepared), strict=True
            )
        ]

    def _patch(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        entries: Sequence[Entry],
        prepared: _Prepared,
    ) -> Patch:
        wrap = residuals(self.module(view), entries, prepared.mean_I)
        return self.patch(view, requests, wraps=[wrap])

    def _entries(
        self,
        view: ModelView,
        subjects: Sequence[str],
        tasks: Sequence[ValueTask],
        prepared: _Prepared,
    ) -> list[list[Entry]]:
        """What stands in the table for each subject."""
        values = self.values(view, [_behind(task) for task in tasks])
        return [
            [
                Entry(
                    key.key_I,
                    value.delta_D.cpu(),
                    OPENING if key.opens else prepared.threshold,
                    key.token,
                    subject,
                )
                for key in keys
            ]
            for subject, value, keys in zip(
                subjects, values, self._keys(view, tasks, prepared.mean_I), strict=True
            )
        ]

    def _keys(
        self, view: ModelView, tasks: Sequence[ValueTask], mean_I: Tensor
    ) -> list[list[_Key]]:
        """The keys that each fact is known by."""
        layer = self.layers_of(view)[0]
        facts = self.read(view, layer, [_behind(task) for task in tasks])
        return [
            _keys_of(task, unit(fact.keys_CI, mean_I))
            for task, fact in zip(tasks, facts, strict=True)
        ]

    # -- before an edit ----------------------------------------------------------------------------

    def shown(self, prepared: _Prepared) -> list[str]:
        found = prepared.calibration
        return [] if found is None else [found.told(prepared.threshold)]

    def preparations(self, shape: Shape) -> list[Preparation]:
        items = super().preparations(shape)
        (layer,) = self.layers(shape.layers)
        if self.config.threshold is None:
            path = kept_at(shape.fingerprint, self._reading(layer))
            items.append(Preparation("calibration of the threshold", path, CALIBRATION_TOKENS))
        return items


def _behind(task: ValueTask) -> ValueTask:
    """The task with each subject that is a text's first token read at the token behind it."""
    rows = [replace(row, position=max(1, row.position)) for row in task.contexts]
    if rows[0].end < 2:
        raise RequestError(
            "a prompt that is one token holds nothing to know it by: give a longer one"
        )
    return replace(task, contexts=tuple(rows))


def _keys_of(task: ValueTask, units_CI: Tensor) -> list[_Key]:
    """One for each token that the subject ends in: a tokenizer may see it otherwise at the start
    of a text. It is the mean over the contexts; and the bare prompt's own where that is foreign."""
    ends = [(row.position == 0, row.ids[max(1, row.position)]) for row in task.contexts]
    found = []
    for opens, token in dict.fromkeys(ends):
        mine = [number for number, end in enumerate(ends) if end == (opens, token)]
        key_I = normalize(units_CI[mine].mean(0), dim=0)
        found.append(_Key(key_I, token, opens))
        if mine[0] == 0 and float(units_CI[0] @ key_I) < FOREIGN:
            found.append(_Key(units_CI[0], token, opens))
    return found
