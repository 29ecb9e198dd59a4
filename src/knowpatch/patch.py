"""Patch: what an edit is, as a value that can be saved, named by its content and taken back.

A patch holds deltas, addressed by parameter and slice, and at most one prompt rule. It holds data
only: a rule names its kind and version, and the code for that kind lives in the library. Its id is
the hash of its content, so the same inputs give the same file, byte for byte.

On disk: one safetensors file; one metadata entry "knowpatch" with the header as canonical JSON.
Nothing in it is ever unpickled. Axes: R rows and C columns of a parameter as stored, K the rank.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from knowpatch.errors import PatchError
from knowpatch.files import write_atomically
from knowpatch.request import EditRequest

FORMAT = 1
HEADER = "knowpatch"
LARGEST_HEADER = 16 * 2**20


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Address(_Value):
    """Where a delta goes: a parameter, or the part of it from `start` to `stop` along `dim`."""

    parameter: str
    dim: NonNegativeInt = 0
    start: NonNegativeInt = 0
    stop: NonNegativeInt | None = None

    def narrow(self, tensor: Tensor) -> Tensor:
        """The addressed part of `tensor`, as a view on it."""
        stop = tensor.shape[self.dim] if self.stop is None else self.stop
        return tensor.narrow(self.dim, self.start, stop - self.start)


@dataclass(frozen=True, eq=False)
class LowRank:
    """left (R, K) @ right (K, C), float32: a rank-K change."""

    left: Tensor
    right: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[0]:
            raise PatchError(
                f"low-rank factors {tuple(self.left.shape)} and {tuple(self.right.shape)} "
                "do not multiply"
            )
        return (self.left.shape[0], self.right.shape[1])

    @property
    def rank(self) -> int:
        return int(self.left.shape[1])

    def added_to(self, tensor: Tensor) -> Tensor:
        """`tensor` (R, C) plus this change, a new tensor; differentiable."""
        return tensor + self.left @ self.right


@dataclass(frozen=True, eq=False)
class Rows:
    """values (N, C), float32, added to the rows `index` (N), int64, of a matrix."""

    index: Tensor
    values: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"index": self.index, "values": self.values}

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        index, values = self.index, self.values
        if index.ndim != 1 or values.ndim != 2 or values.shape[0] != index.shape[0]:
            raise PatchError("a rows delta needs one index for each row of values")
        if index.dtype != torch.int64 or len(index) == 0 or len(index.unique()) != len(index):
            raise PatchError("the row indices must be distinct int64 numbers")
        if int(index.min()) < 0 or int(index.max()) >= whole[0]:
            raise PatchError(f"a row index is outside 0..{whole[0] - 1}")
        return (whole[0], values.shape[1])

    @property
    def rank(self) -> int:
        return int(self.index.shape[0])

    def added_to(self, tensor: Tensor) -> Tensor:
        return tensor.index_add(0, self.index.to(tensor.device), self.values)


@dataclass(frozen=True, eq=False)
class Dense:
    """delta, float32, of the addressed shape."""

    delta: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"delta": self.delta}

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.delta.shape)

    @property
    def rank(self) -> None:
        return None

    def added_to(self, tensor: Tensor) -> Tensor:
        return tensor + self.delta


Delta = LowRank | Rows | Dense
_FORMS: dict[str, type[Delta]] = {
    "low-rank": LowRank,
    "rows": Rows,
    "dense": Dense,
}


@dataclass(frozen=True, eq=False)
class WeightDelta:
    """One change of one parameter (or of a slice of it), in the parameter's own orientation.

    `base` is the hash of the stored tensor that the change was computed on, "" if not known.
    """

    address: Address
    change: Delta
    base: str = ""

    def added_to(self, whole: Tensor) -> Tensor:
        """The parameter `whole` plus this change, in float32, as a new tensor; differentiable."""
        address, wide = self.address, whole.float()
        change = _on(self.change, wide.device)
        if address.stop is None:
            return change.added_to(wide)
        part = change.added_to(address.narrow(wide))
        size = whole.shape[address.dim]
        before = wide.narrow(address.dim, 0, address.start)
        after = wide.narrow(address.dim, address.stop, size - address.stop)
        return torch.cat([before, part, after], dim=address.dim)

    def check(self, whole: Sequence[int]) -> None:
        """PatchError unless the change fits a parameter of shape `whole`."""
        address = self.address
        stop = whole[address.dim] if address.dim < len(whole) else 0
        stop = stop if address.stop is None else address.stop
        if address.dim >= len(whole) or not address.start < stop <= whole[address.dim]:
            raise PatchError(f"{address.parameter}: no such slice in shape {tuple(whole)}")
        part = list(whole)
        part[address.dim] = stop - address.start
        given = self.change.shape(part)
        if tuple(given) != tuple(part):
            raise PatchError(
                f"{address.parameter}: a change of shape {tuple(given)} for {tuple(part)}"
            )


def _on(change: Delta, device: torch.device) -> Delta:
    return type(change)(**{name: tensor.to(device) for name, tensor in change.tensors().items()})


class PromptRule(_Value):
    """How to rewrite a question before the model sees it; `kind` is "name@version"."""

    kind: str
    data: dict[str, Any]


class Provenance(_Value):
    """What a patch was made from: the same for the same inputs; never time, author or path."""

    method: str
    config: dict[str, Any]
    seed: int
    fingerprint: str
    requests: tuple[EditRequest, ...]
    version: str


@dataclass(frozen=True, eq=False)
class Patch:
    """The result of an edit.

    Attributes:
        provenance: what it was made from.
        deltas: weight changes, in the order in which they are added.
        rule: a prompt rule, for methods that leave the weights alone.
    """

    provenance: Provenance
    deltas: tuple[WeightDelta, ...] = ()
    rule: PromptRule | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patch) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    @cached_property
    def id(self) -> str:
        """Hash of the content, 64 hexadecimal digits."""
        digest = hashlib.sha256(_canonical(self._header()).encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            for piece in tensor.flatten().split(1 << 22):
                digest.update(piece.numpy().tobytes())
        return digest.hexdigest()

    @property
    def rank(self) -> int | None:
        """The highest rank among the deltas; None without deltas, or where one has full rank."""
        ranks = [delta.change.rank for delta in self.deltas]
        return (
            max((rank for rank in ranks if rank is not None), default=None) if all(ranks) else None
        )

    def to_bytes(self) -> bytes:
        """The file that `save` writes; the same content gives the same bytes."""
        header = {**self._header(), "id": self.id}
        return save(self._tensors(), metadata={HEADER: _canonical(header)})

    def save(self, path: str | Path) -> Path:
        """Write the patch to `path`, by a temporary file that is renamed, and return `path`."""
        return write_atomically(path, self.to_bytes())

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "provenance": self.provenance.model_dump(mode="json"),
            "deltas": [
                {
                    "address": delta.address.model_dump(),
                    "form": next(n for n, form in _FORMS.items() if isinstance(delta.change, form)),
                    "base": delta.base,
                }
                for delta in self.deltas
            ],
            "rule": self.rule.model_dump() if self.rule else None,
        }

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{number:04d}.{name}": tensor.detach().cpu().contiguous()
            for number, delta in enumerate(self.deltas)
            for name, tensor in delta.change.tensors().items()
        }

    @classmethod
    def load(cls, path: str | Path) -> Patch:
        """Read a patch file.

        Raises:
            PatchError: no such file, not a patch, damaged, or of a newer format; in one line.
        """
        path = Path(path)
        if not path.is_file():
            raise PatchError(f"{path}: no such patch file")
        try:
            _check_size(path)
            with safe_open(path, framework="pt") as file:
                header = _parse_header(path, file.metadata())
                wanted = _expected_names(header)
                if set(file.keys()) != wanted:
                    raise PatchError(f"{path}: damaged (its tensors are not those of its header)")
                tensors = {name: file.get_tensor(name) for name in sorted(wanted)}
        except (SafetensorError, OSError, ValueError, OverflowError, RuntimeError) as error:
            raise PatchError(f"{path}: not a readable patch file ({error})") from None
        return cls._from(path, header, tensors)

    @classmethod
    def _from(cls, path: Path, header: _Header, tensors: Mapping[str, Tensor]) -> Patch:
        for name, tensor in tensors.items():
            whole_numbers = name.endswith(".index")
            if tensor.dtype != (torch.int64 if whole_numbers else torch.float32):
                raise PatchError(f"{path}: damaged ({name} has type {tensor.dtype})")
            if not whole_numbers and not is_finite(tensor):
                raise PatchError(f"{path}: holds values that are not finite; it cannot be applied")
        deltas = []
        for number, part in enumerate(header.deltas):
            prefix = f"{number:04d}."
            parts = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            deltas.append(WeightDelta(part.address, _FORMS[part.form](**parts), part.base))
        patch = cls(provenance=header.provenance, deltas=tuple(deltas), rule=header.rule)
        if patch.id != header.id:
            raise PatchError(f"{path}: damaged (its content does not give the id it carries)")
        return patch


class _Part(_Value):
    address: Address
    form: Literal["low-rank", "rows", "dense"]
    base: str


class _Header(_Value):
    format: Literal[1]
    id: str
    provenance: Provenance
    deltas: tuple[_Part, ...]
    rule: PromptRule | None


def _canonical(header: Mapping[str, Any]) -> str:
    return json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _parse_header(path: Path, metadata: Mapping[str, str] | None) -> _Header:
    if not metadata or HEADER not in metadata:
        raise PatchError(f"{path}: a safetensors file, but not a knowpatch patch")
    try:
        loaded = json.loads(metadata[HEADER])
        found = loaded.get("format")
        if found != FORMAT:
            raise PatchError(
                f"{path}: patch format {found!r}; this version of knowpatch reads format {FORMAT}"
            )
        return _Header.model_validate_json(metadata[HEADER])
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise PatchError(f"{path}: damaged header ({place}: {fault['msg']})") from None
    except (ValueError, RecursionError, AttributeError):
        raise PatchError(f"{path}: damaged header (not a JSON object)") from None


def _expected_names(header: _Header) -> set[str]:
    return {
        f"{number:04d}.{name}"
        for number, part in enumerate(header.deltas)
        for name in _field_names(part.form)
    }


def _field_names(form: str) -> list[str]:
    return [field.name for field in dataclasses.fields(_FORMS[form])]


def _check_size(path: Path) -> None:
    """Refuse a header that no patch needs before anything parses it (a JSON bomb costs memory)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > LARGEST_HEADER:
        raise PatchError(
            f"{path}: not a readable patch file (its header would be {length} bytes, "
            f"{LARGEST_HEADER} are allowed)"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether every number of `tensor` is finite; in pieces, to leave a mapped file on disk."""
    return all(bool(torch.isfinite(piece).all()) for piece in tensor.flatten().split(1 << 22))
