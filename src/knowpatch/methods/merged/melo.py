"""MELO: blocks of LoRA, each switched on where a question lies near the prompts it was trained for.

Yu et al., "MELO: Enhancing Model Editing with Neuron-Indexed Dynamic LoRA" (arXiv 2312.11795). The
requests of one patch train one block, beside the MLP output maps of a few blocks of the model; what
enters the map of an earlier one is the index (parts/kinds/blocks.py has the clusters and routing).

Other than published: the index is read as the mean over the prompt, less that of ordinary prompts,
and compared by direction, where the code reads the last token; radii begin with a calibrated one;
a block's effect has a fixed scale, where in the code it grows with the number of blocks that there
is room for; an edited prompt is routed by what it says as token ids, not by their sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from knowpatch.method import register
from knowpatch.models.passes import Act
from knowpatch.models.roles import LinearRole
from knowpatch.models.sites import muted
from knowpatch.models.view import ModelView
from knowpatch.parts.calibration import Asked, calibrate
from knowpatch.parts.depths import Layers, between
from knowpatch.parts.descent import Example
from knowpatch.parts.kinds.blocks import BLOCKS, blocks, directions, gaps
from knowpatch.parts.readings import background, mean_behind_first, read
from knowpatch.parts.sides import Side, SideConfig, SidePrepared
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

Block = tuple[Tensor, Tensor]
"""Factors (I, P) and (P, D) of what is added to a map."""


class MeloConfig(SideConfig):
    """Options of MELO."""

    layers: Layers | None = Field(
        None, description="blocks that are trained beside; by default from 22/30 to 24/30 deep"
    )
    rank: int = Field(2, ge=1, description="of a block of LoRA")
    scale: float = Field(4.0, gt=0, description="of what a block adds")


@register("melo")
class Melo(Side):
    """Trains a block of LoRA that an index of prompts switches on."""

    name = "melo"
    paper = "Yu et al. 2023, arXiv 2312.11795"
    summary = "blocks of LoRA, each switched on near the prompts that it was trained for"
    choose = "groups of facts that belong together, each group as one small block"
    Config = MeloConfig
    depth: ClassVar[float] = 4 / 30

    def targets(self, count: int) -> tuple[int, ...]:
        """The blocks that are trained beside."""
        if self.config.layers is not None:
            return tuple(self.config.layers)
        return between((22 / 30, 24 / 30), count)

    def layers(self, count: int) -> tuple[int, ...]:
        return tuple(sorted({self.block(count), *self.targets(count)}))

    def prepare(self, view: ModelView) -> SidePrepared:
        module, reading = self.role(view).module, self.reading(len(view.roles.blocks))
        usual = background(view, module, mean_behind_first, reading, chat=self.config.chat)
        found, radius = None, self.config.threshold
        if radius is None:

            def keys(asked: Sequence[Asked]) -> Tensor:
                rows = [view.encode(one.prompt, chat=self.config.chat).ids for one in asked]
                return directions(read(view, module, rows, mean_behind_first), usual)

            found = calibrate(view.fingerprint, reading, "distance", keys, gaps)
            radius = found.threshold()
        return SidePrepared(self.contexts(view), usual, radius, found)

    def edit(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        prepared: SidePrepared,
        state: None,
    ) -> Patch:
        source, usual = self.role(view).module, prepared.background_I
        groups = [self.examples(view, request, prepared.prefixes) for request in requests]
        bare = [group[0] for group in groups]
        with muted(BLOCKS):  # a row is answered by one block: others are not trained around
            rows = [example.prompt for example in bare]
            keys_NI = directions(read(view, source, rows, mean_behind_first), usual)
            trained = self._trained(view, [example for group in groups for example in group])
        keys = keys_NI, prepared.threshold, [example.answer for example in bare]
        wraps = [blocks(module, source, keys, usual, block) for module, block in trained.items()]
        return self.patch(view, requests, wraps=wraps)

    def _trained(self, view: ModelView, examples: Sequence[Example]) -> dict[str, Block]:
        """A block for each map, by module; what it adds is scaled."""
        roles = [view.roles.linear("mlp.out", n) for n in self.targets(len(view.roles.blocks))]
        draw = torch.Generator().manual_seed(self.seed)
        pairs = {role.module: self._begun(view, role, draw) for role in roles}
        leaves = [leaf for pair in pairs.values() for leaf in pair]
        acts = [self._act(module, *pair) for module, pair in pairs.items()]
        passes = self.passes(view, examples, acts)
        self.descend(leaves, passes, view.weight(roles[0]))
        return {
            module: (into.detach().cpu(), (self.config.scale * out).detach().cpu())
            for module, (into, out) in pairs.items()
        }

    def _begun(self, view: ModelView, role: LinearRole, draw: torch.Generator) -> Block:
        """Factors as LoRA begins: into the map at random, out of it zero."""
        weight_DI = view.weight(role)
        wide, into = weight_DI.shape
        bound = 1 / math.sqrt(into)
        drawn_IP = torch.rand(into, self.config.rank, generator=draw) * 2 * bound - bound
        into_IP = torch.empty(drawn_IP.shape, device=weight_DI.device)
        into_IP.copy_(drawn_IP)
        into_IP.requires_grad_()
        out_PD = torch.zeros(self.config.rank, wide, device=weight_DI.device)
        out_PD.requires_grad_()
        return into_IP, out_PD

    def _act(self, module: str, into_IP: Tensor, out_PD: Tensor) -> Act:
        def branch(inputs_BTI: Tensor, outputs_BTD: Tensor, numbers: Sequence[int]) -> Tensor:
            added_BTD: Tensor = inputs_BTI.float() @ into_IP @ out_PD
            return outputs_BTD + added_BTD.mul(self.config.scale)

        return Act(module, branch)
