"""A GGUF file as an ordinary checkpoint folder, converted once and kept in the cache folder.

transformers reads GGUF slowly and cannot save what it has read that way, so the dequantised tensors
go into a plain model of the same config. The values are kept in float32: a product of a float16
scale and a small integer is exact there and in no shorter type.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from knowpatch.errors import InputError, ModelError
from knowpatch.files import cache_folder, file_digest, replacing
from knowpatch.progress import Progress, silent


def converted_folder(file: Path) -> Path:
    """Where the checkpoint made from `file` is kept: by name and content."""
    return cache_folder() / "models" / f"{file.stem}-{file_digest(file)[:16]}"


def convert(file: Path, progress: Progress = silent) -> Path:
    """The checkpoint folder of a GGUF file; converts it unless that was done before.

    Raises:
        ModelError: not a GGUF file, damaged, or of an architecture transformers cannot read.
    """
    if not file.is_file():
        raise ModelError(f"{file}: no such GGUF file")
    folder = converted_folder(file)
    if folder.is_dir():
        return folder
    stage = f"converting {file.name}, once"
    progress(stage, 0, 3)
    tokenizer, loaded = read(file, progress, stage)
    model = _plain(loaded)
    progress(stage, 2, 3)
    try:
        with replacing(folder, folder=True) as temporary, quiet_transformers():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except InputError:
        # Another process may have been faster; its folder is as good.
        if not folder.is_dir():
            raise
    progress(stage, 3, 3)
    return folder


def read(file: Path, progress: Progress = silent, stage: str = "reading") -> tuple[Any, Any]:
    """A GGUF file's tokenizer and model, float32, as transformers reads them; errors as `convert`.

    Args:
        file: the file.
        progress: told after the tokenizer, which is the first of three steps.
        stage: what it is told.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": file.name}
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **where)
            progress(stage, 1, 3)
            model = AutoModelForCausalLM.from_pretrained(
                str(file.parent), dtype=torch.float32, **where
            )
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # a damaged file fails anywhere in a third-party reader
        raise ModelError(f"{file}: cannot be read as a GGUF model ({error})") from None
    return tokenizer, model


def _plain(loaded: Any) -> Any:
    """The same model as one that can be saved."""
    from transformers import AutoModelForCausalLM

    config = loaded.config
    del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict(), assign=True, strict=False)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    return plain


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers for the block; its settings come back."""
    from transformers.utils import logging as hf

    verbosity, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity_error()
    hf.disable_progress_bar()
    # transformers imports torchao where it is installed, which tells of kernels it has not found.
    chatty = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in chatty]
    for logger in chatty:
        logger.setLevel(logging.ERROR)
    try:
        # The GGUF reader draws a bar of its own, past those settings.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(chatty, levels, strict=True):
            logger.setLevel(level)
        hf.set_verbosity(verbosity)
        if bars:
            hf.enable_progress_bar()
