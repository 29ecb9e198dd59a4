"""Patch: what an edit is, as a value that can be saved, named by its content and taken back.

A patch holds deltas, addressed by parameter and slice, wraps by module, at most one prompt rule and
one procedure, and traces for later edits. It holds data only: a wrap, a rule or a procedure names
its kind and version, and the code for that kind lives in the library. Its id is the hash of its
content, so the same inputs give the same file, byte for byte.

On disk: one safetensors file; one metadata entry "knowpatch" with the header as canonical JSON.
Nothing in it is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from knowpatch.deltas import FORMS, Address, Value, WeightDelta, is_finite
from knowpatch.errors import PatchError
from knowpatch.files import write_atomically
from knowpatch.request import EditRequest

FORMAT = 4
HEADER = "knowpatch"
LARGEST_HEADER = 4 * 2**20
"""Bytes. Ten thousand requests fit; parsing costs up to a hundred times as much memory."""


@dataclass(frozen=True, eq=False)
class PromptRule:
    """How to rewrite a question before the model sees it; `kind` is "name@version"."""

    kind: str
    data: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Procedure:
    """How to answer a question by several calls of the model; `kind` is "name@version"."""

    kind: str
    data: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Wrap:
    """What acts on the output of `module` while the model runs; `kind` is "name@version".

    `tensors` hold float32 (or int64), `data` what JSON can hold.
    """

    module: str
    kind: str
    data: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class Provenance(Value):
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
        procedure: how questions are answered, for methods that ask the model several times.
        wraps: what acts on modules while the model runs.
        traces: what later edits of the same method have to know of this one, float32 by name; its
            own contribution to the method's running state, never the state itself.
    """

    provenance: Provenance
    deltas: tuple[WeightDelta, ...] = ()
    rule: PromptRule | None = None
    wraps: tuple[Wrap, ...] = ()
    traces: Mapping[str, Tensor] = field(default_factory=dict)
    procedure: Procedure | None = None

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
        """The file that `save` writes; the same content gives the same bytes.

        Raises:
            PatchError: values that are not float32 (indices: int64) or not finite; more text than
                a file's header takes.
        """
        tensors = {name: tensor.clone() for name, tensor in self._tensors().items()}
        _check_tensors("this patch", tensors)
        header = _canonical({**self._header(), "id": self.id})
        content = save(tensors, metadata={HEADER: header})
        if (length := int.from_bytes(content[:8], "little")) > LARGEST_HEADER:
            raise PatchError(
                f"this patch holds more text than a file takes ({length} bytes, {LARGEST_HEADER} "
                "are allowed): make several of fewer facts"
            )
        return content

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
                    "form": next(n for n, form in FORMS.items() if isinstance(delta.change, form)),
                    "base": delta.base,
                }
                for delta in self.deltas
            ],
            "rule": _part_of(self.rule),
            "procedure": _part_of(self.procedure),
            "wraps": [{"module": wrap.module, **(_part_of(wrap) or {})} for wrap in self.wraps],
            "traces": sorted(self.traces),
        }

    def _tensors(self) -> dict[str, Tensor]:
        parts = [(f"{n:04d}", delta.change.tensors()) for n, delta in enumerate(self.deltas)]
        parts += [(f"w{n:04d}", dict(wrap.tensors)) for n, wrap in enumerate(self.wraps)]
        parts += [("t", dict(self.traces))]
        parts += [("r", dict(self.rule.tensors))] if self.rule else []
        parts += [("p", dict(self.procedure.tensors))] if self.procedure else []
        return {
            f"{number}.{name}": tensor.detach().cpu().contiguous()
            for number, tensors in parts
            for name, tensor in tensors.items()
        }

    @classmethod
    def load(cls, path: str | Path) -> Patch:
        """Read a patch file.

        Raises:
            PatchError: no such file, not a patch, damaged, or of a newer format; in one line.
        """
        path = Path(path)
        if not os.path.isfile(path):
            raise PatchError(f"{path}: no such patch file")
        try:
            _check_size(path)
            with safe_open(path, framework="pt") as file:
                header = _parse_header(path, file.metadata())
                wanted = _expected_names(header)
                if set(file.keys()) != wanted:
                    raise PatchError(f"{path}: damaged (its tensors are not those of its header)")
                # Copies: a mapped tensor would change with the file, after its hash was checked.
                tensors = {name: file.get_tensor(name).clone() for name in sorted(wanted)}
        except (SafetensorError, OSError, ValueError, OverflowError, RuntimeError) as error:
            raise PatchError(f"{path}: not a readable patch file ({error})") from None
        return cls._from(path, header, tensors)

    @classmethod
    def _from(cls, path: Path, header: _Header, tensors: Mapping[str, Tensor]) -> Patch:
        _check_tensors(str(path), tensors)

        def under(number: str) -> dict[str, Tensor]:
            prefix = f"{number}."
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        deltas = tuple(
            WeightDelta(part.address, FORMS[part.form](**under(f"{number:04d}")), part.base)
            for number, part in enumerate(header.deltas)
        )
        wraps = tuple(
            Wrap(part.module, part.kind, part.data, under(f"w{number:04d}"))
            for number, part in enumerate(header.wraps)
        )
        ruled, asked = header.rule, header.procedure
        rule = PromptRule(ruled.kind, ruled.data, under("r")) if ruled else None
        procedure = Procedure(asked.kind, asked.data, under("p")) if asked else None
        patch = cls(header.provenance, deltas, rule, wraps, under("t"), procedure)
        if patch.id != header.id:
            raise PatchError(f"{path}: damaged (its content does not give the id it carries)")
        return patch


