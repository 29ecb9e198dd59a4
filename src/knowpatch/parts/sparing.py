"""Sparing: what a trained change leaves as it is, since it adds nothing to it.

An answer that is trained into a map shows up in other answers too, wherever what enters the map
points the same way: at the same words behind another name, and at the words that prompts of any
kind end in. Both are read before the training, and what spans them is taken out of the change's
input side,

    delta W (1 - U U^T),   U (I, K) orthonormal,

all the way through (AlphaEdit's projection, arXiv 2410.02355, from a few prompts). What is left is
what the subject itself brings in, so that the answer is learned at it. Many facts in one matrix
show up in text of any kind as well; for these what text mostly brings in is spared too (option
`tokens`). Axes: N tokens, I width of a map's input, K directions that are spared.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from knowpatch.method import Cost, MethodConfig, Preparation, Shape
from knowpatch.models.passes import Tap
from knowpatch.models.roles import LinearRole
from knowpatch.models.view import ModelView
from knowpatch.parts import moments
from knowpatch.parts.pilots import pilots
from knowpatch.parts.spans import subject_spans
from knowpatch.parts.tuned import Tuned
from knowpatch.request import EditRequest

OTHERS = 8
"""Names that stand in for the subject of a request."""
BANK = 60
"""Pilot facts whose subjects these are; none comes twice among them."""
MOST = 128
"""Prompts with such names, however many requests there are."""
SHARE, WITH_TEXT = 1 / 3, 1 / 2
"""Of a map's input that is spared at most, without and with text: a change needs room."""
LEAST = 1e-3
"""Directions weaker than this share of the strongest are not spared."""
TOGETHER = 64
"""Prompts that are read in one pass."""
TEXT = (
    "tokens of ordinary text that is spared besides, where it is strongest; only where others are"
)


class SparingConfig(MethodConfig):
    """Options of sparing."""

    others: int = Field(
        OTHERS,
        ge=0,
        le=50,
        description="names in the subject's place at which, as at where other prompts end, nothing "
        "changes; 0, in a chat or if a request erases: nothing is spared, as published",
    )
    tokens: int = Field(0, ge=0, description=TEXT)


class Sparing(Tuned):
    """Trains changes that add nothing at other names and where other prompts end."""

    def prepare(self, view: ModelView) -> dict[str, Tensor]:
        """By module, the strongest directions of what text brings in (K, I), if it is spared."""
        text, layers = self._text(), self.layers(len(view.roles.blocks))
        if text is None:
            return {}
        return {
            view.roles.linear(role, layer).module: strongest(each.mean())
            for role in self.wanted_roles()
            for layer, each in moments.key_moments(
                view, role, layers, **text, progress=self.progress
            ).items()
        }

    def preparations(self, shape: Shape) -> list[Preparation]:
        text, layers = self._text(), self.layers(shape.layers)
        if text is None:
            return []
        return [
            item
            for role in self.wanted_roles()
            for item in moments.preparations(shape, role, layers, **text)
        ]

    def cost(self, shape: Shape, lengths: Sequence[int]) -> Cost:
        found = super().cost(shape, lengths)
        # Text's statistics, their eigenvectors, and the half of these that is spared.
        text = 0 if self._text() is None else 3 * 8 * shape.inner**2
        return replace(found, extra_bytes=found.extra_bytes + text)

    def spared(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        roles: Sequence[LinearRole],
        prepared: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor]:
        # What is unlearned is no subject's own: it ought to be refused whoever is asked about.
        erases = any(one.kind == "erase" for one in requests)
        if not self._spares() or erases:
            return {}
        away = [one.prompt for one in pilots() if not any(_alike(one, each) for each in requests)]
        modules = list(dict.fromkeys(role.module for role in roles))
        names = self._inputs(view, modules, elsewhere(requests, self.config.others, self.seed), 0)
        ends = self._inputs(view, modules, away, -1)
        if not any((*names.values(), *ends.values())):
            return {}
        return {
            module: span([names[module], ends[module]], prepared.get(module)) for module in modules
        }

    def _spares(self) -> bool:
        # In a chat the names' rows end in the very tokens at which the answer has to be learned.
        return bool(self.config.others) and not self.config.chat

    def _text(self) -> dict[str, Any] | None:
        """Which text's statistics are read; None where none is spared."""
        config = self.config
        if not (config.tokens and self._spares()):
            return None
        return {"text": config.text, "tokens": config.tokens, "seed": self.seed}

    def _inputs(
        self, view: ModelView, modules: Sequence[str], prompts: Sequence[str], first: int
    ) -> dict[str, list[Tensor]]:
        """What enters modules at prompts' tokens from the first one on, (N, I) a pass."""
        taps = [Tap(module, "input") for module in modules]
        found: dict[str, list[Tensor]] = {module: [] for module in modules}
        for start in range(0, len(prompts), TOGETHER):
            self.progress("reading what is spared", start, len(prompts))
            some = prompts[start : start + TOGETHER]
            rows = [view.encode(prompt, chat=self.config.chat).ids for prompt in some]
            places = [(row, at) for row, ids in enumerate(rows) for at in range(len(ids))[first:]]
            run = view.run(rows, taps=taps)
            for tap in taps:
                found[tap.module].append(run.at(tap, places))
        return found


