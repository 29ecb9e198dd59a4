"""What enters chosen linear maps at each token, and the gradient of a loss at what leaves them.

One forward and one backward pass serve all maps. The graph begins at the lowest of them: below it
nothing is recorded or differentiated, and no weight's own gradient is ever formed, since a map's
is sum_t g_t x_t^T. Axes: M places, I and O width of a map's input and output, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from knowpatch.models.batch import Batch, Place
from knowpatch.models.hooks import Hook, choosing, registered
from knowpatch.models.twin import twin
from knowpatch.models.view import ModelView


@dataclass(frozen=True, eq=False)
class TokenGradients:
    """Of one map: inputs_MI and gradients_MO at the places, float32."""

    inputs_MI: Tensor
    gradients_MO: Tensor


class Gradients:
    """Passes through a model that give the token gradients of chosen maps.

    Args:
        view: the model, with trials in force now.
        modules: paths of the maps.
        dtype: of the passes; None for the model's own.
    """

    def __init__(
        self, view: ModelView, modules: Sequence[str], *, dtype: torch.dtype | None = None
    ) -> None:
        self._view, self._modules = view, tuple(modules)
        self._twin = twin(view.model, attention=None, weight=view.stand_in(dtype))
        self._head = self._twin.get_submodule(view.roles.head)

    def of(
        self,
        rows: Sequence[Sequence[int]],
        places: Sequence[Place],
        labels: Sequence[int],
        weights: Sequence[float],
        *,
        prompts: Sequence[int] | None = None,
    ) -> tuple[float, Mapping[str, TokenGradients]]:
        """The loss - sum_m weight_m log p(label_m), and each map's token gradients at the places.

        Args:
            rows: token ids; places: where the labels are predicted, and inputs and gradients read.
            prompts: how many of each row's ids are its prompt; by default all.
        """
        view = self._view
        batch = view.batch(rows, side="right")
        ends = [len(row) for row in rows] if prompts is None else list(prompts)
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        hooks = [
            *view.beside([end - 1 for end in ends], model=self._twin).hooks(),
            *(self._tracing(name, batch, inputs, outputs) for name in self._modules),
            choosing(self._head, batch, places),
        ]
        with registered(hooks), torch.enable_grad():
            logits_MV = self._twin(**batch.inputs(), use_cache=False).logits.float()
            labels_M = torch.tensor(list(labels), device=view.device)
            logprobs_M = logits_MV.log_softmax(-1).gather(1, labels_M[:, None])[:, 0]
            loss = -(logprobs_M * torch.tensor(list(weights), device=view.device)).sum()
        names = list(outputs)
        gradients = torch.autograd.grad(loss, [outputs[name] for name in names])
        at = batch.at(places)
        shape = batch.ids_BT.shape
        found = {
            name: TokenGradients(
                inputs[name].reshape(*shape, -1)[at].float(),
                gradient.reshape(*shape, -1)[at].float(),
            )
            for name, gradient in zip(names, gradients, strict=True)
        }
        return float(loss.detach()), found

    def _tracing(
        self, name: str, batch: Batch, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
    ) -> Hook:
        """Keep what passes through a map; where nothing below has a graph, begin it here."""
        module = self._twin.get_submodule(name)

        def trace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            inputs[name] = args[0].detach()
            if not output.requires_grad:
                output = output.clone()
                output.requires_grad_()
            outputs[name] = output
            return output

        return lambda: module.register_forward_hook(trace)
