"""One way to a model: a hub id, a folder, a GGUF file, or the bundled default.

Device and dtype are decided here and nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from knowpatch.errors import ModelError, OptionError, did_you_mean
from knowpatch.models import fingerprint, quant
from knowpatch.models.gguf import convert, quiet_transformers
from knowpatch.models.origin import Origin, resolve, source_name
from knowpatch.models.view import ModelView
from knowpatch.progress import Progress, silent

HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICES = ("cpu", "cuda", "mps")


def load(
    name: str | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = silent,
) -> ModelView:
    """Load a causal language model for reading by role.

    Args:
        name: a hub id, a folder with safetensors weights, a GGUF file, or None for the bundled
            SmolLM2-135M-Instruct.
        device: auto (cuda, else mps, else cpu), cpu, cuda or mps.
        dtype: auto, float32, bfloat16, stored (as in the checkpoint), or 8bit. auto is bfloat16 on
            cuda and float32 elsewhere, unless that would take more than half of the machine's
            memory. 8bit weights (by torchao) cannot be rewritten; patches act beside them.
        progress: told how far a conversion or download is.

    Raises:
        ModelError: nothing there, nothing loadable, or not a decoder; OptionError: device, dtype.
    """
    place = device_for(device)
    origin = resolve(name)
    folder = _folder(origin, progress)
    check_folder(folder)
    if dtype == "stored":
        kind = _stored_dtype(folder)
    elif dtype == quant.EIGHT:
        kind = fast_dtype(place) or torch.float32
    else:
        kind = dtype_for(dtype, place, float32_bytes(folder))
    model, tokenizer = _read(folder, kind, quantised=dtype == quant.EIGHT)
    model.requires_grad_(requires_grad=False)
    model.to(place).eval()
    if fingerprint.shards(folder):
        identity = fingerprint.of_folder(folder)
    else:
        identity = fingerprint.of_model(model, tokenizer)
    identity = replace(identity, origin=origin.name)
    form = quant.EIGHT if dtype == quant.EIGHT else ""
    view = ModelView(model, tokenizer, identity, source=source_name(origin), form=form)
    check_finite(view)
    return view


def check_finite(view: ModelView) -> None:
    """ModelError unless the model computes numbers: one pass over one token."""
    token = max(view.tokenizer.bos_token_id or 0, 0)
    if not bool(torch.isfinite(view.run([[token]], logits_at=[(0, 0)]).logits_MV).all()):
        raise ModelError(
            f"the logits of {view.source} are not finite: its weights are damaged, or "
            "the dtype is too narrow for it (try --dtype float32)"
        )


def wrap(model: Any, tokenizer: Any) -> ModelView:
    """A view of a transformers model that is already in memory."""
    return ModelView(model, tokenizer, fingerprint.of_model(model, tokenizer))


def _folder(origin: Origin, progress: Progress) -> Path:
    if origin.kind in ("bundled", "gguf"):
        return convert(origin.path, progress)
    return origin.path if origin.kind == "folder" else _download(origin.name)


def _download(name: str) -> Path:
    """The files of a hub model, from the hub's own cache or the network."""
    from huggingface_hub import snapshot_download

    with plain_hub_errors(name):
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))


@contextlib.contextmanager
def plain_hub_errors(name: str) -> Iterator[None]:
    """Whatever the hub client raises becomes one line."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except HFValidationError:
        raise ModelError(f"{name!r} is no folder, no GGUF file and no hub id") from None
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # offline, unknown, gated, interrupted: the client has many
        raise ModelError(
            f"{name}: no such folder, and not to be had from the hub "
            f"({type(error).__name__}: unknown, gated or offline)"
        ) from None


def check_folder(folder: Path) -> None:
    """ModelError unless `folder` holds a config and weights."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; not a model folder")
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    if not weights:
        raise ModelError(f"{folder}: a model folder without weights (no *.safetensors in it)")


def device_for(name: str) -> torch.device:
    """The device that `name` means here; OptionError if there is none."""
    has = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        return torch.device(next(n for n in ("cuda", "mps", "cpu") if has[n]))
    if name not in has:
        raise OptionError(f"unknown device {name!r}: {did_you_mean(name, ['auto', *DEVICES])}")
    if not has[name]:
        raise OptionError(f"device {name!r} is not available here; use auto or cpu")
    return torch.device(name)


def dtype_for(name: str, device: torch.device, float32_size: int) -> torch.dtype:
    """The dtype that `name` means for a model of `float32_size` bytes in float32."""
    if name in DTYPES:
        return DTYPES[name]
    if name == quant.EIGHT:
        return torch.int8
    if name != "auto":
        allowed = ["auto", *DTYPES, quant.EIGHT]
        raise OptionError(f"unknown dtype {name!r}: {did_you_mean(name, allowed)}")
    narrow = device.type == "cuda" or float32_size > _memory() / 2
    return torch.bfloat16 if narrow else torch.float32


def fast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the processor multiplies in it, else None: no dtype beats the model's own."""
    if device.type == "cpu":
        has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        has = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has else None


def _stored_dtype(folder: Path) -> torch.dtype:
    config = config_of(folder)
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), torch.float32)
    return found if isinstance(found, torch.dtype) else torch.float32


def float32_bytes(folder: Path) -> int:
    """Bytes that a checkpoint's parameters take in float32."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for shard in fingerprint.shards(folder):
        try:
            with safe_open(shard, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    total += 4 * math.prod(file.get_slice(key).get_shape())
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{shard}: damaged, or not downloaded to its end ({error}); get it again"
            ) from None
    return total


def _memory() -> int:
    """Bytes of memory in the machine; a guess where the system does not say."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 16 * 2**30


def _read(folder: Path, dtype: torch.dtype, *, quantised: bool) -> tuple[Any, Any]:
    try:
        with quiet_transformers():
            from transformers import AutoModelForCausalLM, AutoTokenizer

            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                quantization_config=quant.config() if quantised else None,
                output_loading_info=True,
            )
            model, told = loaded
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except (MemoryError, KeyboardInterrupt, OptionError):
        raise
    except Exception as error:  # whatever is wrong with a foreign folder, it is one line
        raise ModelError(f"{folder}: cannot be loaded ({str(error).splitlines()[0]})") from None
    if lacking := sorted(told["missing_keys"]):
        raise ModelError(
            f"{folder}: its weights lack {lacking[0]} ({len(lacking)} missing in all); get it again"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def config_of(folder: Path) -> dict[str, Any]:
    """The config of a checkpoint folder, as plain data."""
    try:
        loaded = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder}: its config.json is not JSON ({error})") from None
    if not isinstance(loaded, dict):
        raise ModelError(f"{folder}: its config.json is not a JSON object")
    return loaded
