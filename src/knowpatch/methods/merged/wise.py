"""WISE: copies of one map that answer where what they put out differs enough from the map's own.

Wang et al., "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language
Models" (arXiv 2405.14768). An edit trains entries of a copy under a random mask (section 2.3.2) for
its answer and for routing (equation 7): the distance ||a (W' - W)|| is to be above beta at the
edited prompt, below alpha at others, and gamma apart. parts/kinds/side.py says how edits are folded
into shards and memories, and how a question is routed.

Other than published: Adam, no box around the weights; margins in units of what the map puts out for
ordinary prompts; prompts out of scope are the library's own, and the very prompt about other
subjects; the threshold lies between the edit's distance and that of such prompts that were not
trained on; the first token does not count. Each edit is trained on its shard's copy as the earlier
live edits left it, so that what it adds is its own, where the paper's code trains on one copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from knowpatch.method import Preparation, Shape, register
from knowpatch.models.passes import Act
from knowpatch.models.sites import muted
from knowpatch.models.view import ModelView
from knowpatch.parts.descent import Example
from knowpatch.parts.kinds.side import SIDE, Sharing, distances, next_shard, shard_of, side
from knowpatch.parts.pilots import pilots
from knowpatch.parts.readings import prompts_of, tokens_of
from knowpatch.parts.sides import Side, SideConfig
from knowpatch.patch import Patch, Wrap
from knowpatch.probes import controls, subjects
from knowpatch.request import EditRequest

OTHERS = 8
"""Other subjects that a prompt is trained to be told from; as many are held out."""
TOGETHER = 16
"""Prompts out of scope that are looked at in one step."""
PILOTS = 30
"""Pilot prompts among those that no edit is about, beside every second control prompt."""
State = tuple[Wrap, ...]


class WiseConfig(SideConfig):
    """Options of WISE."""

    share: float = Field(0.2, gt=0, le=1, description="share of a copy's entries that are trained")
    apart: float = Field(
        0.5,
        gt=0,
        description="distance that the edited prompt should have (beta), as a share of the norm of "
        "what the map puts out; others should have a quarter (alpha), and be a half apart (gamma)",
    )
    between: float = Field(
        0.8, gt=0, lt=1, description="where the threshold lies, from others to the edited prompt"
    )
    wrong: float = Field(
        0.15, ge=0, lt=1, description="share of the others, the farthest ones, that do not count"
    )
    weight: float = Field(1.0, ge=0, description="of the routing loss, distances in such shares")
    full: int = Field(50, ge=1, description="edits that a copy takes")
    merged: int = Field(2, ge=1, description="full copies that are merged into one memory; 1: none")
    density: float = Field(0.53, gt=0, le=1, description="share of a change kept in merging")


@dataclass(frozen=True)
class WisePrepared:
    """Context prefixes; what prompts out of scope put into the map; the norm of its outputs."""

    prefixes: tuple[str, ...]
    others: tuple[Tensor, ...]
    unit: float


@dataclass(frozen=True)
class _Routing:
    """What the distances of an edit are held to: prompts in scope, and two halves out of it."""

    inside: Sequence[Tensor]
    trained: Sequence[Tensor]
    held: Sequence[Tensor]

    def turns(self) -> Iterator[Sequence[Tensor]]:
        """Those that are trained on, about TOGETHER at a time, of all sorts, over and over."""
        count = max(1, len(self.trained) // TOGETHER)
        return itertools.cycle([self.trained[number::count] for number in range(count)])

    def loss(self, side_ID: Tensor, others: Sequence[Tensor], beta: float) -> Tensor:
        """The margins in units of beta; alpha is a quarter of it, gamma a half."""
        in_B = distances(self.inside, side_ID) / beta
        out_B = distances(others, side_ID) / beta
        gaps_BB = 0.5 + out_B[:, None] - in_B
        terms = (out_B - 0.25).relu().mean(), (1 - in_B).relu().mean(), gaps_BB.relu().mean()
        total: Tensor = torch.stack(terms).sum()
        return total


@register("wise")
class Wise(Side):
    """Trains entries of a copy of one map, and when it is used."""

    name = "wise"
    paper = "Wang et al. 2024, arXiv 2405.14768"
    summary = "a side memory: copies of one map, used where they answer otherwise than the map"
    choose = "facts one after the other, told from others by training rather than by likeness"
    Config = WiseConfig
    depth: ClassVar[float] = 27 / 32

    def prepare(self, view: ModelView) -> WisePrepared:
        role = self.role(view)
        rows = [view.encode(text, chat=self.config.chat).ids for text in _others()]
        found = [each for part in tokens_of(view, role.module, rows) for each in prompts_of(part)]
        outputs_TD = torch.cat(found) @ view.weight(role).T
        return WisePrepared(self.contexts(view), tuple(found), float(outputs_TD.norm(dim=1).mean()))

    def edit(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        prepared: WisePrepared,
        state: State | None,
    ) -> Patch:
        role = self.role(view)
        earlier = [wrap for wrap in state or () if wrap.module == role.module]
        shard = next_shard(earlier, self.config.full)
        groups = [self.examples(view, request, prepared.prefixes) for request in requests]
        weight_ID = view.weight(role).T.contiguous()
        index_P = self._mask(weight_ID.shape, shard).to(weight_ID.device)
        before_ID = shard_of(earlier, shard)
        before = torch.zeros_like(weight_ID) if before_ID is None else before_ID.to(weight_ID)
        with muted(SIDE):
            routing = self._routing(view, requests, groups, prepared)
            values_P = self._trained(view, groups, before, index_P, routing, prepared.unit)
        side_ID = _added(before, index_P, values_P)
        bare = routing.inside[: len(groups)]
        sharing = Sharing(
            shard,
            self.config.full,
            self.config.merged,
            self.config.density,
            self._threshold(side_ID, bare, routing.held),
        )
        keys_NI = torch.stack([prompt.mean(0) for prompt in bare]).cpu()
        wrap = side(
            role.module, index_P.cpu(), values_P.cpu(), keys_NI, weight_ID.shape[1], sharing
        )
        return self.patch(view, requests, wraps=[wrap])

    def fold(self, prepared: WisePrepared, state: State | None, patch: Patch) -> State:
        return (*(state or ()), *patch.wraps)

    def _mask(self, shape: torch.Size, shard: int) -> Tensor:
        """The entries that edits of a shard train, drawn anew for each shard."""
        draw = torch.Generator().manual_seed(self.seed * 100_003 + shard)
        drawn: Tensor = torch.rand(shape, generator=draw) < self.config.share
        return drawn.flatten().nonzero()[:, 0]

    def _routing(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        groups: Sequence[Sequence[Example]],
        prepared: WisePrepared,
    ) -> _Routing:
        """The bare prompts first, then those behind prefixes; every second of the others is held
        out."""
        rows = [group[0].prompt for group in groups]
        rows += [example.prompt for group in groups for example in group[1:]]
        changed = [text for request in requests for text in _about_others(request)]
        rows += [view.encode(text, chat=self.config.chat).ids for text in changed]
        module = self.role(view).module
        found = [each for part in tokens_of(view, module, rows) for each in prompts_of(part)]
        count = len(rows) - len(changed)
        others = [*prepared.others, *found[count:]]
        return _Routing(found[:count], others[::2], others[1::2])

    def _trained(
        self,
        view: ModelView,
        groups: Sequence[Sequence[Example]],
        before_ID: Tensor,
        index_P: Tensor,
        routing: _Routing,
        unit: float,
    ) -> Tensor:
        """What is added to the masked entries of the copy."""
        role, config, turns = self.role(view), self.config, routing.turns()
        leaf_P = torch.zeros(len(index_P), device=before_ID.device)
        leaf_P.requires_grad_()

        def act(inputs_BTI: Tensor, outputs_BTD: Tensor, numbers: Sequence[int]) -> Tensor:
            return outputs_BTD + inputs_BTI.float() @ _added(before_ID, index_P, leaf_P)

        def route() -> Tensor:
            side_ID = _added(before_ID, index_P, leaf_P)
            loss = routing.loss(side_ID, next(turns), config.apart * unit)
            return loss.mul(config.weight)

        examples = [example for group in groups for example in group]
        passes = self.passes(view, examples, [Act(role.module, act)])
        self.descend([leaf_P], passes, view.weight(role), besides=route)
        return leaf_P.detach()

    def _threshold(
        self, side_ID: Tensor, inside: Sequence[Tensor], outside: Sequence[Tensor]
    ) -> float:
        """Between what all but a few prompts out of scope reach and what every edited one does."""
        if self.config.threshold is not None:
            return float(self.config.threshold)
        reached = distances(outside, side_ID).quantile(1 - self.config.wrong)
        least = distances(inside, side_ID).min()
        return float(reached + self.config.between * (least - reached))

    def shown(self, prepared: WisePrepared) -> list[str]:
        return [
            f"each edit's threshold is found as it is trained, between its distance and that of "
            f"{len(prepared.others)} prompts out of scope and of its own about other subjects; the "
            f"map puts out {prepared.unit:.3g}"
        ]

    def preparations(self, shape: Shape) -> list[Preparation]:
        return super().preparations(shape)[:1]  # prompts out of scope are read in a second


def _added(before_ID: Tensor, index_P: Tensor, values_P: Tensor) -> Tensor:
    return before_ID.flatten().index_add(0, index_P, values_P).reshape(before_ID.shape)


def _others() -> list[str]:
    """Prompts that no edit is about."""
    return [*controls()[::2], *(fact.prompt for fact in pilots(PILOTS))]


def _about_others(request: EditRequest) -> list[str]:
    """The prompt about other subjects, if its own is known."""
    subject = request.subject
    if subject is None or subject not in request.prompt:
        return []
    names = [name for name in subjects() if name != subject][: 2 * OTHERS]
    return [request.prompt.replace(subject, name) for name in names]
