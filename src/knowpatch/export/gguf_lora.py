"""A LoRA adapter as a GGUF file, put onto an unchanged GGUF model by llama.cpp (`--lora FILE`).

The format is that of llama.cpp's own converter: general.type "adapter", adapter.type "lora", alpha
the rank, and for each tensor NAME of the model NAME.lora_a (K, I) and NAME.lora_b (O, K). The rows
of lora_b are ordered as the model's file orders its outputs.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import gguf
from torch import Tensor

from knowpatch.errors import ModelError
from knowpatch.export.factors import factored
from knowpatch.export.gguf import laid_out, read_gguf
from knowpatch.export.target import Base, Cargo, Target
from knowpatch.models.gguf_file import GgufFile, Type
from knowpatch.models.view import ModelView

KIND, DOWN, UP = "lora", ".lora_a", ".lora_b"


@dataclass(frozen=True)
class GgufLora(Target):
    """A GGUF adapter.

    Attributes:
        rank: the largest allowed; None for what the change takes.
    """

    name = "gguf-lora"
    about = "a LoRA adapter as a GGUF file, for llama.cpp beside the model's own GGUF"
    reader = "transformers, from the model's GGUF with the adapter added"

    rank: int | None = None

    def write(self, cargo: Cargo, place: Path) -> list[str]:
        file = GgufFile(cargo.base.gguf)
        factors, notes = factored(cargo, self.rank)
        layouts = {name: (filed, layout) for name, filed, _, layout in laid_out(cargo, file)}
        writer = gguf.GGUFWriter(place, file.architecture)
        writer.add_type("adapter")
        writer.add_string(gguf.Keys.Adapter.TYPE, KIND)
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(factors[0].rank))
        for one in factors:
            filed, layout = layouts[one.role.address.parameter]
            writer.add_tensor(f"{filed}{DOWN}", one.right_KI.numpy())
            writer.add_tensor(f"{filed}{UP}", layout.rows(one.left_OK).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return notes

    def read(self, base: Base, path: Path) -> ModelView:
        file, adapter = GgufFile(base.gguf), GgufFile(path)
        if file.architecture != adapter.architecture:
            raise ModelError(f"{path}: is an adapter for {adapter.architecture} models")
        changed = {
            name: (file.values(name) + change, Type.F32) for name, change in added(adapter).items()
        }
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            whole = Path(folder) / "whole.gguf"
            file.rewrite(whole, changed)
            return read_gguf(base, whole)


def added(adapter: GgufFile) -> dict[str, Tensor]:
    """What an adapter adds to each tensor, float32: alpha / K * lora_b @ lora_a."""
    alpha = float(adapter.field(gguf.Keys.Adapter.LORA_ALPHA))
    names = [name.removesuffix(DOWN) for name in adapter.tensors if name.endswith(DOWN)]
    found = {}
    for name in names:
        down_KI, up_OK = adapter.values(name + DOWN), adapter.values(name + UP)
        found[name] = alpha / len(down_KI) * (up_OK @ down_KI)
    return found
