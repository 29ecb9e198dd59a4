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
    configs: dict[int, Any] = {}
    weights: dict[int, Tensor] = {}
    made: dict[int, nn.Module] = {}

    def weighed(parameter: nn.Parameter | None) -> Tensor | None:
        if parameter is None:
            return None
        if id(parameter) not in weights:
            weights[id(parameter)] = weight(parameter)
        return weights[id(parameter)]

    def make(module: nn.Module) -> nn.Module:
        if id(module) in made:
            return made[id(module)]
        other: nn.Module = object.__new__(type(module))
        made[id(module)] = other
        own = vars(other)
        own.update(vars(module))
        own.update({name: type(own[name])() for name in HOOKS})
        own["training"] = False
        own["_parameters"] = {n: weighed(p) for n, p in module._parameters.items()}
        own["_modules"] = {n: c and make(c) for n, c in module._modules.items()}
        if "config" in own:
            own["config"] = copy.deepcopy(own["config"], configs)
        return other

    result: Any = make(model)
    if attention is not None:
        result.config._attn_implementation = attention
    return result
