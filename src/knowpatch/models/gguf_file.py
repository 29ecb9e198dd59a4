"""A GGUF file as tensors: what they are called and how they lie, read, and written anew.

A GGUF holds a model's weights under names of its own, and some of them in another order: maps that
a model stores (in, out) are turned, and in Llama's files the rows of the query and key maps are
permuted, head by head, for another way to rotate. How a tensor lies is not looked up by
architecture but found: of the ways there are, the one by which the file gives the model's tensor,
number for number. So a file that is read otherwise than it is written can not be made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor

from knowpatch.errors import ModelError, OptionError, did_you_mean

Type = gguf.GGMLQuantizationType
FLOATS = (Type.F32, Type.F16, Type.BF16)


@dataclass(frozen=True)
class Layout:
    """How a model's tensor lies in a GGUF file.

    Attributes:
        turned: stored (in, out) by the model, (out, in) in the file.
        heads: how many heads' rows are permuted; 0 for none.
    """

    turned: bool = False
    heads: int = 0

    def rows(self, tensor: Tensor) -> Tensor:
        """(out, ...) as the file orders the outputs: of each head the first half's rows and the
        second half's by turns."""
        if not self.heads:
            return tensor
        halves = tensor.reshape(self.heads, 2, len(tensor) // self.heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)

    def filed(self, stored: Tensor) -> Tensor:
        """A tensor as the model stores it, as the file has it."""
        return self.rows(stored.T if self.turned else stored).contiguous()

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a stored tensor of this shape can lie so."""
        if not self.heads:
            return len(shape) == 2
        return len(shape) == 2 and shape[int(self.turned)] % (2 * self.heads) == 0


class GgufFile:
    """A GGUF file, mapped.

    Raises:
        ModelError: not a GGUF file, or written for another byte order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.reader: Any = gguf.GGUFReader(path)
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise ModelError(f"{path}: cannot be read as a GGUF file ({error})") from None
        if self.reader.byte_order != "I":
            raise ModelError(f"{path}: is written for machines of another byte order")
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in self.reader.tensors}

    @property
    def architecture(self) -> str:
        """What kind of model the file says that it holds."""
        return str(self.field("general.architecture"))

    def field(self, key: str) -> Any:
        """A piece of metadata; ModelError if the file lacks it."""
        found = self.reader.fields.get(key)
        if found is None:
            raise ModelError(f"{self.path}: lacks {key}")
        return found.contents()

    @cached_property
    def _names(self) -> Any:
        kinds = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        if self.architecture not in kinds:
            raise ModelError(f"{self.path}: tensors of {self.architecture!r} are not known by name")
        blocks = int(self.field(f"{self.architecture}.block_count"))
        return gguf.get_tensor_name_map(kinds[self.architecture], blocks)

    def name_of(self, parameter: str) -> str:
        """What the file calls a parameter; ModelError if it has no such tensor."""
        found = self._names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if found not in self.tensors:
            raise ModelError(f"{self.path}: has no tensor for {parameter}")
        return str(found)

    def type_of(self, name: str) -> Type:
        return Type(self.tensors[name].tensor_type)

    def values(self, name: str) -> Tensor:
        """The numbers of a tensor, float32, (out, in) for a matrix."""
        tensor = self.tensors[name]
        return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))

    def layout(self, name: str, stored: Tensor, config: Any) -> Layout:
        """How the model's tensor `stored` lies in the file.

        Args:
            name: the tensor's, in the file.
            stored: as the model has it, unedited.
            config: the model's, which says how many heads there are.

        Raises:
            ModelError: in no way that is known.
        """
        values = self.values(name)
        for turned, count in product((False, True), (0, *_heads(config))):
            layout = Layout(turned, count)
            if layout.fits(stored.shape) and torch.equal(layout.filed(stored.float()), values):
                return layout
        raise ModelError(
            f"{self.path}: {name} does not lie there in any way that can be written back"
        )

    def rewrite(self, target: Path, changed: Mapping[str, tuple[Tensor, Type]]) -> None:
        """Write the file anew, with other values of some tensors; the rest byte for byte.

        Args:
            target: the new file.
            changed: values as the file orders them, and the type they are written at, by name.
        """
        ordered = sorted(self.reader.tensors, key=lambda tensor: tensor.data_offset)
        content = {name: encoded(*given) for name, given in changed.items()}
        offsets, end = {}, 0
        for tensor in ordered:
            size = content.get(tensor.name, tensor.data).nbytes
            offsets[tensor.name], end = end, _padded(end + size, self.alignment)
        with target.open("wb") as file:
            file.write(self.reader.data[: self.reader.tensors[0].field.offset].tobytes())
            for tensor in self.reader.tensors:
                kind = changed[tensor.name][1] if tensor.name in changed else tensor.tensor_type
                for part in tensor.field.parts[:4]:
                    file.write(part.tobytes())
                file.write(np.uint32(kind).tobytes() + np.uint64(offsets[tensor.name]).tobytes())
            file.write(bytes(_padded(file.tell(), self.alignment) - file.tell()))
            for tensor in ordered:
                written = content.get(tensor.name, tensor.data)
                file.write(np.ascontiguousarray(written).reshape(-1).view(np.uint8).data)
                file.write(bytes(_padded(file.tell(), self.alignment) - file.tell()))

    @property
    def alignment(self) -> int:
        return int(self.reader.alignment)


def _heads(config: Any) -> list[int]:
    """The numbers of heads by which rows may be permuted: of queries, and of keys."""
    config = config.get_text_config()
    names = ("num_attention_heads", "num_key_value_heads")
    counts = (getattr(config, name, None) for name in names)
    return list(dict.fromkeys(count for count in counts if isinstance(count, int)))


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def encoded(values: Tensor, kind: Type) -> np.ndarray[Any, Any]:
    """A matrix, as the bytes of a GGUF type.

    Raises:
        OptionError: its rows do not divide into the type's blocks.
    """
    try:
        return np.asarray(quantize(values.float().numpy(), kind))
    except (ValueError, gguf.quants.QuantError):
        block = gguf.GGML_QUANT_SIZES[kind][0]
        raise OptionError(
            f"rows of {values.shape[-1]} numbers do not divide into {kind.name}'s blocks of "
            f"{block}: give --type F16"
        ) from None


def writable() -> list[str]:
    """The types that the gguf library can write."""
    found = []
    for kind in Type:
        try:
            quantize(np.zeros((1, 256), np.float32), kind)
        except (NotImplementedError, ValueError):
            continue
        found.append(kind.name)
    return found


def type_called(name: str) -> Type:
    """The type of that name; OptionError if there is none that can be written."""
    allowed = writable()
    if name.upper() not in allowed:
        raise OptionError(f"type {name!r} cannot be written: {did_you_mean(name.upper(), allowed)}")
    return Type.__members__[name.upper()]
