"""GGUF files of tiny models, written with gguf-py as llama.cpp's converter lays them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny
import torch
from gguf.quants import quantize

F32 = gguf.GGMLQuantizationType.F32
POSITIONS = 1024
"""Of a GPT-2, which transformers takes for granted when it reads a GGUF file."""


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (head, half, i) in the order (head, i, half), as Llama's query and key maps are kept."""
    size = weight.shape[0] // heads // 2
    order = [
        head * 2 * size + half * size + i
        for head in range(heads)
        for i in range(size)
        for half in (0, 1)
    ]
    return weight[order]


def _llama(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)


def _gpt2(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _tokens(writer: gguf.GGUFWriter, tok: Any) -> None:
    spec = json.loads(tok.backend_tokenizer.to_str())
    vocabulary = sorted(tok.get_vocab(), key=tok.get_vocab().get)
    special = {entry["content"] for entry in spec["added_tokens"] if entry["special"]}
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([control if token in special else normal for token in vocabulary])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tok.bos_token_id)
    writer.add_eos_token_id(tok.eos_token_id)
    writer.add_unk_token_id(tok.unk_token_id)


def _laid_out(architecture: str, name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    if architecture == "gpt2" and tensor.ndim == 2 and ".h." in name:
        return tensor.T
    if "wpe" in name:
        return torch.nn.functional.pad(tensor, (0, 0, 0, POSITIONS - len(tensor)))
    if "q_proj" in name:
        return permuted(tensor, config.num_attention_heads)
    if "k_proj" in name:
        return permuted(tensor, config.num_key_value_heads)
    return tensor


def write(
    path: Path,
    architecture: str = "llama",
    kind: gguf.GGMLQuantizationType = F32,
    **extra: Any,
) -> Path:
    """The over-fitted tiny model as a GGUF file.

    Args:
        path: the new file.
        architecture: llama or gpt2.
        kind: type of the matrices whose rows divide into its blocks; the others stay float32.
        extra: more metadata, text by key.
    """
    model, tok = tiny.trained(architecture)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], 4)
    writer = gguf.GGUFWriter(path, architecture)
    {"llama": _llama, "gpt2": _gpt2}[architecture](writer, model.config)
    for key, value in extra.items():
        writer.add_string(key.replace("_", "."), value)
    _tokens(writer, tok)
    for name, tensor in model.named_parameters():
        filed = names.get_name(name, try_suffixes=(".weight", ".bias"))
        laid = _laid_out(architecture, name, tensor.detach(), model.config).contiguous().numpy()
        block = gguf.GGML_QUANT_SIZES[kind][0]
        at = kind if laid.ndim == 2 and laid.shape[1] % block == 0 else F32
        writer.add_tensor(filed, quantize(laid.astype(np.float32), at), raw_dtype=at)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
