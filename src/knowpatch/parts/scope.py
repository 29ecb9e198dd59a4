"""How far apart the keys of prompts lie in one model: what a distance threshold is made from.

Two numbers, from the library's own prompts: how far a prompt's key is from those of its rewordings,
and how near the keys of the same sentence about different subjects come, which are the nearest of
all that must be told apart. Kept per model and place.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from knowpatch.files import kept_in, write_atomically
from knowpatch.models.passes import Tap
from knowpatch.models.view import ModelView
from knowpatch.probes import ABOUT, LEAD_INS, controls, subjects
from knowpatch.progress import Progress, silent

NEAREST = 0.01
"""Share of the pairs of sentences about different subjects that are nearer than `far`."""


@dataclass(frozen=True)
class Scope:
    """near: the median distance of a prompt's key to a rewording's; far: see `NEAREST`."""

    near: float
    far: float


def kept_at(fingerprint: str, role: str, layer: int) -> Path:
    """The file that the scope of one map of one model is kept in."""
    content = json.dumps([fingerprint, role, layer, NEAREST, LEAD_INS, ABOUT])
    return kept_in("scopes", content, ".json")


def key_scope(view: ModelView, role: str, layer: int, progress: Progress = silent) -> Scope:
    """The scope of keys that enter a block's map `role` at a prompt's last token."""
    path = kept_at(view.fingerprint, role, layer)
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Scope(**json.loads(path.read_text(encoding="utf-8")))
    module = view.roles.linear(role, layer).module
    prompts = [text.replace("{}", name) for text in ABOUT for name in subjects()]
    reworded = [f"{lead} {t[0].lower()}{t[1:]}" for lead in LEAD_INS for t in controls()]
    asked = [*controls(), *reworded]
    keys_NI = read_ends(view, module, [*prompts, *asked], progress)
    about, rest = keys_NI[: len(prompts)], keys_NI[len(prompts) :]
    plain, moved = rest[: len(controls())], rest[len(controls()) :]
    near = (moved - plain.repeat(len(LEAD_INS), 1)).norm(dim=1).median()
    apart = torch.cat([torch.pdist(same) for same in about.split(len(subjects()))])
    found = Scope(float(near), float(apart.quantile(NEAREST)))
    write_atomically(path, json.dumps(asdict(found)).encode())
    return found


def read_ends(view: ModelView, module: str, prompts: Sequence[str], told: Progress) -> Tensor:
    """What enters a module at each prompt's last token (N, I), float32."""
    tap, found = Tap(module, "input"), []
    for start in range(0, len(prompts), 32):
        told("reading prompts", start, len(prompts))
        rows = [view.encode(prompt).ids for prompt in prompts[start : start + 32]]
        run = view.run(rows, taps=[tap])
        found.append(run.at(tap, [(i, len(row) - 1) for i, row in enumerate(rows)]))
    told("reading prompts", len(prompts), len(prompts))
    return torch.cat(found)
