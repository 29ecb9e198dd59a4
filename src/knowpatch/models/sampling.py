"""How a model is let go on: greedily, or by sampling with randomness of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from transformers import GenerationConfig


def generation_config(
    max_new_tokens: int, top_k: int | None, pad: int, stops: Sequence[int]
) -> GenerationConfig:
    """Greedy, or from the `top_k` most likely; nothing from the model's own defaults."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=top_k is not None,
        top_k=top_k or 50,
        top_p=1.0,
        temperature=1.0,
        repetition_penalty=1.0,
        num_beams=1,
        pad_token_id=pad,
        eos_token_id=list(stops) or None,
    )


def own_randomness(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The generators of the processor and of `device`, as found after the block."""
    if device.index is None:
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device.index], device_type=device.type)
