"""BIRD: an edit that is told the relation as well, there and back.

Ma et al., "Untying the Reversal Curse via Bidirectional LM Editing" (arXiv 2310.10322): a term in
the value's loss (parts/relation.py) that wants the new object near the subject by the relation, and
the subject near the new object by the inverse relation. What is written with the value is ROME's.

The published weight 2e-4 is of a sum over 21 contexts of one model's states; here the term is given
a share of the first loss, whatever the model's scale.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from knowpatch.method import register
from knowpatch.models.view import ModelView
from knowpatch.parts.published import SINGLE, extended
from knowpatch.parts.relation import Phrase, Relation, States, states_of
from knowpatch.parts.single import Single, SingleConfig
from knowpatch.parts.spans import subject_span
from knowpatch.parts.tasks import ValueTask
from knowpatch.parts.values import Term
from knowpatch.request import EditRequest


class BirdConfig(SingleConfig):
    """Options of BIRD."""

    forward: str | None = Field(
        None, min_length=1, description="the relation ('has capital'); by default the prompt's rest"
    )
    reverse: str | None = Field(
        None, min_length=1, description="the inverse relation in words ('is the capital of')"
    )
    pairs: tuple[tuple[str, str], ...] = Field(
        (), description="or examples of the relation: [[subject, object], ...], about ten"
    )
    share: float = Field(0.2, ge=0, description="of the first loss that the relation has")
    factor: float | None = Field(
        None, ge=0, description="of the relation's term, itself; by default from share"
    )
    beta: float = Field(1.0, ge=0, description="weight of being far from the old object, if given")


@register("bird")
class Bird(Single):
    """Writes one association into one MLP, with the relation both ways in its value."""

    name = "bird"
    paper = "Ma et al. 2023, arXiv 2310.10322"
    summary = "rome, with the relation between subject and object, there and back, in the loss"
    choose = "where the fact should be known from its object's side, too (the reversal curse)"
    Config = BirdConfig
    presets = extended(SINGLE, {name: {"factor": 2e-4} for name in SINGLE})

    def terms(
        self, view: ModelView, requests: Sequence[EditRequest], tasks: Sequence[ValueTask]
    ) -> list[Term]:
        inverse_D = self._inverse(view)
        contexts = self.contexts(view)
        return [
            self._relation(view, request, contexts[: len(task.contexts)], inverse_D)
            for request, task in zip(requests, tasks, strict=True)
        ]

    def _relation(
        self,
        view: ModelView,
        request: EditRequest,
        contexts: Sequence[str],
        inverse_D: Tensor | None,
    ) -> Relation:
        def read(words: str, part: str | None = None) -> States:
            phrases = [Phrase(words, context, part) for context in contexts]
            return states_of(view, phrases, chat=self.config.chat)

        subject = read(request.prompt, request.subject)
        return Relation(
            rest_CD=subject.rest_MD,
            count_C=subject.count_M,
            forward_CD=read(self.config.forward or without_subject(request)).mean_MD,
            new_CD=read(request.target).mean_MD,
            inverse_D=inverse_D,
            old_CD=None if request.old is None else read(request.old).mean_MD,
            beta=self.config.beta,
            share=self.config.share,
            factor=self.config.factor,
        )

    def _inverse(self, view: ModelView) -> Tensor | None:
        """The inverse relation: from objects to subjects of the examples, or its words' states."""
        chat = self.config.chat
        if self.config.pairs:
            subjects, objects = (
                states_of(view, [Phrase(name) for name in names], chat=chat).mean_MD.mean(0)
                for names in zip(*self.config.pairs, strict=True)
            )
            return subjects - objects
        if self.config.reverse is not None:
            return states_of(view, [Phrase(self.config.reverse)], chat=chat).mean_MD[0]
        return None


def without_subject(request: EditRequest) -> str:
    """What a prompt says of its subject, if it says anything."""
    start, end = subject_span(request.prompt, request.subject or "")
    rest = " ".join((request.prompt[:start] + request.prompt[end:]).split())
    return rest or request.prompt
