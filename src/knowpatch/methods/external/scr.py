"""SCR: a memory of facts; a question is shown the one it is about, if there is one.

He, Song, Sun, "Selective contextual reasoning" (arXiv 2503.05212): facts are searched by meaning,
what is found is confirmed, and only then put before the question; else the model answers as it
came, bit for bit. Confirmation is by a calibrated rule (parts/prompting/retrieved.py): cosines from
which prompts count as asking the same, one for questions that name the fact's subject (found where
other words for a prompt part best from other questions about its subject) and one for those that do
not (which one in a hundred prompts about something else passes). `confirm=model` also asks the
model; a small one answers that next to chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from knowpatch.method import Cost, EditMethod, MethodConfig, Preparation, Shape, register
from knowpatch.models.view import ModelView
from knowpatch.parts import calibration
from knowpatch.parts.calibration import Asked, Calibration, calibrate
from knowpatch.parts.encoders import AUTO, chosen, encoder_of
from knowpatch.parts.factbook import Factbook, names, readings
from knowpatch.parts.prompting.retrieved import Gate, retrieved_rule
from knowpatch.patch import Patch
from knowpatch.request import EditRequest


class ScrConfig(MethodConfig):
    """Options of SCR."""

    encoder: str = Field(
        AUTO,
        description="auto, all-MiniLM-L6-v2, own (the model's states), a folder, or a "
        "sentence-transformers model",
    )
    template: Literal["newfact", "imagine", "chat"] = Field(
        "newfact", description="how a fact is stated: newfact, imagine, or chat (a system turn)"
    )
    limit: int = Field(1, ge=1, description="facts shown with a question, at most")
    named: float | None = Field(
        None, description="least cosine of a question that names the subject; by default calibrated"
    )
    unnamed: float | None = Field(
        None, description="least cosine of one that does not; by default calibrated"
    )
    confirm: Literal["rule", "model"] = Field(
        "rule", description="whether the model is asked as well if the fact helps"
    )


@dataclass(frozen=True)
class Prepared:
    """The encoder's name, and the two calibrations; None where the option is given."""

    encoder: str
    named: Calibration | None
    unnamed: Calibration | None


@register("scr")
class Scr(EditMethod):
    """Retrieves, confirms, then answers."""

    name = "scr"
    family = "external"
    paper = "He et al. 2025, arXiv 2503.05212"
    summary = "a memory of facts; one is put before a question that it is found to be about"
    choose = "thousands of facts that change often, with no side effects; questions cost a search"
    exports = ("context",)
    Config = ScrConfig

    def prepare(self, view: ModelView) -> Prepared:
        name = chosen(self.config.encoder)
        named = unnamed = None
        if self.config.named is None:
            others = calibration.other_questions()
            named = self._calibrated(view, name, "named", _of_its_subject, others)
        if self.config.unnamed is None:
            unnamed = self._calibrated(view, name, "unnamed", _cosines, None)
        return Prepared(name, named, unnamed)

    def _calibrated(
        self, view: ModelView, name: str, what: str, scores: Any, outside: Sequence[Asked] | None
    ) -> Calibration:
        def keys(asked: Sequence[Asked]) -> Any:
            encoder = encoder_of(name, view)
            texts = [readings(one.prompt) for one in asked]
            flat = encoder.encode([text for some in texts for text in some], self.progress)
            return asked, flat.split([len(some) for some in texts])

        reading = self._reading(name, what)
        return calibrate(view.fingerprint, reading, "similarity", keys, scores, outside=outside)

    @staticmethod
    def _reading(encoder: str, what: str) -> dict[str, Any]:
        return {"read": "sentences", "encoder": encoder, "gate": what}

    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: Prepared, state: Any
    ) -> Patch:
        book = Factbook.of(requests, encoder_of(prepared.encoder, view), self.progress)
        return self.patch(
            view, requests, rule=retrieved_rule(book, prepared.encoder, self.gate(prepared))
        )

    def gate(self, prepared: Prepared) -> Gate:
        """When a fact may be shown."""
        config = self.config
        named = config.named if prepared.named is None else prepared.named.parting()
        unnamed = config.unnamed if prepared.unnamed is None else prepared.unnamed.threshold()
        odds = 0.0 if config.confirm == "model" else None
        # A question without the name is never accepted sooner than one with it.
        return Gate(config.template, config.limit, named, max(named, unnamed), odds)

    def shown(self, prepared: Prepared) -> list[str]:
        gate, found = self.gate(prepared), []
        if prepared.named is not None:
            found.append(f"the subject is named: {prepared.named.told(gate.named)}")
        if prepared.unnamed is not None:
            found.append(f"it is not: {prepared.unnamed.told(gate.unnamed)}")
        return found

    def preparations(self, shape: Shape) -> list[Preparation]:
        name, found = chosen(self.config.encoder), []
        for what, outside in (("named", calibration.other_questions()), ("unnamed", None)):
            if getattr(self.config, what) is None:
                path = calibration.kept_at(shape.fingerprint, self._reading(name, what), outside)
                found.append(
                    Preparation(f"from which likeness on a fact is shown ({what})", path, 0)
                )
        return found

    def cost(self, shape: Shape, lengths: Sequence[int]) -> Cost:
        return Cost(forward_tokens=0)


def _cosines(queries: Any, keys: Any) -> Tensor:
    """Cosines of prompts with stored prompts (Q, N), each prompt by its nearer reading."""
    (_, read), (_, stored) = queries, keys
    bank_NE = torch.stack([vectors[0] for vectors in stored])
    return torch.stack([(vectors @ bank_NE.T).amax(0) for vectors in read])


def _of_its_subject(queries: Any, keys: Any) -> Tensor:
    """The same among prompts about the subject that is named, -1 for others."""
    scores_QN = _cosines(queries, keys)
    for row, query in enumerate(queries[0]):
        for column, key in enumerate(keys[0]):
            if not names(query.prompt, key.subject):
                scores_QN[row, column] = -1.0
    return scores_QN
