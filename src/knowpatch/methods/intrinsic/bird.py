"""BIRD: an edit that is told the relation as well, there and back.

Ma et al., "Untying the Reversal Curse via Bidirectional LM Editing" (arXiv 2310.10322): a term in
the value's loss (parts/relation.py) that wants the new object near the subject by the relation, and
the subject near the new object by the inverse relation. What is written with the value is ROME's.

The published weight 2e-4 is of a sum over 21 contexts of one model's states; here the term is given
a share of the first loss, whatever the model's scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from knowpatch.errors import RequestError
from knowpatch.method import register
from knowpatch.models.view import ModelView
from knowpatch.parts.published import SINGLE, extended
from knowpatch.parts.relation import Phrase, Relation, States, states_of
from knowpatch.parts.single import Prepared, Single, SingleConfig
from knowpatch.parts.values import Term
from knowpatch.request import EditRequest


class BirdConfig(SingleConfig):
    """Options of BIRD. The relation is that of all facts of a call."""

    overruled: ClassVar[Mapping[str, str]] = {"share": "factor"}

    forward: str | None = Field(
        None, description="the relation ('has capital'); by default what the prompt says besides"
    )
    reverse: str | None = Field(
        None, description="the inverse relation in words ('is the capital of')"
    )
    pairs: tuple[tuple[str, str], ...] = Field(
        (), description="or examples of the relation: [[subject, object], ...], about ten"
    )
    share: float = Field(0.2, ge=0, description="of the first loss that the relation has")
    factor: float | None = Field(
        None, ge=0, description="of the relation's term, itself; by default from share"
    )
    beta: float = Field(1.0, ge=0, description="weight of being far from the old object, if given")

    @field_validator("forward", "reverse", "pairs")
    @classmethod
    def _filled(cls, given: Any) -> Any:
        texts = (
            [given] if isinstance(given, str) else [text for pair in given or () for text in pair]
        )
        if not all(text.strip() for text in texts):
            raise ValueError("there is nothing in it to read")
        return given

    @model_validator(mode="after")
    def _one_inverse(self) -> Self:
        if self.pairs and self.reverse is not None:
            raise ValueError("reverse and pairs both say what leads back: give one of them")
        return self


@dataclass(frozen=True, eq=False)
class Told(Prepared):
    """What is prepared, and the inverse relation, if anything tells it."""

    inverse_D: Tensor | None


@register("bird")
class Bird(Single):
    """Writes one association into one MLP, with the relation both ways in its value."""

    name = "bird"
    paper = "Ma et al. 2023, arXiv 2310.10322"
    summary = "rome, with the relation between subject and object in the loss, there and back"
    choose = "to have a fact known from its object, too (the reversal curse): give reverse or pairs"
    Config = BirdConfig
    presets = extended(
        SINGLE, {name: {"factor": 2e-4} for name in ("gpt2-xl", "gpt-j-6b", "llama-2-7b")}
    )

    def check_requests(self, requests: Sequence[EditRequest]) -> None:
        super().check_requests(requests)
        for request in requests:
            if not (self.config.forward or without_subject(request)):
                raise RequestError(
                    f"the prompt {request.prompt!r} says nothing besides its subject: give the "
                    "option forward, the relation in words"
                )

    def prepare(self, view: ModelView) -> Told:
        return Told(**vars(super().prepare(view)), inverse_D=self._inverse(view))

    def terms(self, view: ModelView, requests: Sequence[EditRequest], prepared: Told) -> list[Term]:
        groups = [self._phrases(request) for request in requests]
        contexts = prepared.contexts
        phrases = [
            Phrase(words, context, part)
            for group in groups
            for words, part in group
            for context in contexts
        ]
        states = iter(states_of(view, phrases, chat=self.config.chat).split(len(contexts)))
        return [
            self._relation([next(states) for _ in group], prepared.inverse_D) for group in groups
        ]

    def _phrases(self, request: EditRequest) -> list[tuple[str, str | None]]:
        """Subject (as a part of the prompt), relation, new object and, if there is one, the old."""
        objects = (request.target, request.old)
        relation = self.config.forward or without_subject(request)
        others = [(text, None) for text in (relation, *objects) if text is not None]
        return [(request.prompt, request.subject), *others]

    def _relation(self, states: Sequence[States], inverse_D: Tensor | None) -> Relation:
        subject, forward, new, *old = states
        return Relation(
            rest_CD=subject.rest_MD,
            count_C=subject.count_M,
            forward_CD=forward.mean_MD,
            new_CD=new.mean_MD,
            inverse_D=inverse_D,
            old_CD=old[0].mean_MD if old else None,
            beta=self.config.beta,
            share=self.config.share,
            factor=self.config.factor,
        )

    def _inverse(self, view: ModelView) -> Tensor | None:
        """The inverse relation: from objects to subjects of the examples, or its words' states."""
        chat = self.config.chat
        if self.config.pairs:
            subjects_D, objects_D = (
                states_of(view, [Phrase(name) for name in names], chat=chat).mean_MD.mean(0)
                for names in zip(*self.config.pairs, strict=True)
            )
            return subjects_D - objects_D
        if self.config.reverse is not None:
            return states_of(view, [Phrase(self.config.reverse)], chat=chat).mean_MD[0]
        return None


def without_subject(request: EditRequest) -> str:
    """What a prompt says besides its subject."""
    return " ".join(request.prompt.replace(request.subject or "", " ").split())
