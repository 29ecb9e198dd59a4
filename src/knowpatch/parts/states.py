"""States: what enters a module of a model as it came, over ordinary text and over prompts.

What is added to a module for one fact has to leave these alone. Kept per model and module.
Axes: M states, I input size of the module.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from knowpatch.files import kept_in, write_atomically
from knowpatch.models.passes import Tap
from knowpatch.models.view import ModelView
from knowpatch.parts.inputs import read_ends
from knowpatch.parts.pilots import pilots
from knowpatch.parts.text import Text, packed_rows
from knowpatch.probes import controls, subjects
from knowpatch.progress import Progress, silent
from knowpatch.request import EditRequest

VERSION = 1
KINDS = 10
"""Kinds of subject that take turns among the pilot facts."""
TOGETHER = 16


def kept_at(fingerprint: str, layer: int, count: int, text: Text, seed: int) -> Path:
    """The file that the states of one block's MLP are kept in."""
    content = json.dumps([VERSION, fingerprint, layer, count, text.digest, seed, _prompts()])
    return kept_in("states", content, ".safetensors")


def ordinary_states(
    view: ModelView, layer: int, count: int, text: Text, *, seed: int, progress: Progress = silent
) -> Tensor:
    """What enters the MLP of a block, (M, I) float32: half of it over text, token by token, and
    half at the last token of prompts (fewer, where there are not as many prompts)."""
    path = kept_at(view.fingerprint, layer, count, text, seed)
    with contextlib.suppress(OSError, ValueError, KeyError):
        return load_file(path)["states"]
    module = view.roles.whole_mlp(layer)
    asked_MI = read_ends(view, module, _prompts()[: count // 2], progress)
    wanted = count - len(asked_MI)
    rows = packed_rows(view, text, wanted, seed=seed, progress=progress)
    found_MI = torch.cat([*_over(view, module, rows), asked_MI]).cpu().contiguous()
    write_atomically(path, save({"states": found_MI}))
    return found_MI


def about_others(
    view: ModelView,
    module: str,
    requests: Sequence[EditRequest],
    count: int,
    progress: Progress = silent,
) -> list[Tensor]:
    """For each request what enters a module at the end of its prompt about other subjects, `count`
    of them at most (M, I); none where its subject is not known."""
    prompts: list[str] = []
    counts = []
    for request in requests:
        subject, asked = request.subject or "", request.prompt.lower()
        inside = bool(subject) and subject in request.prompt
        others = [name for name in subjects() if name.lower() not in asked] if inside else []
        prompts += [request.prompt.replace(subject, name) for name in others[:count]]
        counts.append(len(others[:count]))
    if not prompts:
        return [torch.empty(0, view.roles.hidden_size, device=view.device)] * len(requests)
    return list(read_ends(view, module, prompts, progress).split(counts))


def _over(view: ModelView, module: str, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    tap, found = Tap(module, "input"), []
    for start in range(0, len(rows), TOGETHER):
        some = rows[start : start + TOGETHER]
        run = view.run(some, taps=[tap])
        places = [(row, at) for row, ids in enumerate(some) for at in range(len(ids))]
        found.append(run.at(tap, places))
    return found


def _prompts() -> list[str]:
    """The control prompts, and pilot prompts about all subjects of their kind, in turns."""
    facts = pilots()
    found = list(controls())
    for step in range(len(facts) // KINDS):
        for number, fact in enumerate(facts):
            other = facts[(number + step * KINDS) % len(facts)].subject or ""
            found.append(fact.prompt.replace(fact.subject or "", other))
    return list(dict.fromkeys(found))