class _Part(Value):
    address: Address
    form: Literal["low-rank", "rows", "dense"]
    base: str


class _Ruled(Value):
    kind: str
    data: dict[str, Any]
    tensors: tuple[str, ...]


class _Wrapped(_Ruled):
    module: str


class _Header(Value):
    format: Literal[4]
    id: str
    provenance: Provenance
    deltas: tuple[_Part, ...]
    rule: _Ruled | None
    procedure: _Ruled | None
    wraps: tuple[_Wrapped, ...]
    traces: tuple[str, ...]


def _canonical(header: Mapping[str, Any]) -> str:
    try:
        return json.dumps(
            header, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False
        )
    except ValueError:
        raise PatchError("a patch holds a number that is not finite in its data") from None


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
    deltas = {
        f"{number:04d}.{name}"
        for number, part in enumerate(header.deltas)
        for name in _field_names(part.form)
    }
    wraps = {f"w{n:04d}.{name}" for n, part in enumerate(header.wraps) for name in part.tensors}
    ruled = {f"r.{name}" for name in (header.rule.tensors if header.rule else ())}
    asked = {f"p.{name}" for name in (header.procedure.tensors if header.procedure else ())}
    return deltas | wraps | ruled | asked | {f"t.{name}" for name in header.traces}


def _part_of(part: Wrap | PromptRule | Procedure | None) -> dict[str, Any] | None:
    """What the header says of a part that has a kind."""
    if part is None:
        return None
    return {"kind": part.kind, "data": dict(part.data), "tensors": sorted(part.tensors)}


def _check_tensors(what: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        indices = name.endswith(".index")
        if tensor.dtype != (torch.int64 if indices else torch.float32):
            raise PatchError(f"{what}: {name} has type {tensor.dtype}, which no patch holds")
        if not indices and not is_finite(tensor):
            raise PatchError(f"{what} holds values that are not finite; it cannot be applied")


def _field_names(form: str) -> list[str]:
    return [field.name for field in dataclasses.fields(FORMS[form])]


def _check_size(path: Path) -> None:
    """Refuse a header that no patch needs before anything parses it (a JSON bomb costs memory)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > LARGEST_HEADER:
        raise PatchError(
            f"{path}: not a readable patch file (its header would be {length} bytes, "
            f"{LARGEST_HEADER} are allowed)"
        )
