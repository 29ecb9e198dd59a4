"""Restoring: passes over a prompt with a corrupted subject, in which some outputs are put back.

The prompt runs once clean and S times with noise on its subject's embeddings; a restoration then
puts outputs of modules, at some positions, to what they were in another run. Many restorations are
one batch that runs only what they can change (growing.py). A probe per model says whether that
gives what full passes give; where it does not, there is a full pass for each restoration.
Axes: R restorations, S draws of noise, B rows, T tokens, I and D width of a module's input and
output, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from knowpatch.models.above import Above
from knowpatch.models.growing import Growing
from knowpatch.models.passes import Act, Tap
from knowpatch.models.restorations import (
    Corrupted,
    Outputs,
    Put,
    Restoration,
    logprobs_of,
)
from knowpatch.models.view import ModelView
from knowpatch.progress import Progress, silent

log = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Largest difference, in log-probability, at which a probe says that it holds."""


class Restoring(Protocol):
    """A corrupted prompt, ready for restorations.

    Attributes:
        logits_BV: behind the prompt: row 0 clean, then the S corrupted ones; float32.
    """

    logits_BV: Tensor

    def logprobs(
        self, restorations: Sequence[Restoration], token: int, *, progress: Progress = silent
    ) -> Tensor:
        """log p(token) behind the prompt in every draw of every restoration, (R, S), float32."""


def restoring(view: ModelView, prompt: Corrupted, modules: Sequence[str]) -> Restoring:
    """Restorations of whole blocks and of outputs of `modules`, in the cheapest way that holds.

    Args:
        view: the model, with trials in force now.
        prompt: ids, and the noise on the embeddings of some of them.
        modules: paths of modules in the blocks.
    """
    view.limits.check(len(prompt.ids), view.source)
    modules = tuple(dict.fromkeys(modules))
    fits = view.reads_in_pieces(len(prompt.ids), 2) and not view.carried
    attention = holding(view, modules) if fits else None
    if attention is None:
        return Whole(view, prompt, modules)
    return Growing(view, prompt, modules, attention=attention)


class Whole:
    """The plain way: a full pass for each restoration."""

    def __init__(self, view: ModelView, prompt: Corrupted, modules: Sequence[str]) -> None:
        rows = [prompt.ids] * prompt.draws
        self._noise = prompt.shift(view.roles.embedding)
        self._last = [(row, len(prompt.ids) - 1) for row in range(len(rows))]
        self._above = Above(view, 0, rows)
        paths = dict.fromkeys([*(block.module for block in view.roles.blocks), *modules])
        taps = [Tap(path, "output") for path in paths]
        clean = view.run([prompt.ids], logits_at=self._last[:1], taps=taps)
        noisy = view.run(rows, logits_at=self._last, taps=taps, shifts=[self._noise])
        self.logits_BV: Tensor = torch.cat([clean.logits_MV, noisy.logits_MV])
        both = {tap.module: (clean.tapped[tap], noisy.tapped[tap]) for tap in taps}
        self._outputs = Outputs({path: torch.cat(pair) for path, pair in both.items()})

    def logprobs(
        self, restorations: Sequence[Restoration], token: int, *, progress: Progress = silent
    ) -> Tensor:
        """log p(token) behind the prompt in every draw of every restoration, (R, S), float32."""
        found = []
        for number, restoration in enumerate(restorations):
            progress("restoring", number, len(restorations))
            modules = dict.fromkeys(put.module for put in restoration)
            acts = [Act(module, partial(self._put, restoration, module)) for module in modules]
            with torch.no_grad():
                run = self._above.run(
                    range(len(self._last)), logits_at=self._last, shifts=[self._noise], acts=acts
                )
            found.append(logprobs_of(run.logits_MV, token))
        progress("restoring", len(restorations), len(restorations))
        return torch.stack(found)

    def _put(
        self,
        restoration: Restoration,
        module: str,
        inputs_BTI: Tensor,
        output_BTD: Tensor,
        rows: Sequence[int],
    ) -> Tensor:
        mine = [(0, put.position, put) for put in restoration if put.module == module]
        return self._outputs.put(output_BTD, mine)


def holding(view: ModelView, modules: tuple[str, ...]) -> str | None:
    """The attention with which growing batches give what full passes give, if any."""
    known = ("restoring", modules)
    if known not in view.probed:
        own = view.model.config._attn_implementation
        faults = []
        for attention in dict.fromkeys(("eager", own)):
            fault = _fault(view, modules, attention)
            if fault is None:
                view.probed[known] = attention
                break
            faults.append(f"{attention}: {fault}")
        else:
            view.probed[known] = None
            log.warning(
                "%s runs whole for each restoration, since running a part gives other numbers (%s)",
                view.source,
                "; ".join(faults),
            )
    return view.probed[known]


def _fault(view: ModelView, modules: tuple[str, ...], attention: str) -> str | None:
    """What is wrong with a growing batch on one prompt; None if nothing is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = tuple(torch.randint(min(view.vocabulary, 1000), (7,)).tolist())
        noise_SKD = torch.randn(2, 2, view.roles.hidden_size).to(view.device)
    scale = view.embedding.detach().float().std()
    prompt = Corrupted(ids, 1, 3 * scale * noise_SKD)
    restorations = _samples(view, modules, len(ids))
    whole = Whole(view, prompt, modules).logprobs(restorations, ids[0])
    try:
        part = Growing(view, prompt, modules, attention=attention).logprobs(restorations, ids[0])
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    apart = float((part - whole).abs().max())
    fine = apart <= view.limits.slack(TOLERANCE)
    return None if fine else f"log-probabilities differ by {apart:.1e}"


def _samples(view: ModelView, modules: Sequence[str], length: int) -> list[Restoration]:
    """Restorations of every kind, some of several outputs."""
    blocks = [block.module for block in view.roles.blocks]
    last, middle = length - 1, len(blocks) // 2
    found: list[Restoration] = [
        (Put(blocks[0], 1),),
        (Put(blocks[middle], 2), Put(blocks[-1], last)),
        (Put(blocks[-1], last),),
        (Put(blocks[middle], 0), Put(blocks[middle], last)),
    ]
    for module in modules[:: max(1, len(modules) // 6)]:
        found += [(Put(module, 1),), (Put(blocks[0], 2), Put(module, 2, "corrupted"))]
    return found
