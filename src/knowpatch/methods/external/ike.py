"""IKE: a fact behind worked examples of edits, from which the model learns what to do with it.

Zheng et al., "Can We Edit Factual Knowledge by In-Context Learning?" (arXiv 2305.12740), section 4:
demonstrations that copy, update and retain, near to the fact, the most similar last, then the
fact's own. `easyedit` is EasyEdit's variant: the nearest demonstrations of whatever kind, found by
their whole text, and without the fact's own. A single fact is always shown, as in the paper;
several stand behind a calibrated gate (parts/gated.py). The paper compares perplexities of whole
answers; here the context is a prompt like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from knowpatch.method import Preparation, Shape, register
from knowpatch.models.view import ModelView
from knowpatch.parts.calibration import about_others
from knowpatch.parts.demonstrations import (
    ANSWER,
    Corpus,
    answers_at,
    file_records,
    pilot_records,
)
from knowpatch.parts.encoders import encoder_of
from knowpatch.parts.factbook import newest
from knowpatch.parts.gated import Gated, GatedConfig, Prepared
from knowpatch.parts.prompting.demonstrations import Showing, demonstrations_rule
from knowpatch.patch import Patch
from knowpatch.request import EditRequest


class IkeConfig(GatedConfig):
    """Options of IKE."""

    demonstrations: int = Field(16, ge=0, description="worked examples before a fact, at most")
    variant: Literal["paper", "easyedit"] = Field(
        "paper", description="paper: kinds 1:3:4, then the fact's own; easyedit: the nearest of any"
    )
    corpus: str | None = Field(
        None,
        description="JSON lines of cases that examples are made of (docs/data.md); by default "
        "facts that ship with the library",
    )
    most: int = Field(1000, ge=1, description="cases of that file that are read, from the top")
    gate: Literal["auto", "always"] = Field(
        "auto", description="of several facts: auto (only where a question is about one) or always"
    )
    tokens: int | None = Field(
        None, ge=1, description="of a whole prompt, at most; by default what the model takes"
    )


@dataclass(frozen=True)
class Ready(Prepared):
    """The gate's calibrations, and what demonstrations are made of."""

    corpus: Corpus


@register("ike")
class Ike(Gated):
    """Demonstrates, then states the fact."""

    name = "ike"
    family = "external"
    paper = "Zheng et al. 2023, arXiv 2305.12740"
    summary = "puts worked examples of edits and the fact in front of a question"
    choose = "where weights cannot be touched and the model follows examples better than orders"
    Config = IkeConfig

    def prepare(self, view: ModelView) -> Ready:
        gate = super().prepare(view)
        assert gate is not None
        config = self.config
        if config.corpus is None:
            records = pilot_records(view, self.progress)
        else:
            records = file_records(Path(config.corpus), config.most)
        encoder = encoder_of(gate.encoder, view)
        corpus = Corpus.of(records, config.variant, encoder, view.fingerprint, self.progress)
        return Ready(gate.encoder, gate.named, gate.unnamed, corpus)

    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: Ready, state: Any
    ) -> Patch:
        config, corpus, facts = self.config, prepared.corpus, newest(requests)
        vectors = encoder_of(prepared.encoder, view).encode([corpus.asked(fact) for fact in facts])
        near = [
            corpus.near(fact, vector_E, config.demonstrations, self.seed)
            for fact, vector_E in zip(facts, vectors, strict=True)
        ]
        least = self.least(prepared)
        own, always = config.variant == "paper", config.gate == "always"
        showing = Showing(own, always, config.tokens, least.named, least.unnamed)
        book = self.book(view, requests, prepared)
        rule = demonstrations_rule(book, prepared.encoder, near, showing)
        return self.patch(view, requests, rule=rule)

    def preparations(self, shape: Shape) -> list[Preparation]:
        found = super().preparations(shape)
        if self.config.corpus is None:
            tokens = ANSWER * sum(map(len, about_others()))
            what = "what the model says of other subjects, for worked examples"
            found.append(Preparation(what, answers_at(shape.fingerprint), tokens))
        return found
