"""A twin of a model: a second module tree over the same parameters.

Its hooks, modes, config and choice of blocks are its own, so a pass through it can skip blocks, use
another attention or other weights, and leaves nothing behind on the model, whatever other threads
do with it meanwhile.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def twin(
    model: nn.Module, *, attention: str | None, weight: Callable[[nn.Parameter], Tensor]
) -> Any:
    """A twin of `model`, in evaluation mode and without its hooks.

    Args:
        model: a transformers model.
        attention: the attention implementation to use; None for the model's own.
        weight: gives the tensor that stands for a parameter (tied parameters are one).
    """
    result: Any = _Copy(weight).module(model)
    if attention is not None:
        result.config._attn_implementation = attention
    return result


class _Copy:
    """A module tree made anew, each of its modules, parameters and configs once.

    Functions that call one another through a closure would keep the twin, and its weights, until
    the collector of cycles comes by.
    """

    def __init__(self, weight: Callable[[nn.Parameter], Tensor]) -> None:
        self._weight = weight
        self._configs: dict[int, Any] = {}
        self._weights: dict[int, Tensor] = {}
        self._made: dict[int, nn.Module] = {}

    def module(self, module: nn.Module) -> nn.Module:
        if id(module) in self._made:
            return self._made[id(module)]
        other: nn.Module = object.__new__(type(module))
        self._made[id(module)] = other
        own = vars(other)
        own.update(vars(module))
        own.update({name: type(own[name])() for name in HOOKS})
        own["training"] = False
        own["_parameters"] = {
            n: None if p is None else self._weighed(p) for n, p in module._parameters.items()
        }
        own["_modules"] = {n: c and self.module(c) for n, c in module._modules.items()}
        if "config" in own:
            own["config"] = copy.deepcopy(own["config"], self._configs)
        return other

    def _weighed(self, parameter: nn.Parameter) -> Tensor:
        if id(parameter) not in self._weights:
            self._weights[id(parameter)] = self._weight(parameter)
        return self._weights[id(parameter)]
