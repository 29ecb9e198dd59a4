"""Settings that were published for one model: absolute, and right for that model alone.

They are presets of the methods, by the model's name. What they leave open (text and how much of it)
is the method's own. Sources: the repositories of ROME, MEMIT, AlphaEdit and BetaEdit, and EasyEdit,
whose llama-2-7b settings are those of KnowEdit (arXiv 2401.01286).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Preset = Mapping[str, Any]


def _values(steps: int, rate: float, clamp: float, decay: float, **more: Any) -> Preset:
    return {
        "steps": steps,
        "learning_rate": rate,
        "clamp": clamp,
        "weight_decay": decay,
        "kl_factor": 0.0625,
        "enough": 0.05,
        **more,
    }


def _blocks(first: int, last: int) -> tuple[int, ...]:
    return tuple(range(first, last + 1))


SPREAD: Mapping[str, Preset] = {
    "gpt2-xl": _values(20, 0.5, 0.75, 0.5, layers=_blocks(13, 17)),
    "gpt-j-6b": _values(25, 0.5, 0.75, 0.5, layers=_blocks(3, 8)),
    "llama-2-7b": _values(25, 0.5, 4.0, 1e-3, layers=_blocks(4, 8)),
    "llama-3-8b": _values(25, 0.1, 0.75, 0.5, layers=_blocks(4, 8)),
    "qwen2.5-7b": _values(25, 0.5, 4.0, 1e-3, layers=_blocks(4, 8)),
    "mistral-7b": _values(25, 0.5, 4.0, 1e-3, layers=_blocks(4, 8)),
}
"""Several layers, the value in the residual stream."""

_EASY = _values(25, 0.5, 4.0, 1e-3, layer=5, contexts=20, moments="identity", ridge=0.0)

SINGLE: Mapping[str, Preset] = {
    "gpt2-xl": _values(20, 0.5, 4.0, 0.5, layer=17, contexts=20, ridge=0.0),
    "gpt-j-6b": _values(20, 0.5, 4.0, 0.5, layer=5, contexts=20, ridge=0.0),
    "llama-2-7b": _EASY,
    "llama-3-8b": _EASY,
    "qwen2.5-7b": _EASY,
    "mistral-7b": _EASY,
}
"""One layer, the value at the MLP's output."""


PLAIN: Preset = {"memory": False, "ridge": 0.0}
"""Without what was not published: the keys of earlier edits, and a ridge."""


def extended(presets: Mapping[str, Preset], more: Mapping[str, Preset]) -> dict[str, Preset]:
    """The presets of the models in `more`, with what is given there."""
    return {name: {**presets[name], **added} for name, added in more.items()}
