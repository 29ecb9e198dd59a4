"""The kinds of wrap that a patch may carry, as data; what each does, and how several are one.

A wrap acts on the output of one module. It decides once for each row, when the row's prompt is
read, from what enters the module at the last prompt token, and acts there. A patch names the kind
("name@version") and holds its data; the code is here, so that a patch file never brings code.
Axes: B rows, I and D input and output size of the module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from knowpatch.errors import PatchError
from knowpatch.parts.memory import Label, Memory, grown
from knowpatch.patch import Wrap

CODEBOOK = "codebook@1"


class Joined(Protocol):
    """Wraps of one kind on one module, as one."""

    def decide(self, queries_BI: Tensor) -> Tensor:
        """What each row will do (B), from what enters the module at its last prompt token."""

    def act(self, outputs_BD: Tensor, decision_B: Tensor) -> Tensor:
        """What the module puts out there (B, D)."""


def codebook(module: str, entries: Sequence[Memory]) -> Wrap:
    """A wrap that overwrites a module's output where its input is near a key (GRACE)."""
    return Wrap(
        module=module,
        kind=CODEBOOK,
        data={"labels": [list(label) for memory in entries for label in memory.labels]},
        tensors={
            "keys": torch.cat([memory.keys_NI for memory in entries]),
            "values": torch.cat([memory.values_ND for memory in entries]),
            "radii": torch.cat([memory.radii_N for memory in entries]),
        },
    )


@dataclass(frozen=True, eq=False)
class Codebook:
    """GRACE's codebook: an entry whose ball holds the query gives the output."""

    memory: Memory

    @classmethod
    def join(cls, wraps: Sequence[Wrap]) -> Codebook:
        return cls(grown([_entries(wrap) for wrap in wraps]))

    def decide(self, queries_BI: Tensor) -> Tensor:
        return self.memory.to(queries_BI.device).hit(queries_BI)

    def act(self, outputs_BD: Tensor, decision_B: Tensor) -> Tensor:
        values_BD = self.memory.values_ND.to(outputs_BD)[decision_B.clamp(min=0)]
        return torch.where(decision_B[:, None] >= 0, values_BD, outputs_BD)


def _entries(wrap: Wrap) -> Memory:
    labels: tuple[Label, ...] = tuple(tuple(label) for label in wrap.data["labels"])
    tensors = wrap.tensors
    return Memory(tensors["keys"], tensors["values"], tensors["radii"], labels)


def _check_codebook(wrap: Wrap) -> None:
    tensors, labels = wrap.tensors, wrap.data.get("labels")
    good = (
        set(tensors) == {"keys", "values", "radii"}
        and set(wrap.data) == {"labels"}
        and isinstance(labels, list)
        and all(isinstance(label, list) for label in labels)
        and all(isinstance(i, int) and i >= 0 for label in labels for i in label)
        and [tensors[name].ndim for name in ("keys", "values", "radii")] == [2, 2, 1]
        and {len(tensor) for tensor in tensors.values()} == {len(labels)}
        and all(tensor.dtype == torch.float32 for tensor in tensors.values())
        and len(labels) > 0
    )
    if not good:
        raise PatchError(f"damaged wrap of kind {CODEBOOK}")


@dataclass(frozen=True)
class _WrapKind:
    join: Callable[[Sequence[Wrap]], Joined]
    check: Callable[[Wrap], Any]
    sizes: Callable[[Wrap], tuple[int, int]]


_KINDS: dict[str, _WrapKind] = {
    CODEBOOK: _WrapKind(
        Codebook.join,
        _check_codebook,
        lambda wrap: (wrap.tensors["keys"].shape[1], wrap.tensors["values"].shape[1]),
    )
}


def check_wrap(wrap: Wrap, shape: tuple[int, int]) -> None:
    """PatchError, in one line, unless `wrap` is known, whole, and fits a map of (D, I)."""
    if wrap.kind not in _KINDS:
        raise PatchError(
            f"unknown wrap {wrap.kind!r}; this version of knowpatch knows: {', '.join(_KINDS)}"
        )
    kind = _KINDS[wrap.kind]
    kind.check(wrap)
    into, out = kind.sizes(wrap)
    if (out, into) != shape:
        raise PatchError(
            f"a wrap for a map from {into} to {out} numbers on {wrap.module}, "
            f"which maps {shape[1]} to {shape[0]}"
        )


def join(wraps: Sequence[Wrap]) -> list[Joined]:
    """Wraps of one module, in patch order, as few: neighbours of one kind are one."""
    runs: list[list[Wrap]] = []
    for wrap in wraps:
        if runs and runs[-1][0].kind == wrap.kind:
            runs[-1].append(wrap)
        else:
            runs.append([wrap])
    return [_KINDS[run[0].kind].join(run) for run in runs]
