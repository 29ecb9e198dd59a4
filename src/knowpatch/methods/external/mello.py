"""MeLLo: multi-hop questions by sub-questions, each checked against a memory of edits.

Zhong et al., "MQuAKE" (arXiv 2305.14795). The loop is in parts/procedure_kinds/selfcheck.py, the
memory and its gate are those of the family (parts/gated.py). `verdict=model` is the published form,
in which the model says whether a fact contradicts its own answer; the gate says so by default,
since a small model cannot. The worked examples are the library's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from knowpatch.method import register
from knowpatch.models.view import ModelView
from knowpatch.parts.gated import Gated, GatedConfig, Prepared
from knowpatch.parts.procedure_kinds.selfcheck import selfcheck
from knowpatch.parts.relations import asked_too
from knowpatch.patch import Patch
from knowpatch.request import EditRequest


class MelloConfig(GatedConfig):
    """Options of MeLLo."""

    verdict: Literal["gate", "model"] = Field(
        "gate", description="who says whether a fact contradicts the model's answer"
    )
    hops: int = Field(4, ge=1, description="sub-questions at most")


@register("mello")
class Mello(Gated):
    """Takes apart, retrieves, checks."""

    name = "mello"
    family = "external"
    paper = "Zhong et al. 2023, arXiv 2305.14795"
    summary = "the model takes a question apart; each sub-answer is checked against a fact memory"
    choose = "questions that need a chain of edited facts, on a model that follows examples"
    Config = MelloConfig

    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: Prepared, state: Any
    ) -> Patch:
        book = self.book(view, list(map(asked_too, requests)), prepared)
        least = self.least(prepared)
        verdict, hops = self.config.verdict, self.config.hops
        procedure = selfcheck(book, prepared.encoder, least, verdict, hops)
        return self.patch(view, requests, procedure=procedure)
