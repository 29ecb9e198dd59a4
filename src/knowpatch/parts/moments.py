"""Second moments of what enters linear maps, over ordinary text: C = mean of k k^T.

And, where asked for, of the gradients of the text's loss at what leaves them: the other Kronecker
factor of the Fisher information (parts/curvature.py). Every token of the text counts once, padding
never. One pass gives the moments of several maps; it ends at the last of them or, for gradients,
goes up to the loss and back. Products are float32 and over one batch, sums float64; two collections
add up to the collection over both texts. Kept on disk by content: the model, the map, the text and
how much of it. They are those of the model as it came, whatever patches are live on it.
Axes: N tokens, I width of a map's input.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from knowpatch.files import kept_in, write_atomically
from knowpatch.method import Preparation, Shape
from knowpatch.models.hooks import Hook, Reached, registered
from knowpatch.models.load import device_for, fast_dtype
from knowpatch.models.passes import Tap
from knowpatch.models.twin import twin
from knowpatch.models.view import ModelView
from knowpatch.parts.gradients import Gradients
from knowpatch.parts.text import ROW_TOKENS, find_text, packed_rows
from knowpatch.progress import Progress, silent

BATCH_ROWS = 16
VERSION = 3
"""Of what is kept: raised whenever the same request would give other statistics."""
SAVE_SECONDS = 20.0
"""How long a collection may be that is lost when it is killed."""
STAGE = "collecting key statistics"


@dataclass(frozen=True, eq=False)
class Moments:
    """A running sum of k k^T, float64 (I, I), and the number of tokens in it."""

    sum_II: Tensor
    count: int

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.sum_II + other.sum_II, self.count + other.count)

    def mean(self) -> Tensor:
        """C, symmetric, float64 (I, I)."""
        return (self.sum_II + self.sum_II.T) / (2 * self.count)


def collect(
    view: ModelView,
    taps: Sequence[Tap],
    rows: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype | None = None,
    partial: Path | None = None,
    progress: Progress = silent,
    gradients: bool = False,
) -> list[Moments]:
    """The moments of what each tap sees over `rows`, from one pass that ends at the last tap.

    Args:
        view: the model; its weights count as they came, without patches.
        taps: what to take the moments of, in any order.
        rows: token ids; at least one.
        dtype: of the pass; None for the model's own.
        partial: a file for what there is so far, written every SAVE_SECONDS: a collection that was
            killed goes on from it, to the same bytes. It is gone afterwards.
        progress: told how many rows are done.
        gradients: of the loss (nats, summed over tokens) at what leaves each tap's module, instead
            of what the tap sees. A row's last token predicts nothing, and does not count.
    """
    ordered = sorted(rows, key=len, reverse=True)  # rows of one length need no padding
    name = _digest(
        view.fingerprint, [(t.module, t.side) for t in taps], ordered, str(dtype), gradients
    )
    sums = _Sums() if partial is None else _Sums.read(partial, name)
    if gradients:
        backward = Gradients(view, [tap.module for tap in taps], dtype=dtype)
        add = functools.partial(_differentiate, backward, taps)
    else:
        model = twin(view.model, attention=None, weight=_as_it_came(view, taps, dtype))
        add = functools.partial(_pass, view, model, taps)
    saved, pause = monotonic(), SAVE_SECONDS
    for start in range(sums.done, len(ordered), BATCH_ROWS):
        progress(STAGE, start, len(ordered))
        add(ordered[start : start + BATCH_ROWS], sums)
        if partial is not None and monotonic() - saved >= pause:
            begun = monotonic()
            write_atomically(partial, sums.written(name))
            saved = monotonic()
            pause = max(SAVE_SECONDS, 20 * (saved - begun))  # sums of a wide map take long
    progress(STAGE, len(ordered), len(ordered))
    if partial is not None:
        partial.unlink(missing_ok=True)
    return [Moments(sums.of[number], sums.count) for number in range(len(taps))]


def key_moments(
    view: ModelView,
    role: str,
    layers: Sequence[int],
    *,
    text: str | None = None,
    tokens: int,
    seed: int,
    progress: Progress = silent,
    gradients: bool = False,
) -> dict[int, Moments]:
    """The moments of what enters `role` of each of the blocks `layers`, over `tokens` tokens.

    What is kept is read; all that is missing is collected in one pass, and kept. What comes back is
    by block, from input to output.

    Args:
        text: where the text comes from, as `find_text` takes it.
        seed: of the order in which texts are taken.
        gradients: those of the loss at what leaves the maps, instead of what enters them.

    Raises:
        ModelError: a block lacks the role; InputError: the text cannot be read.
    """
    asked: dict[str, Any] = {"text": text, "tokens": tokens, "seed": seed, "gradients": gradients}
    paths = {layer: kept_at(view.fingerprint, role, layer, **asked) for layer in sorted(layers)}
    read = {layer: _read(path) for layer, path in paths.items()}
    found = {layer: moments for layer, moments in read.items() if moments is not None}
    missing = [layer for layer in paths if layer not in found]
    if not missing:
        return found
    taps = [Tap(view.roles.linear(role, layer).module, "input") for layer in missing]
    rows = packed_rows(view, find_text(text), tokens, seed=seed, progress=progress)
    partial = kept_in("moments", json.dumps([paths[n].name for n in missing]), ".partial")
    dtype = fast_dtype(view.device)
    made = collect(
        view, taps, rows, dtype=dtype, partial=partial, progress=progress, gradients=gradients
    )
    for layer, moments in zip(missing, made, strict=True):
        content = {"sum": moments.sum_II, "count": torch.tensor(moments.count)}
        write_atomically(paths[layer], save(content))
        found[layer] = moments
    return {layer: found[layer] for layer in paths}


def kept_at(
    fingerprint: str,
    role: str,
    layer: int,
    *,
    text: str | None,
    tokens: int,
    seed: int,
    gradients: bool = False,
) -> Path:
    """The file that the moments of one map are kept in; no model is needed to know it.

    Raises:
        InputError: `text` cannot be found.
    """
    source = find_text(text)
    # Of the device that a model is loaded to by default: which it will be is not known before.
    dtype = str(fast_dtype(device_for("auto")))
    side = ("gradients",) if gradients else ()
    what = (fingerprint, role, layer, source.name, source.digest, tokens, seed, *side)
    content = json.dumps([VERSION, *what, ROW_TOKENS, dtype])
    return kept_in("moments", content, ".safetensors")


def preparations(
    shape: Shape,
    role: str,
    layers: Sequence[int],
    *,
    text: str | None,
    tokens: int,
    seed: int,
    gradients: bool = False,
) -> list[Preparation]:
    """What `key_moments` keeps for a model of this shape. One pass collects all that is missing;
    it counts as so many tokens through the whole model.

    Raises:
        InputError: `text` cannot be found.
    """
    asked: dict[str, Any] = {"text": text, "tokens": tokens, "seed": seed, "gradients": gradients}
    kind, source = "gradient" if gradients else "key", find_text(text).name
    # Forward it ends at the last of the blocks; with gradients it goes up to the loss and back.
    depth = (max(layers, default=0) + 1) / shape.layers
    passed = 3 * tokens if gradients else round(tokens * depth)
    return [
        Preparation(
            f"{kind} statistics of block {layer} ({source})",
            kept_at(shape.fingerprint, role, layer, **asked),
            0 if number else passed,
        )
        for number, layer in enumerate(layers)
    ]


def eigen(second_II: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (I), rising, and eigenvectors (I, I) as columns, float64."""
    values_I, vectors_II = torch.linalg.eigh((second_II + second_II.T) / 2)
    return values_I, vectors_II.contiguous()


