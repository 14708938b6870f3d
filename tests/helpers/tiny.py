"""Whole runs on a tiny model, for the tests of offload, resume and several processes and for their subprocesses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from arb_hf import ArbConfig
from helpers.models import llama, token_samples

LAYERS = 3


def save_model(
    path: str | os.PathLike, dtype: torch.dtype = torch.bfloat16, layers: int = LAYERS, **options: Any
) -> None:
    """A tiny LLaMA in several shards."""
    llama(layers, hidden_size=64, **options).to(dtype).save_pretrained(path, max_shard_size="60KB")


def config(**options: Any) -> ArbConfig:
    defaults = {"dataset": token_samples(6, 24), "block_size": 32, "max_salient_columns": 6, "refinement": "paper"}
    if options.get("refinement") != "full":  # which has no iterations
        defaults["iterations"] = 2
    return ArbConfig(**(defaults | options))


def binarize(path: str | os.PathLike, loading: dict[str, Any] | None = None, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config(**options), **(loading or {}))


def saved(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """What ``model`` is saved as, read back; the same for a model in memory and one that is offloaded."""
    model.save_pretrained(folder)
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """The same names, types and bits."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name
