"""Tiny models and calibration tokens that the tests of whole runs share; also imported by their subprocesses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from arb_hf import ArbConfig

VOCABULARY = 96


def save_model(path: str | os.PathLike, layers: int = 3, dtype: torch.dtype = torch.float32, tied: bool = False) -> None:
    """A random LLaMA of hidden size 64 in several shards."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(dtype).save_pretrained(path, max_shard_size="60KB")


def tokens(count: int = 6, length: int = 24, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, VOCABULARY, (count, length), generator=generator))


def config(**options: Any) -> ArbConfig:
    return ArbConfig(**{"dataset": tokens(), "iterations": 3, "block_size": 32, "max_salient_columns": 6} | options)


def binarize(path: str | os.PathLike, loading: dict[str, Any] | None = None, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config(**options), **(loading or {}))


def state(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """What ``model`` is saved as, read back: the same for models in memory and offloaded ones."""
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name
