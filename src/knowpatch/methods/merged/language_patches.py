"""Language patches: a fact in words, mixed into the prediction as far as a question is about it.

Murty et al., "Fixing Model Bugs with Natural Language Patches" (arXiv 2211.03318): a gate says
whether a patch's condition holds, an interpreter predicts with its consequence, and the output is
the mixture of that and the plain prediction by the gate. Here both are the edited model itself,
read with the fact before the question and without (models/mixing.py), and the gate is a sigmoid of
how alike question and prompt are in the model's own states, about thresholds that are calibrated on
it (parts/gated.py). Nothing is trained; the published gate is a decoder that is, on synthetic
patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from knowpatch.method import register
from knowpatch.models.view import ModelView
from knowpatch.parts.encoders import OWN
from knowpatch.parts.gated import Gated, GatedConfig, Prepared
from knowpatch.parts.prompting.mixture import mixture_rule
from knowpatch.patch import Patch
from knowpatch.request import EditRequest


class LanguagePatchesConfig(GatedConfig):
    """Options of language patches."""

    encoder: str = Field(
        OWN,
        description="own (the model's states), auto, all-MiniLM-L6-v2, a folder, or a "
        "sentence-transformers model",
    )
    slope: float = Field(25.0, gt=0, description="how steep the gate is at its threshold")
    template: Literal["newfact", "imagine", "chat"] = Field(
        "newfact", description="how a fact is stated: newfact, imagine, or chat (a system turn)"
    )


@register("language_patches")
class LanguagePatches(Gated):
    """Mixes two readings of a question."""

    name = "language_patches"
    family = "merged"
    paper = "Murty et al. 2022, arXiv 2211.03318"
    summary = "a fact in words, mixed into the probabilities by a gate; no weight changes"
    choose = "corrections in words that fade out softly as a question is less about them"
    Config = LanguagePatchesConfig

    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: Prepared, state: Any
    ) -> Patch:
        book, config = self.book(view, requests, prepared), self.config
        rule = mixture_rule(
            book, prepared.encoder, self.least(prepared), config.slope, config.template
        )
        return self.patch(view, requests, rule=rule)
