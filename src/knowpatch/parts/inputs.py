"""What enters a module over whole prompts: what gated memories are keyed and calibrated by.

Axes: T tokens of a prompt, I width of the module's input.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from knowpatch.files import kept_in, write_atomically
from knowpatch.models.passes import Tap
from knowpatch.models.view import ModelView
from knowpatch.parts.spans import Encoded
from knowpatch.probes import controls
from knowpatch.progress import Progress, silent

TOGETHER = 32
"""Prompts that are read in one pass."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """A prompt, and what enters the module at each of its tokens, float32."""

    encoded: Encoded
    inputs_TI: Tensor


def read_inputs(
    view: ModelView,
    module: str,
    prompts: Sequence[str],
    *,
    chat: bool = False,
    progress: Progress = silent,
) -> list[Inputs]:
    """What enters a module while each of these prompts is read."""
    tap, found = Tap(module, "input"), list[Inputs]()
    for start in range(0, len(prompts), TOGETHER):
        progress("reading prompts", start, len(prompts))
        read = [view.encode(text, chat=chat) for text in prompts[start : start + TOGETHER]]
        run = view.run([one.ids for one in read], taps=[tap])
        for row, one in enumerate(read):
            places = [(row, column) for column in range(len(one.ids))]
            found.append(Inputs(one, run.at(tap, places).cpu()))
    progress("reading prompts", len(prompts), len(prompts))
    return found


def read_ends(
    view: ModelView,
    module: str,
    prompts: Sequence[str],
    told: Progress = silent,
    *,
    chat: bool = False,
) -> Tensor:
    """What enters a module at each prompt's last token (N, I), float32."""
    tap, found = Tap(module, "input"), []
    for start in range(0, len(prompts), TOGETHER):
        told("reading prompts", start, len(prompts))
        rows = [view.encode(text, chat=chat).ids for text in prompts[start : start + TOGETHER]]
        run = view.run(rows, taps=[tap])
        found.append(run.at(tap, [(i, len(row) - 1) for i, row in enumerate(rows)]))
    told("reading prompts", len(prompts), len(prompts))
    return torch.cat(found)


def centre_kept_at(fingerprint: str, module: str) -> Path:
    """The file that the mean of a module's inputs is kept in."""
    content = json.dumps(["centre", fingerprint, module, controls()])
    return kept_in("centres", content, ".safetensors")


def centre(view: ModelView, module: str, progress: Progress = silent) -> Tensor:
    """The mean (I) of what enters a module, over the control prompts without their first tokens.

    What an MLP's output map reads has a large mean that all texts share, and cosines show little
    else unless it is taken away. Kept on disk, so that it is the same, bit for bit, in every patch.
    """
    path = centre_kept_at(view.fingerprint, module)
    with contextlib.suppress(OSError, ValueError, KeyError, SafetensorError):
        return load(path.read_bytes())["mean"]
    read = read_inputs(view, module, controls(), progress=progress)
    mean_I = torch.cat([one.inputs_TI[1:] for one in read]).mean(0)
    write_atomically(path, save({"mean": mean_I}))
    return mean_I
