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
from typing import Any, Literal

from pydantic import Field

from knowpatch.method import register
from knowpatch.models.view import ModelView
from knowpatch.parts.gated import Gated, GatedConfig, Prepared
from knowpatch.parts.prompting.retrieved import Gate, retrieved_rule
from knowpatch.patch import Patch
from knowpatch.request import EditRequest


class ScrConfig(GatedConfig):
    """Options of SCR."""

    template: Literal["newfact", "imagine", "chat"] = Field(
        "newfact", description="how a fact is stated: newfact, imagine, or chat (a system turn)"
    )
    limit: int = Field(1, ge=1, description="facts shown with a question, at most")
    confirm: Literal["rule", "model"] = Field(
        "rule", description="whether the model is asked as well if the fact helps"
    )


@register("scr")
class Scr(Gated):
    """Retrieves, confirms, then answers."""

    name = "scr"
    family = "external"
    paper = "He et al. 2025, arXiv 2503.05212"
    summary = "a memory of facts; one is put before a question that it is found to be about"
    choose = "thousands of facts that change often, with no side effects; questions cost a search"
    Config = ScrConfig

    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: Prepared, state: Any
    ) -> Patch:
        book = self.book(view, requests, prepared)
        return self.patch(
            view, requests, rule=retrieved_rule(book, prepared.encoder, self.gate(prepared))
        )

    def gate(self, prepared: Prepared) -> Gate:
        """When a fact may be shown."""
        config, least = self.config, self.least(prepared)
        odds = 0.0 if config.confirm == "model" else None
        return Gate(config.template, config.limit, least.named, least.unnamed, odds)