def kept_eigen(second_II: Tensor) -> tuple[Tensor, Tensor]:
    """As `eigen`, kept on disk by the content of the matrix."""
    content = hashlib.sha256(second_II.numpy().tobytes()).hexdigest()
    path = kept_in("eigen", content, ".safetensors")
    try:
        kept = load(path.read_bytes())
        return kept["values"], kept["vectors"]
    except (OSError, KeyError, SafetensorError):
        pass
    values_I, vectors_II = eigen(second_II)
    write_atomically(path, save({"values": values_I, "vectors": vectors_II}))
    return values_I, vectors_II


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _read(path: Path) -> Moments | None:
    """What is kept in a file; None if it is not there, or damaged."""
    try:
        kept = load(path.read_bytes())
        return Moments(kept["sum"], int(kept["count"]))
    except (OSError, KeyError, SafetensorError):
        return None


@dataclass
class _Sums:
    """A collection so far: rows done, tokens in them, and the sum of each tap by its number."""

    done: int = 0
    count: int = 0
    of: dict[int, Tensor] = field(default_factory=dict)

    def add(self, number: int, inputs_NI: Tensor) -> None:
        wide_NI = inputs_NI.float()
        product_II = (wide_NI.T @ wide_NI).cpu()
        if number not in self.of:
            self.of[number] = torch.zeros(product_II.shape, dtype=torch.float64)
        sum_II = self.of[number]
        sum_II += product_II

    def written(self, name: str) -> bytes:
        """As the content of a file, with the name of the collection that it is part of."""
        numbers = torch.tensor([self.done, self.count])
        whose = torch.tensor(list(bytes.fromhex(name)))
        return save({**{str(n): t for n, t in self.of.items()}, "so far": numbers, "name": whose})

    @classmethod
    def read(cls, path: Path, name: str) -> _Sums:
        """What a file holds of the collection called `name`; nothing if it is none of it."""
        try:
            kept = load(path.read_bytes())
            if bytes(kept.pop("name").tolist()).hex() == name:
                done, count = kept.pop("so far").tolist()
                return cls(done, count, {int(n): tensor.clone() for n, tensor in kept.items()})
        except (OSError, KeyError, ValueError, SafetensorError):
            pass
        return cls()


