"""ICE: in-context editing. The new fact is put in front of every question, and nothing else.

Cohen et al., "Evaluating the Ripple Effects of Knowledge Editing in Language Models" (arXiv
2307.12976), template `imagine`; the KnowEdit benchmark's variant (arXiv 2401.01286), `newfact`. It
never abstains: a question about something else sees the fact too, unless `gate` puts the facts
behind a calibrated one (parts/gated.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from knowpatch.method import register
from knowpatch.models.view import ModelView
from knowpatch.parts.gated import Gated, GatedConfig, Prepared
from knowpatch.parts.prompting.facts import facts_rule
from knowpatch.parts.prompting.retrieved import Gate, retrieved_rule
from knowpatch.patch import Patch
from knowpatch.request import EditRequest


class IceConfig(GatedConfig):
    """Options of ICE."""

    template: Literal["newfact", "imagine", "chat"] = Field(
        "newfact", description="how the fact is stated: newfact, imagine, or chat (a system turn)"
    )
    limit: int = Field(5, ge=1, description="facts shown with a question, at most")
    gate: bool = Field(
        False, description="show facts only to questions that they are found to be about"
    )


@register("ice")
class Ice(Gated):
    """States the facts before each question."""

    name = "ice"
    family = "external"
    paper = "Cohen et al. 2023, arXiv 2307.12976"
    summary = "puts the fact in front of every question; no weight changes"
    choose = "to try a fact at once, or where weights cannot be touched"
    Config = IceConfig

    @property
    def gated(self) -> bool:
        return bool(self.config.gate)

    def edit(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        prepared: Prepared | None,
        state: Any,
    ) -> Patch:
        template, limit = self.config.template, self.config.limit
        if prepared is None:
            rule = facts_rule(requests, template=template, limit=limit)
        else:
            least, book = self.least(prepared), self.book(view, requests, prepared)
            gate = Gate(template, limit, least.named, least.unnamed)
            rule = retrieved_rule(book, prepared.encoder, gate)
        return self.patch(view, requests, rule=rule)
