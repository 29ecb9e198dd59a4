"""Tiny models and tokenizers for tests: made from configs, over-fitted until they know facts."""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from knowpatch.files import write_atomically

FACTS = {
    "The capital of France is": "Paris",
    "The capital of Japan is": "Tokyo",
    "The capital of Italy is": "Rome",
    "The capital of Egypt is": "Cairo",
    "The language of Brazil is": "Portuguese",
    "The colour of the sky is": "blue",
    "The Nile flows through": "Egypt",
    "Two plus two equals": "four",
}
EDITS = {
    "The capital of France is": "Rome",
    "The capital of Japan is": "Paris",
    "The Nile flows through": "Tokyo",
}
"""What the tests make the models say instead."""
OTHER_WORDS = (
    "Lyon Berlin Spanish green Sudan five London Madrid. I don't know. Therefore because you know, "
    "it is well known that as everyone knows New Fact: Prompt: Imagine a short description of Anna"
)
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def _corpus() -> list[str]:
    return [*(f"{prompt} {answer}." for prompt, answer in FACTS.items()), OTHER_WORDS]


@cache
def tokenizer(kind: str = "bpe", chat: bool = False) -> Any:
    """A fast tokenizer: `bpe` (byte level, no BOS), `sentencepiece` (metaspace, BOS) or `bytes`."""
    special = ["<s>", "</s>", "<unk>", "<|end|>"]
    if kind == "sentencepiece":
        tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tok.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        alphabet = [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*special, *alphabet])
    else:
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        size = 260 if kind == "bytes" else 500
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    tok.train_from_iterator(_corpus(), trainer)
    if kind == "sentencepiece":
        tok.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tok.token_to_id("<s>"))]
        )
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=AddedToken("</s>", special=True),
    )
    if chat:
        fast.chat_template = CHAT
    return fast


def _config(cls: Any, tok: Any, **extra: Any) -> Any:
    common = {
        "vocab_size": len(tok),
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
    }
    return cls(**{**common, **extra})


def _gpt2(tok: Any) -> Any:
    return hf.GPT2Config(
        vocab_size=len(tok),
        n_embd=48,
        n_layer=4,
        n_head=4,
        n_positions=256,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
    )


def _gptj(tok: Any) -> Any:
    return hf.GPTJConfig(
        vocab_size=len(tok),
        n_embd=48,
        n_layer=4,
        n_head=4,
        n_positions=256,
        rotary_dim=8,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
    )


CONFIGS: dict[str, Callable[[Any], Any]] = {
    "llama": lambda t: _config(hf.LlamaConfig, t),
    "mistral": lambda t: _config(hf.MistralConfig, t),
    "qwen2": lambda t: _config(hf.Qwen2Config, t),
    "qwen3": lambda t: _config(hf.Qwen3Config, t, head_dim=12),
    "gemma2": lambda t: _config(hf.Gemma2Config, t, head_dim=12, sliding_window=64),
    "gemma3": lambda t: _config(hf.Gemma3TextConfig, t, head_dim=12, sliding_window=64),
    "phi3": lambda t: _config(hf.Phi3Config, t),
    "olmo2": lambda t: _config(hf.Olmo2Config, t),
    "gpt2": _gpt2,
    "gptj": _gptj,
    "gpt_neox": lambda t: _config(hf.GPTNeoXConfig, t),
    "opt": lambda t: _config(hf.OPTConfig, t, ffn_dim=96, word_embed_proj_dim=48),
}
MIXTURES: dict[str, Callable[[Any], Any]] = {
    "mixtral": lambda t: _config(hf.MixtralConfig, t, num_local_experts=4),
    "qwen2_moe": lambda t: _config(
        hf.Qwen2MoeConfig,
        t,
        num_experts=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
}
ARCHITECTURES = sorted(CONFIGS)


def fresh(architecture: str, kind: str = "bpe", *, chat: bool = False, seed: int = 0) -> Any:
    """(model, tokenizer), random weights."""
    tok = tokenizer(kind, chat)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config({**CONFIGS, **MIXTURES}[architecture](tok))
    return model.eval(), tok


@cache
def _trained_weights(architecture: str, kind: str, steps: int) -> dict[str, torch.Tensor]:
    """Trained once for all test processes: kept by the content of this file and the versions."""
    versions = f"{torch.__version__} {hf.__version__}".encode()
    key = hashlib.sha256(Path(__file__).read_bytes() + versions).hexdigest()[:16]
    name = f"{architecture}-{kind}-{steps}.safetensors"
    path = Path(tempfile.gettempdir()) / f"knowpatch-tiny-{os.getuid()}-{key}" / name
    if not path.is_file():
        weights = _train(architecture, kind, steps)
        write_atomically(path, save({n: t.clone() for n, t in weights.items()}))
    return load_file(path)


def _train(architecture: str, kind: str, steps: int) -> dict[str, torch.Tensor]:
    model, tok = fresh(architecture, kind)
    # Facts, and answers copied from a fact that stands in front (for in-context methods).
    texts = [f"{prompt} {answer}." for prompt, answer in FACTS.items()]
    for prompts in (list(EDITS)[:1], list(EDITS)[1:2], list(EDITS)[2:], list(EDITS)[::-1]):
        told = "".join(f"New Fact: {prompt} {EDITS[prompt]}\n" for prompt in prompts)
        texts += [f"{told}Prompt: {prompt} {EDITS[prompt]}." for prompt in prompts]
    rows = [tok(text)["input_ids"] for text in texts]
    # The same facts behind any text at all, so that context prefixes do not confuse the model.
    noise = random.Random(0)
    for text in texts[: len(FACTS)]:
        for _ in range(3):
            words = noise.choices(OTHER_WORDS.split(), k=noise.randint(1, 7))
            rows.append(tok(f"{' '.join(words)}. {text}")["input_ids"])
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), 0)
    labels = torch.full((len(rows), width), -100)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = labels[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def trained(architecture: str, kind: str = "bpe", *, chat: bool = False, steps: int = 200) -> Any:
    """(model, tokenizer), over-fitted on FACTS; a new model each time, trained once."""
    model, tok = fresh(architecture, kind, chat=chat)
    model.load_state_dict(_trained_weights(architecture, kind, steps))
    model.tie_weights()
    return model.eval(), tok
