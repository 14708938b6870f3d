"""Which model families arb_hf binarizes: a Markdown table of coverage, round trip and generation.

    python examples/benchmarks/families.py [--quick] [family ...]

Every family is built from its configuration class, tiny and with random weights, binarized, saved, loaded again and
compared: identical logits, and greedy generation with a cache gives the same tokens. Coverage is measured on the model
of the published size (the configuration class's defaults, without weights), where it means something: the share of the
decoder layers' matrix weights that are binarized.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.quantizers.base import HfQuantizer

import arb_hf
from arb_hf import ArbConfig
from arb_hf.calibrate.decoder import find_decoder_layers, survey

VOCABULARY = 96
# Small values of options, for whichever of them a configuration class has.
SMALL = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "num_attention_heads": 2,
    "n_head": 2,
    "n_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "sliding_window": 16,
    # mixtures
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # low-rank attention
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    # state spaces
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_dt_rank": 32,
}


@dataclass(frozen=True)
class Family:
    """A tiny member of a family: options beyond :data:`SMALL`, and why coverage may be below 95 %."""

    options: dict[str, Any]
    reason: str = ""
    text_only: bool = True


def tiny_config(family: str, options: dict[str, Any]) -> PreTrainedConfig:
    """The family's configuration with small sizes."""
    known = AutoConfig.for_model(family).to_dict()
    return AutoConfig.for_model(family, **({key: value for key, value in SMALL.items() if key in known} | options))
