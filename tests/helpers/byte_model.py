"""A tiny Llama with a byte-level BPE tokenizer, the kind that GGUF and real text need."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import arb_hf
from helpers.models import llama

VOCABULARY = 257


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, but for one that is in no text; ``<s>``; and one merge, without which llama.cpp reads none."""
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"\xff"})  # which stands for 0xFF: UTF-8 never has it
    vocabulary = {symbol: index for index, symbol in enumerate(["<s>", *alphabet, "qu"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("q", "u")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def save_byte_model(folder: Path, **options) -> Path:
    """Write a dense model and its tokenizer."""
    defaults = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    llama(**(defaults | {"hidden_size": 64, "intermediate_size": 128} | options)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokens(count: int = 4, length: int = 32, seed: int = 0) -> torch.Tensor:
    """Random token ids, int64 ``[count, length]``."""
    return torch.randint(1, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def save_packed(folder: Path, **options) -> Path:
    """Write the model made binary, beside the dense one; ``options`` are ArbConfig's."""
    dense = save_byte_model(folder / "dense")
    defaults = {"dataset": byte_tokens(), "num_samples": 4, "block_size": 32, "refinement": "paper", "iterations": 2}
    config = arb_hf.ArbConfig(**(defaults | options))
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    arb_hf.save_pretrained(model, None, folder / "packed")
    return folder / "packed"


def train(model, parameters, steps=8, rate=1e-2) -> list[float]:
    """Losses of a few steps on one batch."""
    ids = byte_tokens(2, 24, seed=1)
    optimizer = torch.optim.Adam(parameters, lr=rate)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(byte_tokens(1, 16, seed=2)).logits
