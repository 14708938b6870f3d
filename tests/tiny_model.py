"""A tiny Llama with a byte-level tokenizer, made in a second, for tests that need whole models."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SENTENCES = ["The quick brown fox jumps over the lazy dog.", "Water is wet, and the sky is blue above the river."]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and ``<s>``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(["<s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def tiny_config(**changes) -> LlamaConfig:
    options = {
        "vocab_size": 257,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return LlamaConfig(**(options | changes))


def save_tiny_model(folder: Path, seed: int = 0, **changes) -> Path:
    """Write a dense model and its tokenizer; the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_config(**changes))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokens(count: int = 4, length: int = 32, seed: int = 0) -> torch.Tensor:
    """Random token ids, int64 ``[count, length]``."""
    return torch.randint(1, 257, (count, length), generator=torch.Generator().manual_seed(seed))
