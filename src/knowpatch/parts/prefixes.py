"""Context prefixes: short texts that a model wrote itself, to put in front of a prompt.

A value that is right behind many contexts is right by itself (ROME, arXiv 2202.05262, section 3.1).
They are sampled with a generator of their own from a given seed and kept per model, so that what
ran before, or another model, cannot change them.
"""

from __future__ import annotations

import contextlib
import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from knowpatch.files import kept_in, write_atomically
from knowpatch.models.sampling import Sampled
from knowpatch.models.view import ModelView
from knowpatch.progress import Progress, silent

STARTS = ("The", "Therefore", "Because", "I", "You")
TOP_K = 5

Plan = Sequence[tuple[int, int]]
"""(how many, tokens in all) pairs."""


def kept_at(fingerprint: str, plan: Plan, seed: int) -> Path:
    """The file that the prefixes of one model, plan and seed are kept in."""
    content = json.dumps([2, fingerprint, list(plan), seed, TOP_K, STARTS])
    return kept_in("prefixes", content, ".json")


def context_prefixes(
    view: ModelView, plan: Plan, *, seed: int, progress: Progress = silent
) -> tuple[str, ...]:
    """Texts to put before a prompt: the empty one first, the others ending in ". ".

    Args:
        view: the model that writes them (and that they are kept for).
        plan: how many of which length, for example [(10, 5), (10, 10)].
        seed: of the sampling.
    """
    path = kept_at(view.fingerprint, plan, seed)
    with contextlib.suppress(OSError, ValueError):
        return tuple(json.loads(path.read_text(encoding="utf-8")))
    texts = [""]
    for done, (count, length) in enumerate(plan):
        progress("sampling context prefixes", done, len(plan))
        texts += _sample(view, count, length, seed=seed + done)
    progress("sampling context prefixes", len(plan), len(plan))
    write_atomically(path, json.dumps(texts, ensure_ascii=False).encode())
    return tuple(texts)


def _sample(view: ModelView, count: int, length: int, *, seed: int) -> list[str]:
    if not count:
        return []
    rows = [view.encode(STARTS[i % len(STARTS)]).ids for i in range(count)]
    longest = max(len(row) for row in rows)
    sampled = Sampled.rows(TOP_K, count, seed=seed)
    continued = view.generate(rows, max_new_tokens=max(1, length - longest), sampled=sampled)
    texts = [[*row, *new] for row, new in zip(rows, continued, strict=True)]
    return [f"{_clean(view.decode(ids))}. " for ids in texts]


def _clean(text: str) -> str:
    return unicodedata.normalize("NFKD", text).replace("\n\n", " ").strip()
