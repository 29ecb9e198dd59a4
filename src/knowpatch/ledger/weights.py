"""Which weights differ between two sets of live edits, read off their patches; no torch, no model.

What lies between two states of a parameter is the sum of the changes that only one of them has. It
is kept in factors where all of them are, so that its norm costs little. Axes: R, C rows and columns
of a parameter, K the rank.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from knowpatch.errors import DataError
from knowpatch.ledger import blobs
from knowpatch.ledger.history import Edit

Array = NDArray[np.float32]
Slice = tuple[str, int, int, int | None]


@dataclass
class Difference:
    """What differs in one parameter (or in a slice of it).

    Attributes:
        parameter: its name.
        part: dimension, start and stop of the slice.
        edits: ids of the edits that make the difference.
        lefts, rights: factors (R, K) and (K, C) of the low-rank part.
        dense: the rest (R, C), if there is any.
    """

    parameter: str
    part: tuple[int, int, int | None]
    edits: list[str] = field(default_factory=list)
    lefts: list[Array] = field(default_factory=list)
    rights: list[Array] = field(default_factory=list)
    dense: Array | None = None

    @property
    def rank(self) -> int | None:
        """Of the difference, at most; None where it may be full."""
        return None if self.dense is not None else sum(left.shape[1] for left in self.lefts)

    @property
    def norm(self) -> float:
        """Frobenius norm of the difference."""
        if not self.lefts:
            return 0.0 if self.dense is None else float(np.linalg.norm(self.dense))
        dense = [] if self.dense is None else [self.dense]
        rows = max(len(part) for part in (*self.lefts, *dense))
        left = np.concatenate([_tall(part, rows) for part in self.lefts], 1)
        right = np.concatenate(self.rights, 0)
        if self.dense is not None:
            return float(np.linalg.norm(self.dense + left @ right))
        # |L R| = |R_L R_R^T| with the triangular factors of L and R^T: K x K, never R x C.
        inner = _triangle(left) @ _triangle(right.T).T
        return float(np.linalg.norm(inner))


def _tall(left: Array, rows: int) -> Array:
    """With zeros below: a change of rows says nothing of those behind its last."""
    return np.pad(left, ((0, rows - len(left)), (0, 0)))


def _triangle(matrix: Array) -> Array:
    triangle: Any = np.linalg.qr(matrix, mode="r")
    return np.asarray(triangle)


def differences(folder: Path, first: Sequence[Edit], second: Sequence[Edit]) -> list[Difference]:
    """What the weights of the state `second` have over those of `first`, by parameter.

    Raises:
        DataError: a patch file is missing or damaged.
    """
    found: dict[Slice, Difference] = {}
    for sign, edits, others in ((-1.0, first, second), (1.0, second, first)):
        ids = {edit.id for edit in others}
        for edit in edits:
            if edit.id not in ids and edit.recorded["weights"]:
                _add(found, folder, edit, sign)
    return sorted(found.values(), key=lambda d: (d.parameter, d.part[1]))


def _add(found: dict[Slice, Difference], folder: Path, edit: Edit, sign: float) -> None:
    """Add an edit's changes, or subtract them."""
    path = blobs.patch_path(folder, edit.id)
    blobs.content_of(path, edit.recorded["sha256"])
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["knowpatch"])
        for number, delta in enumerate(header["deltas"]):
            address = delta["address"]
            key = (address["parameter"], address["dim"], address["start"], address["stop"])
            difference = found.setdefault(key, Difference(key[0], key[1:]))
            difference.edits.append(edit.id)
            names = [name for name in file.keys() if name.startswith(f"{number:04d}.")]  # noqa: SIM118
            tensors = {name.split(".", 1)[1]: file.get_tensor(name) for name in names}
            _join(difference, tensors, sign)


def _join(difference: Difference, tensors: dict[str, Any], sign: float) -> None:
    if "left" in tensors:
        difference.lefts.append(sign * tensors["left"])
        difference.rights.append(tensors["right"])
    elif "values" in tensors:
        # Rows are a product, too: the identity's columns at their places, times their values.
        index, values = tensors["index"], tensors["values"]
        left = np.zeros((int(index.max()) + 1, len(index)), dtype=np.float32)
        left[index, np.arange(len(index))] = sign
        difference.lefts.append(left)
        difference.rights.append(values)
    elif "delta" in tensors:
        change = sign * tensors["delta"]
        difference.dense = change if difference.dense is None else difference.dense + change
    else:
        raise DataError(f"{difference.parameter}: a change of a form that is not known here")
