"""Tiny models, their tokenizer, tokens and text."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 128


def llama(layers: int = 2, **options) -> LlamaForCausalLM:
    """A tiny random LLaMA with grouped-query attention and awkward sizes."""
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 96,
        "intermediate_size": 168,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**(defaults | options))).eval()


def token_samples(count: int = 8, length: int = 48, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for _ in range(count)]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, ``w0`` to ``w126``, that needs no download."""
    vocabulary = {"<unk>": 0} | {f"w{i}": i + 1 for i in range(VOCABULARY - 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")


def words(count: int) -> str:
    return " ".join(f"w{(i * i) % 127}" for i in range(count))
