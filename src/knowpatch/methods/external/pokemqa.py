"""PokeMQA: multi-hop questions by sub-questions, with the checking taken away from the model.

Gu et al. (arXiv 2312.15194). The loop is in parts/procedure_kinds/scoped.py. Whether a fact answers
a sub-question is decided by the family's calibrated gate (parts/gated.py); the paper trains a
detector in two stages for it, which comes with the learned editors. The worked examples are the
library's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from knowpatch.method import register
from knowpatch.models.view import ModelView
from knowpatch.parts.gated import Gated, GatedConfig, Prepared
from knowpatch.parts.procedure_kinds.scoped import scoped
from knowpatch.parts.relations import asked_too
from knowpatch.patch import Patch
from knowpatch.request import EditRequest


class PokemqaConfig(GatedConfig):
    """Options of PokeMQA."""

    hops: int = Field(5, ge=1, description="sub-questions at most")


@register("pokemqa")
class Pokemqa(Gated):
    """Takes apart; a scope test decides which answers are facts."""

    name = "pokemqa"
    family = "external"
    paper = "Gu et al. 2023, arXiv 2312.15194"
    summary = "the model takes a question apart; a scope test says which parts a fact answers"
    choose = "as mello, where the model takes questions apart well and checks them badly"
    Config = PokemqaConfig

    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: Prepared, state: Any
    ) -> Patch:
        book = self.book(view, list(map(asked_too, requests)), prepared)
        least = self.least(prepared)
        procedure = scoped(book, prepared.encoder, least, self.config.hops)
        return self.patch(view, requests, procedure=procedure)
