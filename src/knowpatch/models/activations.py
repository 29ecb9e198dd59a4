"""The activations of MLPs, by name: of a model, and for parts that are added beside its MLPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu-tanh": partial(functional.gelu, approximate="tanh"),
}
_CALLED = {
    "swish": "silu",
    "gelu_new": "gelu-tanh",
    "gelu_fast": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
}
"""What configs call them."""


def activation_of(model: Any) -> str:
    """The name of a model's own activation; silu where it is none of those here."""
    config = model.config.get_text_config()
    for name in ("hidden_activation", "hidden_act", "activation_function"):
        if isinstance(called := getattr(config, name, None), str):
            called = _CALLED.get(called, called)
            return called if called in ACTIVATIONS else "silu"
    return "silu"
