"""Weights kept in 8 bits, by torchao; they are read, never rewritten.

Weight-only and by output row, so what enters a map stays a float and gradients pass through.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from knowpatch.errors import OptionError

EIGHT = "8bit"


def config() -> Any:
    """What `from_pretrained` takes as quantization_config.

    Raises:
        OptionError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig
    except ImportError:
        raise OptionError(
            "dtype '8bit' needs torchao: pip install 'knowpatch[quant]' (or use float32, bfloat16)"
        ) from None
    return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))


def is_quantised(tensor: Tensor) -> bool:
    """Whether a weight is stored as something else than its numbers."""
    return type(tensor) not in (Tensor, nn.Parameter)


def plain(tensor: Tensor) -> Tensor:
    """The numbers of a weight, detached."""
    dense: Tensor = tensor.dequantize() if is_quantised(tensor) else tensor
    return dense.detach()
