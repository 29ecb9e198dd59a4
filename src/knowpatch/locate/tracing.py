"""Causal tracing: outputs that bring the answer back when put into a run with a corrupted subject.

Meng, Bau, Andonian, Belinkov, "Locating and Editing Factual Associations in GPT" (ROME, arXiv
2202.05262). The indirect effect at token t and layer l is the mean over draws of p(answer) with the
output restored, less that mean with nothing restored. Restored are a block's whole output (state),
or what the MLPs or the attentions of a window of layers put out (mlp, attn). The answer is the
token that the clean run predicts. Axes: T tokens, L layers, S draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knowpatch.locate.facts import Fact
from knowpatch.locate.noise import Noise
from knowpatch.models.restorations import (
    STATE,
    Corrupted,
    Kind,
    Put,
    Restoration,
    logprobs_of,
    outputs_of,
)
from knowpatch.models.restoring import Restoring, restoring
from knowpatch.models.view import ModelView
from knowpatch.parts.spans import Encoded, Span, subject_span, tokens_of
from knowpatch.progress import Progress, silent

WINDOW = 10
LEAST_TOTAL = 0.1
"""Total effect from which on there is enough to restore (a small model may not feel the noise)."""
DIGITS = 6


@dataclass(frozen=True, eq=False)
class Corruption:
    """A fact's prompt, and the noise on its subject.

    Attributes:
        tokens: the text of each token.
        subject: the subject's tokens, first and behind the last.
        prompt: ids and noise.
    """

    fact: Fact
    tokens: tuple[str, ...]
    subject: Span
    prompt: Corrupted


def corrupt(view: ModelView, fact: Fact, noise: Noise) -> Corruption:
    """Noise on the last occurrence of the subject, which is the one that the answer follows."""
    encoded = view.encode(fact.prompt)
    covered = tokens_of(encoded, subject_span(encoded.text, fact.subject, last=True))
    subject = covered[0], covered[-1] + 1
    noise_SKD = noise.drawn(len(covered), view.roles.hidden_size).to(view.device)
    prompt = Corrupted(encoded.ids, subject[0], noise_SKD)
    return Corruption(fact, _texts(view, encoded), subject, prompt)


def _texts(view: ModelView, encoded: Encoded) -> tuple[str, ...]:
    """What each token reads; a special one by its name."""
    names = view.tokenizer.convert_ids_to_tokens(list(encoded.ids))
    spans = zip(encoded.offsets, names, strict=True)
    return tuple(encoded.text[start:stop] or str(name) for (start, stop), name in spans)


@dataclass(frozen=True, eq=False)
class Answered:
    """A corrupted prompt, and what its runs say.

    Attributes:
        answer: the token that the clean run predicts; high: its probability there.
        low_S: its probability in each corrupted run.
    """

    corruption: Corruption
    answer: str
    high: float
    low_S: Tensor

    @property
    def low(self) -> float:
        return float(self.low_S.mean())

    @property
    def enough(self) -> bool:
        """Whether the noise takes enough away: else there is nothing to bring back."""
        return self.high - self.low >= LEAST_TOTAL and self.low <= self.high / 2

    def about(self) -> dict[str, Any]:
        """As plain data, without any effect."""
        fact = self.corruption.fact
        return {
            "id": fact.id,
            "prompt": fact.prompt,
            "subject": fact.subject,
            "answer": self.answer,
            "tokens": list(self.corruption.tokens),
            "subject_tokens": list(self.corruption.subject),
            "high": rounded(torch.tensor(self.high)),
            "low": rounded(self.low_S.mean()),
            "low_per_draw": rounded(self.low_S),
        }


@dataclass(frozen=True, eq=False)
class Trace(Answered):
    """The effects of restoring, in one prompt.

    Attributes:
        effects_TLS: in each draw what restoring adds to p(answer) (tracing), or by estimate to its
            logarithm (attribution).
    """

    effects_TLS: Tensor

    @property
    def effects_TL(self) -> Tensor:
        """The indirect effect: the mean over draws."""
        return self.effects_TLS.mean(-1)

    def facts(self, *, draws: bool = False) -> dict[str, Any]:
        """As plain data; with `draws` the effects of each draw, too."""
        facts = {**self.about(), "effects": rounded(self.effects_TL)}
        return {**facts, "effects_per_draw": rounded(self.effects_TLS)} if draws else facts


def rounded(tensor: Tensor) -> Any:
    """Nested lists of numbers of six digits."""
    nested: Any = tensor.double().tolist()
    return _rounded(nested)


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}")


class Tracing:
    """A prompt whose clean and corrupted runs are made, ready to be traced.

    Args:
        kind: what is restored.
        besides: paths of other modules whose outputs restorations may put.

    Attributes:
        runs: what the clean run and the corrupted ones say.
    """

    def __init__(
        self,
        view: ModelView,
        fact: Fact,
        noise: Noise,
        *,
        kind: Kind = STATE,
        besides: Sequence[str] = (),
    ) -> None:
        self.kind = kind
        self.modules = outputs_of(view.roles, kind)
        corruption = corrupt(view, fact, noise)
        modules = [*besides, *(() if kind == STATE else self.modules)]
        self._way: Restoring = restoring(view, corruption.prompt, modules)
        self._answer = int(self._way.logits_BV[0].argmax())
        found_B = logprobs_of(self._way.logits_BV, self._answer).exp().cpu()
        said = view.decode([self._answer])
        self.runs = Answered(corruption, said, float(found_B[0]), found_B[1:])

    def effects(
        self, restorations: Sequence[Restoration], *, progress: Progress = silent
    ) -> Tensor:
        """What each of R restorations adds to p(answer) in each draw, (R, S)."""
        found_RS = self._way.logprobs(restorations, self._answer, progress=progress).exp()
        return found_RS.cpu() - self.runs.low_S

    def trace(self, *, window: int = WINDOW, progress: Progress = silent) -> Trace:
        """The effect of every token and layer; before the subject it is zero.

        Args:
            window: layers that are restored together; a state is restored alone.
        """
        corruption, layers = self.runs.corruption, len(self.modules)
        width = 1 if self.kind == STATE else window
        start, tokens = corruption.subject[0], len(corruption.tokens)
        restorations: list[Restoration] = [
            tuple(Put(self.modules[i], t) for i in window_of(layer, width, layers))
            for t in range(start, tokens)
            for layer in range(layers)
        ]
        found_RS = self.effects(restorations, progress=progress)
        effects_TLS = torch.zeros(tokens, layers, found_RS.shape[1])
        effects_TLS[start:] = found_RS.view(tokens - start, layers, -1)
        runs = self.runs
        return Trace(corruption, runs.answer, runs.high, runs.low_S, effects_TLS)


def settings_of(
    view: ModelView, noise: Noise, kind: Kind, window: int, **how: Any
) -> dict[str, Any]:
    """What a map depends on besides its prompt, as plain data."""
    return {
        "fingerprint": view.fingerprint,
        "form": view.form,
        "kind": kind,
        "window": 1 if kind == STATE else window,
        "noise": noise.facts(),
        **how,
    }


def window_of(layer: int, width: int, layers: int) -> range:
    """The layers of a window around `layer`, cut at both ends: [l - w // 2, l + ceil(w / 2))."""
    return range(max(0, layer - width // 2), min(layers, layer + width - width // 2))
