"""What is to be known before a model is loaded; `knowpatch edit --dry-run`.

Memory, time, and what would be downloaded or prepared. Nothing is loaded, written or downloaded.
The time is an estimate: the method's count of tokens times the work per token, over the speed of a
short matrix product measured here and now.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from knowpatch.cli import screen
from knowpatch.errors import ModelError
from knowpatch.method import EditMethod, Shape
from knowpatch.models import fingerprint, load
from knowpatch.models.gguf import converted_folder
from knowpatch.models.origin import Origin, Source, resolve, source_name
from knowpatch.probes import controls
from knowpatch.request import EditRequest

LIBRARIES_BYTES = 700 * 10**6
"""What Python, torch and transformers take before any model."""
ASK_TOKENS = 30
"""Tokens per probe, question and answer, before and after."""


@dataclass(frozen=True)
class Known:
    """What can be known of a model without loading it.

    Attributes:
        name: what it is called.
        kind: what it is loaded from.
        wide_bytes: of its parameters in float32.
        shape: None before it is downloaded or converted.
        first: what is to be done before; None if nothing is.
    """

    name: str
    kind: Source
    wide_bytes: int
    shape: Shape | None
    first: str | None

    @property
    def download(self) -> str | None:
        """What is to be downloaded before."""
        return self.first if self.kind == "hub" else None

    @property
    def conversion(self) -> list[str]:
        """What is to be made once of files that are here."""
        return [self.first] if self.first and self.kind != "hub" else []

    def seconds(self, tokens: int) -> float:
        """About how long so many tokens take, run forward, on this machine."""
        return round(2 * self.wide_bytes / 4 * tokens / _speed(), 1)


def show_plan(
    method: EditMethod,
    requests: Sequence[EditRequest],
    name: str | None,
    *,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Print what the edit would take."""
    plan = make_plan(method, requests, name, device=device, dtype=dtype)
    if as_json:
        screen.print_json(plan)
        return
    console = screen.out()
    console.print(
        f"[bold]{plan['method']}[/] on [bold]{plan['model']}[/], {len(requests)} request(s)"
    )
    console.print(f"  download   {plan['download'] or 'nothing'}")
    console.print(f"  prepare    {'; '.join(plan['prepare']) or 'nothing'}", soft_wrap=True)
    console.print(f"  memory     about {screen.human_bytes(plan['memory_bytes'])}")
    seconds = plan["seconds"]
    known = f"about {seconds:.0f} s, after loading" if seconds is not None else "not known yet"
    console.print(f"  time       {known}")
    console.print("nothing was loaded or written", style="dim")


def make_plan(
    method: EditMethod,
    requests: Sequence[EditRequest],
    name: str | None,
    *,
    device: str,
    dtype: str,
) -> dict[str, Any]:
    """The plan as plain data."""
    method.check_requests(requests)
    model = known(name)
    width = load.dtype_for(dtype, load.device_for(device), model.wide_bytes).itemsize
    plan: dict[str, Any] = {
        "method": method.name,
        "model": model.name,
        "download": model.download,
        "prepare": model.conversion,
        "memory_bytes": LIBRARIES_BYTES + model.wide_bytes * width // 4,
        "seconds": None,
    }
    if model.shape is None:
        return plan
    method.check_layers(model.shape.layers)
    missing = [item for item in method.preparations(model.shape) if not item.path.exists()]
    lengths = [(len(r.prompt) + len(r.target)) // 4 + 2 for r in requests]
    cost = method.cost(model.shape, lengths)
    plan["prepare"] += [item.what for item in missing]
    plan["memory_bytes"] += cost.extra_bytes
    asked = 2 * (len(controls()) + 20 * len(requests)) * ASK_TOKENS
    prepared = sum(item.tokens for item in missing)
    tokens = cost.forward_tokens + 2 * cost.backward_tokens + prepared + asked
    plan["seconds"] = model.seconds(tokens)
    return plan


def known(name: str | None) -> Known:
    """What is known of the model that `name` names, without loading, converting or downloading it.

    Raises:
        ModelError: there is none.
    """
    origin = resolve(name)
    folder, size, first = _look(origin)
    shape = None
    if folder is not None:
        shape = shape_of(load.config_of(folder), fingerprint.known(folder))
    return Known(source_name(origin), origin.kind, size, shape, first)


def _look(origin: Origin) -> tuple[Path | None, int, str | None]:
    """Its folder, if there is one yet; bytes in float32; and what is to be done before."""
    if origin.kind == "hub":
        return _look_at_hub(origin.name)
    if origin.kind == "folder":
        load.check_folder(origin.path)
        return origin.path, load.float32_bytes(origin.path), None
    if not origin.path.is_file():
        raise ModelError(f"{origin.path}: no such GGUF file")
    folder = converted_folder(origin.path)
    if folder.is_dir():
        return folder, load.float32_bytes(folder), None
    size = origin.path.stat().st_size
    # Quantised weights take five to nine bits each; in float32 that is about six times the file.
    first = f"convert {origin.path.name} once ({screen.human_bytes(size)}) into {folder}"
    return None, 6 * size, first


def _look_at_hub(name: str) -> tuple[Path | None, int, str | None]:
    from huggingface_hub import HfApi, snapshot_download

    with contextlib.suppress(Exception):
        folder = Path(snapshot_download(name, allow_patterns=load.HUB_FILES, local_files_only=True))
        if fingerprint.shards(folder):
            return folder, load.float32_bytes(folder), None
    with load.plain_hub_errors(name):
        files = HfApi().model_info(name, files_metadata=True).siblings or []
    size = sum(f.size or 0 for f in files if f.rfilename.endswith((".safetensors", ".json")))
    return None, 2 * size, f"{name} from the hub, {screen.human_bytes(size)}"


def shape_of(config: Mapping[str, Any], digest: str) -> Shape:
    """What a model's config says of its shape; `digest` is its fingerprint, "" if not known."""
    config = config.get("text_config", config)

    def first(*names: str, default: int = 0) -> int:
        return next((int(config[n]) for n in names if config.get(n)), default)

    hidden = first("hidden_size", "n_embd", default=1024)
    return Shape(
        layers=first("num_hidden_layers", "n_layer", default=24),
        hidden=hidden,
        inner=first("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden),
        fingerprint=digest,
    )


def _speed() -> float:
    """Floating-point operations a second of narrow matrix products, as one prompt gives."""
    import torch

    left, right = torch.randn(16, 1536), torch.randn(1536, 1536)
    with torch.no_grad():
        left @ right
        start, count = perf_counter(), 60
        for _ in range(count):
            left @ right
    return 2 * 16 * 1536 * 1536 * count / (perf_counter() - start)
