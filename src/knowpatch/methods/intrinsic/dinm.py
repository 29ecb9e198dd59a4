"""DINM: a bad reply is replaced in the layer where it differs most from the good one.

Wang et al., "Detoxifying Large Language Models via Knowledge Editing" (arXiv 2403.14472). With the
reply so far (old) and the wanted one (target) to the same prompt, the layer is

    l* = argmax_l | mean state of the wanted reply - mean state of the reply so far |,

and the output map of its MLP is trained on

    NLL(wanted reply | prompt, suffix) + keep KL(before || now), on ordinary text.

The published c = 0.1 in front of the first term is keep = 10 in front of the second.

In the published program the KL term is computed without a graph and changes nothing, and the first
request's layer serves all later ones; here the term has its gradient, and each request its layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from knowpatch.method import register
from knowpatch.models.passes import Tap
from knowpatch.models.roles import LinearRole
from knowpatch.models.view import ModelView
from knowpatch.parts.descent import Example
from knowpatch.parts.spans import continuation
from knowpatch.parts.tuned import Tuned, TunedConfig
from knowpatch.request import EditRequest

REPLY = 24
"""Tokens of the model's own reply, where the reply so far is not given."""


class DinmConfig(TunedConfig):
    """Options of DINM."""

    layer: int | None = Field(
        None, ge=0, description="block to edit; by default where the two replies differ most"
    )
    keep: float = Field(
        10.0, ge=0, description="weight of KL(before || now) on ordinary text (published: 1 / 0.1)"
    )
    suffix: str = Field("", description="text that is put behind the prompt while it is learned")
    eos: bool = Field(True, description="learn to stop after the wanted reply")


@register("dinm")
class Dinm(Tuned):
    """Trains the wanted reply into the layer where the bad one comes about."""

    name = "dinm"
    paper = "Wang et al. 2024, arXiv 2403.14472"
    summary = "replaces a bad reply in the layer where it differs most from the wanted one"
    choose = "toxic or otherwise unwanted replies: give the prompt, the reply and a better one"
    Config = DinmConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "llama-2-7b": {"learning_rate": 5e-4, "steps": 10, "enough": 1e-3},
        "mistral-7b": {"learning_rate": 1e-5, "steps": 10, "enough": 1e-3},
    }

    def layers(self, count: int) -> tuple[int, ...]:
        """All that the search may come to: which, depends on the replies."""
        return tuple(range(count)) if self.config.layer is None else (self.config.layer,)

    def ends(self) -> bool:
        return bool(self.config.eos)

    def trained(self, view: ModelView, requests: Sequence[EditRequest]) -> list[LinearRole]:
        if self.config.layer is not None:
            return super().trained(view, requests)
        found = sorted({self.located(view, request) for request in requests})
        return [view.roles.linear(self.config.module, layer) for layer in found]

    def located(self, view: ModelView, request: EditRequest) -> int:
        """The block after which the mean states of the two replies differ most."""
        prompt, wanted = self.encode(view, request)
        if request.old is not None:
            so_far = continuation(view.tokenizer, prompt, request.old)
        else:
            (so_far,) = view.generate([prompt.ids], max_new_tokens=REPLY)
        rows = [(*prompt.ids, *reply) for reply in (wanted, so_far)]
        taps = [Tap(block.module, "output") for block in view.roles.blocks]
        run = view.run(rows, taps=taps, prompts=[len(prompt.ids)] * 2)
        apart = []
        for tap in taps:
            means = [
                run.at(tap, [(row, at) for at in range(len(prompt.ids), len(ids))]).mean(0)
                for row, ids in enumerate(rows)
            ]
            apart.append(float((means[0] - means[1]).norm()))
        return apart.index(max(apart))

    def examples(self, view: ModelView, request: EditRequest) -> list[Example]:
        longer = request.model_copy(update={"prompt": request.prompt + self.config.suffix})
        return self.answers(view, longer, request.target)
