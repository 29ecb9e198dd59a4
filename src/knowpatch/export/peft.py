"""PEFT: a LoRA adapter folder that `peft` loads onto the base model.

A low-rank change is a LoRA already: alpha is the rank, so that nothing is scaled, and all maps have
one rank (by zeros), which servers ask for. Several patches are one adapter: their factors stacked,
then brought to as few as their sum needs.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from knowpatch.errors import OptionError
from knowpatch.export.factors import Factors, factored
from knowpatch.export.target import Base, Cargo, Target, plain_view
from knowpatch.models.gguf import quiet_transformers
from knowpatch.models.view import ModelView

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Peft(Target):
    """A LoRA adapter.

    Attributes:
        rank: the largest allowed; None for what the change takes.
    """

    name = "peft"
    about = "a LoRA adapter folder, for peft and servers that load such adapters"
    reader = "peft"
    folder = True

    rank: int | None = None

    def write(self, cargo: Cargo, place: Path) -> list[str]:
        with _peft() as peft:
            factors, notes = factored(cargo, self.rank)
            config = peft.LoraConfig(
                task_type="CAUSAL_LM",
                base_model_name_or_path=_called(cargo.base),
                inference_mode=True,
                r=factors[0].rank,
                lora_alpha=factors[0].rank,
                target_modules=[one.role.module for one in factors],
                fan_in_fan_out=any(one.role.stored_in_out for one in factors),
            )
        plain = {name: _plain(value) for name, value in config.to_dict().items()}
        (place / CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True), encoding="utf-8")
        tensors = {name: tensor for one in factors for name, tensor in _named(one).items()}
        save_file(tensors, place / WEIGHTS, metadata={"format": "pt"})
        return notes

    def read(self, base: Base, path: Path) -> ModelView:
        view = base.load()
        with _peft() as peft:
            model = peft.PeftModel.from_pretrained(view.model, str(path))
        return plain_view(model.get_base_model(), view.tokenizer, base.device)


def _named(factors: Factors) -> dict[str, Any]:
    path = f"base_model.model.{factors.role.module}"
    return {
        f"{path}.lora_A.weight": factors.right_KI.contiguous(),
        f"{path}.lora_B.weight": factors.left_OK.contiguous(),
    }


def _called(base: Base) -> str:
    """Where peft finds the base model: its hub id, or the folder with its weights."""
    folder = base.identity.folder
    if folder is None:
        return base.source
    local = Path(base.identity.origin).exists() or not base.identity.origin
    return str(folder.resolve()) if local else base.identity.origin


def _plain(value: Any) -> Any:
    """A config's value as JSON holds it, the same each time."""
    return sorted(value) if isinstance(value, set) else value


@contextmanager
def _peft() -> Iterator[Any]:
    """The library, quietly.

    Raises:
        OptionError: it is not installed.
    """
    with warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")
        try:
            import peft
        except ImportError:
            raise OptionError(
                "adapters are written and read back by peft: pip install 'knowpatch[peft]'"
            ) from None
        yield peft
