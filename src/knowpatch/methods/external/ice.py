"""ICE: in-context editing. The new fact is put in front of every question, and nothing else.

Cohen et al., "Evaluating the Ripple Effects of Knowledge Editing in Language Models" (arXiv
2307.12976), template `imagine`; the KnowEdit benchmark's variant (arXiv 2401.01286), `newfact`. It
never abstains: a question about something else sees the fact too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from knowpatch.method import Cost, EditMethod, MethodConfig, Shape, register
from knowpatch.models.view import ModelView
from knowpatch.parts.prompting.facts import facts_rule
from knowpatch.patch import Patch
from knowpatch.request import EditRequest


class IceConfig(MethodConfig):
    """Options of ICE."""

    template: Literal["newfact", "imagine", "chat"] = Field(
        "newfact", description="how the fact is stated: newfact, imagine, or chat (a system turn)"
    )
    limit: int = Field(5, ge=1, description="facts shown with a question, at most")


@register("ice")
class Ice(EditMethod):
    """States the facts before each question."""

    name = "ice"
    family = "external"
    paper = "Cohen et al. 2023, arXiv 2307.12976"
    summary = "puts the fact in front of every question; no weight changes"
    choose = "to try a fact at once, or where weights cannot be touched"
    exports = ("context",)
    Config = IceConfig

    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: Any, state: Any
    ) -> Patch:
        rule = facts_rule(requests, template=self.config.template, limit=self.config.limit)
        return self.patch(view, requests, rule=rule)

    def cost(self, shape: Shape, lengths: Sequence[int]) -> Cost:
        return Cost(forward_tokens=0)
