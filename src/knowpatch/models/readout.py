"""Readout: what a model's final norm and head make of any hidden states (the logit lens).

A twin whose blocks are all known: called in the last one's place, it gives the states, and what
stands above the blocks (norm, projection, head, caps) is the model's own. A session's patches that
sit in blocks do not run; weight changes that are live, or tried, do.
Axes: N states, D hidden size, H what enters the head, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from knowpatch.errors import ModelError
from knowpatch.models.batch import Batch
from knowpatch.models.hooks import registered, tapping
from knowpatch.models.known import Known, output_of
from knowpatch.models.passes import Tap
from knowpatch.models.twin import twin
from knowpatch.models.view import ModelView


class Readout:
    """Reads hidden states as the model reads those that leave its last block.

    Args:
        view: the model, with trials in force now.
    """

    def __init__(self, view: ModelView) -> None:
        self._twin = twin(view.model, attention=None, weight=view.stand_in(None))
        self._device, self._head = view.device, view.roles.head
        self._dtype, self._size = view.embedding.dtype, view.roles.hidden_size
        blocks = [self._twin.get_submodule(part.module) for part in view.roles.blocks]
        # What one token's last block puts out says in which form states are handed on.
        one = partial(self._twin, **self._batch(1).inputs(), use_cache=False)
        self._known = Known(blocks, output_of(blocks[-1], one))

    def _batch(self, count: int) -> Batch:
        """So many rows of one token, which nothing reads."""
        return Batch.of([[0]] * count, pad=0, side="right", device=self._device)

    def logits(self, states_ND: Tensor) -> Tensor:
        """Next-token logits (N, V), float32."""
        return self._read(states_ND)[0]

    def entering(self, states_ND: Tensor) -> Tensor:
        """What enters the head (N, H), float32."""
        return self._read(states_ND)[1]

    def gain(self) -> Tensor:
        """What the final norm multiplies each entry of a state by, beside its scale (H).

        Read off a state of ones and minus ones, whose root mean square is one, and its opposite:
        that leaves a norm's bias, and does not ask how it writes its weight down.

        Raises:
            ModelError: states are projected before the head.
        """
        signs_D = torch.ones(self._size, device=self._device)
        signs_D[1::2] = -1.0
        one_H, other_H = self.entering(torch.stack([signs_D, -signs_D])).unbind()
        if len(one_H) != self._size:
            raise ModelError(
                f"what enters the head has {len(one_H)} numbers, states have {self._size}: the "
                "final norm's gain does not carry over"
            )
        return torch.div(one_H - other_H, 2 * signs_D)

    def _read(self, states_ND: Tensor) -> tuple[Tensor, Tensor]:
        batch, tap = self._batch(len(states_ND)), Tap(self._head, "input")
        tapped: dict[Tap, Tensor] = {}
        self._known.give(states_ND[:, None].to(self._device, self._dtype))
        hook = tapping(self._twin.get_submodule(self._head), batch, tap, tapped, None)
        with registered([hook]), torch.no_grad():
            logits_N1V = self._twin(**batch.inputs(), use_cache=False).logits
        return logits_N1V[:, 0].float(), tapped[tap][:, 0].float()
