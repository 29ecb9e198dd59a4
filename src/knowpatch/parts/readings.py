"""Readings: what enters a module while a prompt is read, and what ordinary prompts have in common.

The mean over the control prompts is taken off before prompts are compared: most of what enters a
module is the same for all of them. Kept per model and way of reading.
Axes: B rows, T columns, I width of a module's input.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knowpatch.files import kept_in, write_atomically
from knowpatch.models.passes import Tap
from knowpatch.models.reading import Reading
from knowpatch.models.view import ModelView
from knowpatch.parts.wraps import Tokens
from knowpatch.probes import controls

TOGETHER = 32
"""Prompts that are read in one pass."""

Read = Callable[[Tokens], Tensor]
"""What is read of the prompts of some rows: (B, .)."""


def behind_first(tokens: Tokens) -> Tokens:
    """The prompts without the token that begins each: many models keep something of their own
    there, the same for every text. A prompt of one token keeps it."""
    many_B1 = tokens.prompt_BT.sum(1, keepdim=True) > 1
    return replace(tokens, prompt_BT=tokens.prompt_BT & ~(tokens.first_BT & many_B1))


def mean_behind_first(tokens: Tokens) -> Tensor:
    """The mean over each prompt without the token that begins it, (B, I), float32."""
    return behind_first(tokens).mean_BI()


def tokens_of(view: ModelView, module: str, rows: Sequence[Sequence[int]]) -> Iterator[Tokens]:
    """What enters a module while these prompts are read, some rows at a time."""
    tap = Tap(module, "input")
    for start in range(0, len(rows), TOGETHER):
        run = view.run(rows[start : start + TOGETHER], taps=[tap])
        mask = {"attention_mask": run.batch.mask_BT}
        reading = Reading.of(run.batch.ids_BT, mask, torch.empty(0))
        yield reading.tokens(run.tapped[tap])


def read(view: ModelView, module: str, rows: Sequence[Sequence[int]], what: Read) -> Tensor:
    """`what` is read of these prompts where they enter a module, on the CPU."""
    return torch.cat([what(tokens).cpu() for tokens in tokens_of(view, module, rows)])


def prompts_of(tokens: Tokens) -> list[Tensor]:
    """What enters at each prompt's tokens behind the first, float32, (T, I) for each row."""
    prompt_BT = behind_first(tokens).prompt_BT
    return [
        inputs_TI[prompt_T].float()
        for inputs_TI, prompt_T in zip(tokens.inputs_BTI, prompt_BT, strict=True)
    ]


def kept_at(fingerprint: str, reading: Mapping[str, Any]) -> Path:
    """The file that a background is kept in."""
    content = json.dumps([fingerprint, reading, controls()], sort_keys=True)
    return kept_in("backgrounds", content, ".json")


def background(
    view: ModelView, module: str, what: Read, reading: Mapping[str, Any], *, chat: bool
) -> Tensor:
    """The mean of what is read of the control prompts.

    Args:
        reading: what names the way of reading, for the cache; `chat` is one of it.
    """
    path = kept_at(view.fingerprint, reading)
    with contextlib.suppress(OSError, ValueError, TypeError):
        return torch.tensor(json.loads(path.read_text(encoding="utf-8")))
    rows = [view.encode(prompt, chat=chat).ids for prompt in controls()]
    found = read(view, module, rows, what).mean(0)
    write_atomically(path, json.dumps(found.tolist()).encode())
    return found
