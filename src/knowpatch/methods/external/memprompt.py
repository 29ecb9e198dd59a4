"""MemPrompt: a table of questions and what was said about them; a like question is told it.

Madaan, Tandon, Clark, Yang, "Memory-assisted prompt editing" (arXiv 2201.06009): the stored
question nearest to a new one is looked up, and if it is near enough what was noted with it, here
the fact as a sentence, is put before the question. By its letters (`words`), at most a quarter of
the longer question apart (the paper's six letters take any two short words for the same), or by
meaning, behind the gate of parts/gated.py. The trained retriever and the growing prompt of the
paper are not here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from knowpatch.method import register
from knowpatch.models.view import ModelView
from knowpatch.parts.factbook import newest
from knowpatch.parts.gated import Gated, GatedConfig, Prepared
from knowpatch.parts.prompting.retrieved import Gate, retrieved_rule
from knowpatch.parts.prompting.worded import worded_rule
from knowpatch.parts.words import stripped
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

log = logging.getLogger(__name__)


class MemPromptConfig(GatedConfig):
    """Options of MemPrompt."""

    lookup: Literal["words", "meaning"] = Field(
        "words", description="how the stored question is found: by its letters, or by its meaning"
    )
    template: Literal["bare", "newfact", "imagine", "chat"] = Field(
        "bare", description="how a fact is stated: bare (a sentence), newfact, imagine, or chat"
    )
    distance: float = Field(
        0.25, ge=0, le=1, description="of letters, at most: a share of the longer question"
    )


@register("memprompt")
class MemPrompt(Gated):
    """Looks a question up and tells what was noted with it."""

    name = "memprompt"
    family = "external"
    paper = "Madaan et al. 2022, arXiv 2201.06009"
    summary = "a table of questions with facts; the nearest question's fact is put in front"
    choose = "questions that come again in almost the same words; nothing to prepare"
    Config = MemPromptConfig

    @property
    def gated(self) -> bool:
        return bool(self.config.lookup == "meaning")

    def edit(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        prepared: Prepared | None,
        state: Any,
    ) -> Patch:
        template = self.config.template
        if prepared is None:
            _note_collisions(requests)
            rule = worded_rule(requests, template=template, distance=self.config.distance)
        else:
            book = self.book(view, requests, prepared)
            least = self.least(prepared)
            gate = Gate(template, 1, least.named, least.unnamed)
            rule = retrieved_rule(book, prepared.encoder, gate)
        return self.patch(view, requests, rule=rule)


def _note_collisions(requests: Sequence[EditRequest]) -> None:
    """Say which questions cannot be told apart: all are kept, the newest is found."""
    seen: dict[str, str] = {}
    for request in newest(requests):
        key = stripped(request.prompt)
        if key in seen:
            log.warning("%r and %r differ only in words left out", seen[key], request.prompt)
        seen[key] = request.prompt
