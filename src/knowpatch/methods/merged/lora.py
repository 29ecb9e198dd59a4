"""LoRA: an answer learned by a low-rank change of a few maps.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685):

    W' = W + (alpha / r) B A,   A drawn, B = 0,   A and B trained on the target's cross-entropy.

As an editor each edit is an adapter of its own, trained on the model as edited so far; the adapters
of a sequence stand one behind the other, as one of a higher rank would. What an older one is taken
back from was trained on top of it: taking it back is exact for the weights, not for the training.
The published setting (queries and values of all blocks, 5e-3, dropout 0.1) is a preset, without
the dropout; early blocks' MLPs leave other answers much more as they were.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from knowpatch.method import register
from knowpatch.models.roles import LinearRole
from knowpatch.models.view import ModelView
from knowpatch.parts.adapters import Adapted, Adapter, AdapterConfig
from knowpatch.parts.tuned import Change


class LoraConfig(AdapterConfig):
    """Options of LoRA."""

    rank: int = Field(4, ge=1, description="of each map's change")


@register("lora")
class Lora(Adapted):
    """Trains A and B of each map."""

    name = "lora"
    paper = "Hu et al. 2021, arXiv 2106.09685"
    summary = "a low-rank adapter on a few maps, trained on the answer"
    choose = "edits that ship as a small adapter, without a subject and with nothing to prepare"
    Config = LoraConfig
    depths = (4 / 30, 4 / 30)

    def change(self, view: ModelView, role: LinearRole, prepared: Any, state: Any) -> Change:
        like = role.address.narrow(view.values(role.address.parameter))
        return Adapter(role, like, self.config.rank, self.config.alpha, self.drawn(role))
