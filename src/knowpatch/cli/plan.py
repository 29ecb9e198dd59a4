"""`knowpatch edit --dry-run`: memory, time, and what would be downloaded or prepared.

Nothing is loaded, written or downloaded. The time is an estimate: the method's count of tokens
times the work per token, over the speed of a short matrix product measured here and now.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from knowpatch.cli import screen
from knowpatch.errors import ModelError
from knowpatch.method import EditMethod, Shape
from knowpatch.models import fingerprint, load
from knowpatch.models.gguf import converted_folder
from knowpatch.probes import controls
from knowpatch.request import EditRequest

LIBRARIES_BYTES = 700 * 10**6
"""What Python, torch and transformers take before any model."""
ASK_TOKENS = 30
"""Tokens per probe, question and answer, before and after."""


@dataclass(frozen=True)
class _Model:
    """What can be known without loading: the folder, once there is one, and sizes in bytes."""

    folder: Path | None
    wide_bytes: int
    first: str | None


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
    origin = load.resolve(name)
    model = _look(origin)
    width = load.dtype_for(dtype, load.device_for(device), model.wide_bytes).itemsize
    plan: dict[str, Any] = {
        "method": method.name,
        "model": load.source_name(origin),
        "download": model.first if origin.kind == "hub" else None,
        "prepare": [model.first] if model.first and origin.kind != "hub" else [],
        "memory_bytes": LIBRARIES_BYTES + model.wide_bytes * width // 4,
        "seconds": None,
    }
    if model.folder is None:
        return plan
    shape = _shape(model.folder)
    missing = [item for item in method.preparations(shape) if not item.path.exists()]
    lengths = [(len(r.prompt) + len(r.target)) // 4 + 2 for r in requests]
    cost = method.cost(shape, lengths)
    plan["prepare"] += [item.what for item in missing]
    plan["memory_bytes"] += cost.extra_bytes
    parameters = model.wide_bytes / 4
    asked = 2 * (len(controls()) + 20 * len(requests)) * ASK_TOKENS
    prepared = sum(item.tokens for item in missing)
    tokens = cost.forward_tokens + 2 * cost.backward_tokens + prepared + asked
    plan["seconds"] = round(2 * parameters * tokens / _speed(), 1)
    return plan


def _look(origin: load.Origin) -> _Model:
    """The checkpoint behind a name, without loading, converting or downloading it."""
    if origin.kind == "hub":
        return _look_at_hub(origin.name)
    if origin.kind == "folder":
        load.check_folder(origin.path)
        return _Model(origin.path, load.float32_bytes(origin.path), None)
    if not origin.path.is_file():
        raise ModelError(f"{origin.path}: no such GGUF file")
    folder = converted_folder(origin.path)
    if folder.is_dir():
        return _Model(folder, load.float32_bytes(folder), None)
    size = origin.path.stat().st_size
    # Quantised weights take five to nine bits each; in float32 that is about six times the file.
    first = f"convert {origin.path.name} once ({screen.human_bytes(size)}) into {folder}"
    return _Model(None, 6 * size, first)


def _look_at_hub(name: str) -> _Model:
    from huggingface_hub import HfApi, snapshot_download

    with contextlib.suppress(Exception):
        folder = Path(snapshot_download(name, allow_patterns=load.HUB_FILES, local_files_only=True))
        if fingerprint.shards(folder):
            return _Model(folder, load.float32_bytes(folder), None)
    with load.plain_hub_errors(name):
        files = HfApi().model_info(name, files_metadata=True).siblings or []
    size = sum(f.size or 0 for f in files if f.rfilename.endswith((".safetensors", ".json")))
    return _Model(None, 2 * size, f"{name} from the hub, {screen.human_bytes(size)}")


def _shape(folder: Path) -> Shape:
    config = load.config_of(folder)
    config = config.get("text_config", config)

    def first(*names: str, default: int = 0) -> int:
        return next((int(config[n]) for n in names if config.get(n)), default)

    hidden = first("hidden_size", "n_embd", default=1024)
    return Shape(
        layers=first("num_hidden_layers", "n_layer", default=24),
        hidden=hidden,
        inner=first("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden),
        fingerprint=fingerprint.known(folder),
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
