"""BetaEdit: a null space that leaks is weighed, and looked at anew as edits come.

Liu et al., "BetaEdit" (arXiv 2605.09285). As AlphaEdit with two additions: what energy text has
left inside the null space is weighed in the solve,

    delta W = R K^T P (P (K K^T + Kp Kp^T + l1 C) P + l2 I)^-1 P

and after every so many facts the null space is that of text and earlier edits together. A change
that is out of all proportion is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from knowpatch.errors import EditError
from knowpatch.method import register
from knowpatch.models.view import ModelView
from knowpatch.parts.keep import Null, for_gain
from knowpatch.parts.nulls import NullConfig, null_space
from knowpatch.parts.published import SPREAD, extended
from knowpatch.parts.solve import Factors, Form, energies, raised
from knowpatch.parts.space import Space
from knowpatch.parts.spread import Spread


class BetaEditConfig(NullConfig):
    """Options of BetaEdit: what leaks is weighed, so the space may be wider than AlphaEdit's."""

    null_share: float = Field(
        0.3, gt=0, lt=1, description="share of text's key energy that the null space may hold"
    )
    leak: float = Field(
        6.0, ge=0, description="l1 over l2, in the largest energy inside (published: 6)"
    )
    refresh: int = Field(
        1000, ge=1, description="facts after which the null space is looked at anew"
    )
    history: float = Field(
        1.0, ge=0, description="weight of a fact's key beside a token's, in that look"
    )
    largest: float = Field(
        0.5, gt=0, description="refuse a change of more than this share of the map's norm per fact"
    )


@dataclass(frozen=True, eq=False)
class Refreshed(Null):
    """A null space with the keys (I, N) that were written since the start, to look at it anew."""

    second_II: Tensor
    keys: tuple[Tensor, ...]
    config: BetaEditConfig
    weights: tuple[float, float]

    @classmethod
    def of(
        cls,
        second_II: Tensor,
        space: Space,
        weights: tuple[float, float],
        config: BetaEditConfig,
        keys: tuple[Tensor, ...] = (),
    ) -> Refreshed:
        leak, ridge = weights
        inside_JJ = space.compressed(second_II)
        form = Form.of(raised(leak * inside_JJ, ridge))
        if keys:
            form = form.keeping(space.inside(torch.cat(keys, dim=1)))
        return cls(space, form, second_II, keys, config, weights)

    def keeping(self, keys_IN: Tensor) -> Refreshed:
        keys = (*self.keys, keys_IN)
        before = sum(each.shape[1] for each in self.keys)
        after = before + keys_IN.shape[1]
        if before // self.config.refresh == after // self.config.refresh:
            form = self.form.keeping(self.space.inside(keys_IN))
            return replace(self, form=form, keys=keys)
        all_IN = torch.cat(keys, dim=1)
        past_II = all_IN @ all_IN.T / after
        mixed_II = (self.second_II + self.config.history * past_II) / (1 + self.config.history)
        space = null_space(mixed_II, self.config, keep=False)
        return Refreshed.of(self.second_II, space, self.weights, self.config, keys)


@register("betaedit")
class BetaEdit(Spread):
    """Writes associations where text hardly reads, and weighs what it does read."""

    name = "betaedit"
    paper = "Liu et al. 2026, arXiv 2605.09285"
    summary = "as alphaedit, with the null space's leak weighed and the space refreshed"
    choose = "long streams of single facts"
    Config = BetaEditConfig
    presets = extended(
        SPREAD,
        {
            "gpt2-xl": {"threshold": 0.02, "weight": 10.0, "history": 1 / 3000},
            "llama-3-8b": {"threshold": 0.02, "weight": 10.0, "history": 1 / 3000},
            "qwen2.5-7b": {
                **SPREAD["llama-3-8b"],
                "threshold": 0.02,
                "weight": 10.0,
                "history": 1 / 3000,
            },
        },
    )

    def keep(self, second_II: Tensor, pilots_IN: Tensor) -> Refreshed:
        space = null_space(second_II, self.config)
        inside_JJ = space.compressed(second_II)
        most = float(inside_JJ.diagonal().max())
        leak = self.config.leak / most if most > 0 else 0.0  # text that leaves nothing inside
        unit = Refreshed.of(second_II, space, (leak, 1.0), self.config)
        ridge = self.config.weight or for_gain(
            energies(space.inside(pilots_IN), unit.form), self.config.gain
        )
        return replace(unit, form=unit.form.scaled(ridge), weights=(leak * ridge, ridge))

    def check_change(self, view: ModelView, layer: int, factors: Factors, facts: int) -> None:
        left_DF, right_FI = factors
        # |L R|^2 = tr(L^T L R R^T): no (D, I) matrix for a norm.
        square = ((left_DF.T @ left_DF) * (right_FI @ right_FI.T)).sum()
        size = float(square.clamp(min=0)) ** 0.5 / facts**0.5
        most = self.config.largest * float(view.base(self.role(view, layer)).norm())
        if not size <= most:
            raise EditError(
                f"the change of block {layer} would be of norm {size:.3g} per fact, where "
                f"{most:.3g} is allowed: leave out facts that contradict each other, or raise "
                "the option largest"
            )
