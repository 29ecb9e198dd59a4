"""Attribution patching: an estimate of every restoration's effect from one backward pass.

Nanda (2023, "Attribution Patching"); Syed, Rager, Conmy (arXiv 2310.10348). To first order,
putting an output a of the corrupted run to what it is in the clean one changes log p(answer) by
(a_clean - a_corrupted) . d log p / d a, the gradient taken in the corrupted run. A window's is the
sum over its layers, in which what passes through several of them counts several times. With several
points gradients are means over runs whose noise is taken away step by step (the path of integrated
gradients), which helps where they saturate.
Axes: S draws, T tokens, C tokens from the noise on, L layers, N rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowpatch.locate.facts import Fact
from knowpatch.locate.noise import Noise
from knowpatch.locate.tracing import WINDOW, Trace, corrupt, window_of
from knowpatch.models.passes import Shift, Tap
from knowpatch.models.restorations import STATE, Corrupted, Kind, logprobs_of, outputs_of
from knowpatch.models.view import ModelView


def attribute(
    view: ModelView,
    fact: Fact,
    noise: Noise,
    *,
    kind: Kind = STATE,
    window: int = WINDOW,
    points: int = 1,
) -> Trace:
    """Estimated effects of every token and layer, in nats: what log p(answer) would gain.

    Args:
        kind, window: as `Tracing` takes them.
        points: runs on the way from corrupted to clean, at the middles of equal steps; one is the
            corrupted run itself.
    """
    corruption = corrupt(view, fact, noise)
    start, ids = corruption.subject[0], corruption.prompt.ids
    taps = [Tap(module, "output") for module in outputs_of(view.roles, kind)]
    clean = view.run([ids], logits_at=[(0, len(ids) - 1)], taps=taps)
    answer = int(clean.logits_MV[0].argmax())
    seen = _backward(view, corruption.prompt, taps, answer, points)
    one_LST = torch.zeros(len(taps), corruption.prompt.draws, len(ids))
    for layer, tap in enumerate(taps):
        gap_SCD = clean.tapped[tap][:, start:].float() - seen.outputs[layer]
        one_LST[layer, :, start:] = (gap_SCD * seen.gradients[layer]).sum(-1).cpu()
    width, layers = 1 if kind == STATE else window, len(taps)
    windows = [list(window_of(layer, width, layers)) for layer in range(layers)]
    effects_TLS = torch.stack([one_LST[window].sum(0) for window in windows]).permute(2, 0, 1)
    said, high = view.decode([answer]), float(logprobs_of(clean.logits_MV, answer).exp())
    return Trace(corruption, said, high, seen.low_S, effects_TLS)


@dataclass(frozen=True, eq=False)
class _Seen:
    """Of each layer what it put out in the corrupted runs and the gradient there, (S, C, D), both
    from the noise on; and low_S, p(answer) in these runs."""

    outputs: list[Tensor]
    gradients: list[Tensor]
    low_S: Tensor


def _backward(
    view: ModelView, prompt: Corrupted, taps: Sequence[Tap], answer: int, points: int
) -> _Seen:
    """One forward and one backward pass.

    A gradient at an output is that of a vector of zeros which is added to it. The first rows are
    the corrupted runs; with several points these only say what was put out.
    """
    steps = [0.0, *((point + 0.5) / points for point in range(points))] if points > 1 else [0.0]
    weights = torch.tensor([0.0, *[1 / points] * points] if points > 1 else [1.0])
    noise_SKD = torch.cat([(1 - step) * prompt.noise_SKD for step in steps])
    rows, width = range(len(noise_SKD)), view.roles.hidden_size
    places = [(row, t) for row in rows for t in range(prompt.first, len(prompt.ids))]
    shape, device = (len(places), width), view.device
    leaves = [torch.zeros(shape, device=device, requires_grad=True) for _ in taps]
    moved = Corrupted(prompt.ids, prompt.first, noise_SKD).shift(view.roles.embedding)
    run = view.run(
        [prompt.ids] * len(rows),
        logits_at=[(row, len(prompt.ids) - 1) for row in rows],
        taps=taps,
        shifts=[
            moved,
            *(Shift(tap.module, places, leaf) for tap, leaf in zip(taps, leaves, strict=True)),
        ],
        grad=True,
    )
    logprobs_N = logprobs_of(run.logits_MV, answer)
    weighed_N = logprobs_N * weights.repeat_interleave(prompt.draws).to(logprobs_N)
    found = torch.autograd.grad(weighed_N.sum(), leaves)
    by_step = (len(steps), prompt.draws, -1, width)
    return _Seen(
        [run.tapped[tap][: prompt.draws, prompt.first :].detach().float() for tap in taps],
        [gradient.view(by_step).sum(0) for gradient in found],
        logprobs_N[: prompt.draws].detach().exp().cpu(),
    )
