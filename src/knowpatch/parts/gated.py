"""Gated memories of facts: from which likeness on a fact is what a question is about.

What the methods share that keep facts in a book and let one speak only where it is confirmed: their
options, and the calibration of two cosines, one for questions that name the fact's subject (found
where other words for a prompt part best from other questions about its subject) and one for those
that do not (which one in a hundred prompts about something else passes).
Axes: N keys, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field
from torch import Tensor, stack

from knowpatch.method import Cost, EditMethod, MethodConfig, Preparation, Shape
from knowpatch.models.view import ModelView
from knowpatch.parts import calibration
from knowpatch.parts.calibration import Asked, Calibration, calibrate
from knowpatch.parts.encoders import AUTO, chosen, encoder_of
from knowpatch.parts.factbook import Factbook, Least, names, readings
from knowpatch.request import EditRequest


class GatedConfig(MethodConfig):
    """Options of a gated memory."""

    encoder: str = Field(
        AUTO,
        description="auto, all-MiniLM-L6-v2, own (the model's states), a folder, or a "
        "sentence-transformers model",
    )
    named: float | None = Field(
        None, description="least cosine of a question that names the subject; by default calibrated"
    )
    unnamed: float | None = Field(
        None, description="least cosine of one that does not; by default calibrated"
    )


@dataclass(frozen=True)
class Prepared:
    """The encoder's name, and the two calibrations; None where the option is given."""

    encoder: str
    named: Calibration | None
    unnamed: Calibration | None


class Gated(EditMethod):
    """A method whose facts speak only where a question is near enough."""

    Config = GatedConfig

    @property
    def gated(self) -> bool:
        """Whether this configuration has a gate at all; without one nothing is prepared."""
        return True

    def prepare(self, view: ModelView) -> Prepared | None:
        if not self.gated:
            return None
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

    def book(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: Prepared
    ) -> Factbook:
        """The requests as a book, read by the encoder."""
        return Factbook.of(requests, encoder_of(prepared.encoder, view), self.progress)

    def least(self, prepared: Prepared) -> Least:
        """From which cosines on a fact may speak."""
        config = self.config
        named = config.named if prepared.named is None else prepared.named.parting()
        unnamed = config.unnamed if prepared.unnamed is None else prepared.unnamed.threshold()
        # A question without the name is never accepted sooner than one with it.
        return Least(named, max(named, unnamed))

    def shown(self, prepared: Prepared | None) -> list[str]:
        if prepared is None:
            return []
        least = self.least(prepared)
        found = []
        if prepared.named is not None:
            found.append(f"the subject is named: {prepared.named.told(least.named)}")
        if prepared.unnamed is not None:
            found.append(f"it is not: {prepared.unnamed.told(least.unnamed)}")
        return found

    def preparations(self, shape: Shape) -> list[Preparation]:
        name, found = chosen(self.config.encoder), []
        for what, outside in (("named", calibration.other_questions()), ("unnamed", None)):
            if self.gated and getattr(self.config, what) is None:
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
    bank_NE = stack([vectors[0] for vectors in stored])
    return stack([(vectors @ bank_NE.T).amax(0) for vectors in read])


def _of_its_subject(queries: Any, keys: Any) -> Tensor:
    """The same among prompts about the subject that is named, -1 for others."""
    scores_QN = _cosines(queries, keys)
    for row, query in enumerate(queries[0]):
        for column, key in enumerate(keys[0]):
            if not names(query.prompt, key.subject):
                scores_QN[row, column] = -1.0
    return scores_QN