def _pass(
    view: ModelView, model: Any, taps: Sequence[Tap], rows: Sequence[Sequence[int]], sums: _Sums
) -> None:
    """Add what the taps see over `rows`, run through `model`, up to the last tap."""
    batch = view.batch(rows)
    real_N = batch.mask_BT.bool().flatten()
    padded = not bool(real_N.all())
    seen: set[int] = set()

    def see(number: int, value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        inputs_NI = tensor.reshape(-1, tensor.shape[-1])  # some models flatten rows themselves
        sums.add(number, inputs_NI[real_N] if padded else inputs_NI)
        seen.add(number)
        if len(seen) == len(taps):
            raise Reached

    hooks = [
        _seeing(model.get_submodule(tap.module), tap.side, number, see)
        for number, tap in enumerate(taps)
    ]
    with registered(hooks), torch.no_grad(), contextlib.suppress(Reached):
        model(**batch.inputs(), use_cache=False)
    sums.done += len(rows)
    sums.count += sum(len(row) for row in rows)


def _differentiate(
    gradients: Gradients, taps: Sequence[Tap], rows: Sequence[Sequence[int]], sums: _Sums
) -> None:
    """Add the gradients at each tap's module over `rows`, whose own tokens are the labels."""
    places = [(row, at) for row, ids in enumerate(rows) for at in range(len(ids) - 1)]
    if places:
        labels = [rows[row][at + 1] for row, at in places]
        _, found = gradients.of(rows, places, labels, [1.0] * len(places))
        for number, tap in enumerate(taps):
            sums.add(number, found[tap.module].gradients_MO)
    sums.done += len(rows)
    sums.count += len(places)


def _seeing(module: nn.Module, side: str, number: int, see: Callable[[int, Any], None]) -> Hook:
    if side == "input":
        return lambda: module.register_forward_pre_hook(lambda m, args: see(number, args))
    return lambda: module.register_forward_hook(lambda m, args, output: see(number, output))


def _as_it_came(
    view: ModelView, taps: Sequence[Tap], dtype: torch.dtype | None
) -> Callable[[nn.Parameter], Tensor]:
    """What stands for each parameter: its value before any patch, in `dtype` up to the last tap.

    What is above the last tap never runs, and is not copied. A quantised model computes in the
    dtype that it was loaded for.
    """
    names = {id(parameter): name for name, parameter in view.model.named_parameters()}
    last = max(view.roles.block_of(tap.module) for tap in taps)
    above = tuple(f"{block.module}." for block in view.roles.blocks[last + 1 :])

    def weight(parameter: nn.Parameter) -> Tensor:
        name = names[id(parameter)]
        value = view.originals.get(name, parameter).detach()
        runs = not name.startswith(above) and value.is_floating_point()
        return value.to(dtype) if runs and dtype and not view.quantised else value

    return weight
