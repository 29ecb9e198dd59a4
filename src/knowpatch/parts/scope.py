"""How far apart the keys of prompts lie in one model: what a distance threshold is made from.

Two numbers, from the library's control prompts: how far a prompt's key is from the keys of its own
rewordings, and how near the keys of unrelated prompts come. Kept per model and place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from knowpatch.files import cache_folder, write_atomically
from knowpatch.models.passes import Tap
from knowpatch.models.view import ModelView
from knowpatch.probes import LEAD_INS, controls
from knowpatch.progress import Progress, silent

NEAREST = 0.01
"""Share of the pairs of unrelated prompts that are nearer than `far`."""


@dataclass(frozen=True)
class Scope:
    """near: the median distance of a prompt's key to a rewording's; far: see `NEAREST`."""

    near: float
    far: float


def kept_at(fingerprint: str, role: str, layer: int) -> Path:
    """The file that the scope of one map of one model is kept in."""
    key = hashlib.sha256(json.dumps([1, fingerprint, role, layer, NEAREST, LEAD_INS]).encode())
    return cache_folder() / "scopes" / f"{key.hexdigest()[:32]}.json"


def key_scope(view: ModelView, role: str, layer: int, progress: Progress = silent) -> Scope:
    """The scope of keys that enter a block's map `role` at a prompt's last token."""
    path = kept_at(view.fingerprint, role, layer)
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Scope(**json.loads(path.read_text(encoding="utf-8")))
    prompts, module = controls(), view.roles.linear(role, layer).module
    keys_NI = _keys(view, module, prompts, progress)
    reworded = [
        f"{lead} {prompt[0].lower()}{prompt[1:]}" for lead in LEAD_INS for prompt in prompts
    ]
    near = (_keys(view, module, reworded, progress) - keys_NI.repeat(len(LEAD_INS), 1)).norm(dim=1)
    found = Scope(float(near.median()), float(torch.pdist(keys_NI).quantile(NEAREST)))
    write_atomically(path, json.dumps(asdict(found)).encode())
    return found


def _keys(view: ModelView, module: str, prompts: Sequence[str], told: Progress) -> Tensor:
    tap, found = Tap(module, "input"), []
    for start in range(0, len(prompts), 32):
        told("measuring how far apart prompts lie", start, len(prompts))
        rows = [view.encode(prompt).ids for prompt in prompts[start : start + 32]]
        run = view.run(rows, taps=[tap])
        found.append(run.at(tap, [(i, len(row) - 1) for i, row in enumerate(rows)]))
    told("measuring how far apart prompts lie", len(prompts), len(prompts))
    return torch.cat(found)