def elsewhere(requests: Sequence[EditRequest], others: int, seed: int) -> list[str]:
    """The requests' prompts with other names in place of their subjects; a prompt without one has
    none. Of many requests fewer names each, and then only some of them, evenly."""
    about = [one for one in requests if one.subject is not None]
    about = about[:: -(-len(about) // MOST) or 1]
    found: list[str] = []
    asked = "\n".join(request.prompt for request in requests).casefold()
    names = [name for one in pilots(BANK) if (name := one.subject or "").casefold() not in asked]
    for request in about:
        drawn = random.Random(f"{seed} {request.prompt}")
        count = min(others, max(1, MOST // len(about)), len(names))
        found += [_about(request, name) for name in drawn.sample(names, count)]
    return found


def _about(request: EditRequest, name: str) -> str:
    """The request's prompt with a name wherever its subject stands."""
    text = request.prompt
    for start, stop in reversed(subject_spans(text, request.subject or "")):
        text = text[:start] + name + text[stop:]
    return text


def _alike(pilot: EditRequest, request: EditRequest) -> bool:
    """Whether a pilot fact is about what is edited, so that it must not be spared."""
    subject = (pilot.subject or "").casefold()
    return pilot.prompt == request.prompt or subject in request.prompt.casefold()


def strongest(second_II: Tensor) -> Tensor:
    """The strongest directions of a second moment (I, I) as inputs (K, I), float64, whose squares
    are their shares of its energy."""
    values_I, vectors_II = moments.kept_eigen(second_II)
    most = int(WITH_TEXT * len(values_I))
    shares_K = values_I[-most:].clamp(min=0) / values_I.sum()
    return vectors_II[:, -most:].T * shares_K.sqrt()[:, None]


def span(groups: Sequence[Sequence[Tensor]], text_KI: Tensor | None = None) -> Tensor:
    """Orthonormal columns U (I, K) that span groups of inputs (N, I), each input counted as a
    direction and each group, and text as `strongest` gives it, as much as another; of many the
    strongest."""
    units = [normalize(torch.cat(list(some)).double(), dim=1) for some in groups if some]
    scaled = [units_NI / len(units_NI) ** 0.5 for units_NI in units]
    if text_KI is not None:
        scaled.append(text_KI.to(scaled[0].device))
    scaled_NI = torch.cat(scaled)
    _, sizes, right_KI = torch.linalg.svd(scaled_NI, full_matrices=False)
    share = SHARE if text_KI is None else WITH_TEXT
    most = int(share * scaled_NI.shape[1])
    kept = int((sizes > LEAST * sizes[0]).sum())
    chosen: Tensor = right_KI[: min(kept, most)].T.float().contiguous()
    return chosen
