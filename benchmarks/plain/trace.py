"""Causal tracing as the published program does it: a full pass for every restored state.

Meng, Bau, Andonian, Belinkov (arXiv 2202.05262). A batch of 1 + S copies of the prompt: row 0 is
clean, in the others the subject's embeddings are moved. In each pass the states to restore are
copied from row 0 into the others; severed modules keep what they put out in a corrupted pass.
Axes: S draws of noise, K noisy tokens, B = 1 + S rows, T tokens, L blocks, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]
"""What a module puts out (B, T, D) to what it puts out instead."""


@dataclass(frozen=True, eq=False)
class Setup:
    """A model, a prompt, and noise_SKD for its tokens from `first` on; all modules by path."""

    model: Any
    embedding: str
    ids: Sequence[int]
    first: int
    noise_SKD: Tensor

    def noisy(self, output_BTD: Tensor) -> Tensor:
        changed = output_BTD.clone()
        stop = self.first + self.noise_SKD.shape[1]
        changed[1:, self.first : stop] += self.noise_SKD.to(changed.dtype)
        return changed

    def run(self, changes: Mapping[str, Change]) -> Tensor:
        """Probabilities behind the prompt (B, V) of one full pass."""
        ids_BT = torch.tensor([list(self.ids)] * (1 + len(self.noise_SKD)))
        every = {self.embedding: self.noisy, **changes}
        with changing(self.model, every, len(ids_BT)), torch.no_grad():
            logits_BTV = self.model(input_ids=ids_BT, use_cache=False).logits
        return logits_BTV[:, -1].float().softmax(-1)

    def scores(self, changes: Mapping[str, Change], token: int) -> Tensor:
        """p(token) in each draw, (S)."""
        return self.run(changes)[1:, token]


@contextlib.contextmanager
def changing(model: nn.Module, changes: Mapping[str, Change], rows: int) -> Iterator[None]:
    """Within the block modules put out what the changes make of it."""

    def hook(change: Change) -> Any:
        def put(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            # OPT runs its MLP on flattened rows.
            by_row = output if output.ndim == 3 else output.view(rows, -1, output.shape[-1])
            return change(by_row).view(output.shape)

        return put

    handles = [
        model.get_submodule(path).register_forward_hook(hook(change))
        for path, change in changes.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def restoring(position: int) -> Change:
    """The state at a position, copied from the clean row into the others."""

    def change(output_BTD: Tensor) -> Tensor:
        changed = output_BTD.clone()
        changed[1:, position] = changed[:1, position]
        return changed

    return change


def window(layer: int, width: int, layers: int) -> range:
    """The layers of a window around one, cut at both ends."""
    return range(max(0, layer - width // 2), min(layers, layer + width - width // 2))


def trace(setup: Setup, modules: Sequence[str], width: int, token: int) -> Tensor:
    """scores (T, L, S): p(token) with the modules of a window restored at each token and layer."""
    layers, found = len(modules), []
    for position in range(len(setup.ids)):
        for layer in range(layers):
            paths = [modules[other] for other in window(layer, width, layers)]
            changes = {path: restoring(position) for path in paths}
            found.append(setup.scores(changes, token))
    return torch.stack(found).view(len(setup.ids), layers, -1)


def severed(
    setup: Setup, blocks: Sequence[str], modules: Sequence[str], position: int, token: int
) -> Tensor:
    """scores (L, S): a block's output restored at a position, while all of `modules` put out at it
    what they put out in the corrupted pass."""
    kept: dict[str, Tensor] = {}

    def keeping(path: str) -> Change:
        def change(output_BTD: Tensor) -> Tensor:
            kept[path] = output_BTD[1:, position].clone()
            return output_BTD

        return change

    def severing(path: str) -> Change:
        def change(output_BTD: Tensor) -> Tensor:
            changed = output_BTD.clone()
            changed[1:, position] = kept[path]
            return changed

        return change

    setup.run({path: keeping(path) for path in modules})
    cut = {path: severing(path) for path in modules}
    found = [setup.scores({**cut, block: restoring(position)}, token) for block in blocks]
    return torch.stack(found)
