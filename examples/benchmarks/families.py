"""Which model families arb_hf binarizes: a Markdown table of coverage, round trip, generation and adapters.

    python examples/benchmarks/families.py [--quick] [FAMILY ...]

For every family a tiny model with random weights is built from its configuration class, binarized, saved and loaded
again. The table says whether its logits are identical, and whether greedy generation with a cache gives the same tokens.
Adapters on all of its binary layers are trained two steps and merged into a dense model, by ``arb_hf.lora.merge_lora``
and by plain PEFT from the saved file on the dequantized model: the larger of the relative differences of the logits.
Coverage is the share of the decoder layers' matrix weights that are binarized; it is measured on a model of the published
size (the configuration class's defaults, without weights), because tiny models say little about it.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import logging as transformers_logging
from transformers.quantizers.base import HfQuantizer

import arb_hf
from arb_hf import ArbConfig
from arb_hf.calibrate.decoder import find_decoder_layers, survey
from arb_hf.coverage import Coverage
from arb_hf.kernels import ops

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

_TEXT = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
_TEXT |= {
    key: SMALL[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
}
_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION |= {"image_size": 16, "patch_size": 8}
_MAMBA2 = {"mamba_chunk_size": 16}

# Options beyond SMALL by model type, in the table's order. Vision-language models come last.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "opt": {"word_embed_proj_dim": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 16},
    "codegen": {"rotary_dim": 16, "n_head": 4, "n_ctx": 64},
    "gpt_neox": {},
    "gpt_bigcode": {},
    "bloom": {},
    "mpt": {},
    "falcon": {},
    "xglm": {},
    "biogpt": {},
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi": {},
    "phi3": {},
    "stablelm": {},
    "starcoder2": {},
    "cohere": {},
    "cohere2": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "granite": {},
    "smollm3": {},
    "glm4": {},
    "nemotron": {},
    "exaone4": {},
    "persimmon": {},
    "apertus": {},
    "diffllama": {},
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {},
    "phimoe": {},
    "granitemoe": {},
    "gpt_oss": {},
    "llama4_text": {"intermediate_size_mlp": 64},
    "deepseek_v2": {},
    "deepseek_v3": {"head_dim": 16},
    "deepseek_v32": {},
    "glm4_moe": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "hunyuan_v1_moe": {},
    "minimax": {},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]} | _MAMBA2,
    "falcon_h1": {"mamba_d_ssm": 128} | _MAMBA2,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 64} | _MAMBA2,
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 16,
    },
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "recurrent_gemma": {"lru_width": 64, "block_types": ["recurrent", "attention"], "attention_window_size": 16},
    "mamba": {},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1, "chunk_size": 16},
    "falcon_mamba": {},
    "llava": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
        "vision_feature_layer": -1,
        "image_token_id": 3,
    },
    "qwen2_vl": {
        "text_config": _TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}},
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        "image_token_id": 3,
        "video_token_id": 4,
        "vision_start_token_id": 5,
        "vision_end_token_id": 6,
    },
    "gemma3": {"text_config": _TEXT, "vision_config": _VISION, "mm_tokens_per_image": 4, "image_token_index": 3},
}
# What default sizes lack.
PUBLISHED: dict[str, dict[str, Any]] = {
    "nemotron": {"num_key_value_heads": 48},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "conv", "conv", "full_attention"] * 8},
}
VISION_LANGUAGE = ("llava", "qwen2_vl", "gemma3")


def auto_class(family: str) -> type:
    """The auto class that loads a family."""
    return AutoModelForImageTextToText if family in VISION_LANGUAGE else AutoModelForCausalLM


def tiny_config(family: str) -> PreTrainedConfig:
    """The family's configuration with small sizes."""
    if family in VISION_LANGUAGE:
        return AutoConfig.for_model(family, **FAMILIES[family])
    known = AutoConfig.for_model(family).to_dict()
    small = {key: value for key, value in SMALL.items() if key in known}
    return AutoConfig.for_model(family, **(small | FAMILIES[family]))


def tiny_model(family: str) -> PreTrainedModel:
    """A random model of the family, the same every time; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = auto_class(family).from_config(tiny_config(family)).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():  # some experts start as zeros
                parameter.normal_(std=0.05)
    return model


def tokens(count: int, length: int) -> Tensor:
    """Random tokens ``[count, length]`` that mean nothing special to any tiny model."""
    return torch.randint(8, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def binarize(family: str, dense: Path, packed: Path) -> PreTrainedModel:
    """Save a tiny model to ``dense``, binarize it from there, save it to ``packed``, return it."""
    tiny_model(family).save_pretrained(dense)
    config = ArbConfig(
        dataset=tokens(6, 24),
        refinement="paper",
        iterations=1,
        block_size=64,
        max_salient_columns=4,
        minimum_coverage=0.8,
        scale_dtype="float32",
    )
    model = auto_class(family).from_pretrained(dense, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(packed)
    return model


@torch.no_grad()
def outputs(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits, and tokens generated greedily with a cache."""
    ids = tokens(1, 9)
    generated = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    return model(input_ids=ids).logits, generated


@contextlib.contextmanager
def reference_kernel() -> Iterator[None]:
    """Run the exact kernel: the fast ones round more than adapters and dense weights differ."""
    before = os.environ.get(ops.VARIABLE)
    os.environ[ops.VARIABLE] = "reference"
    ops.kernel_for.cache_clear()
    try:
        yield
    finally:
        os.environ.pop(ops.VARIABLE) if before is None else os.environ.update({ops.VARIABLE: before})
        ops.kernel_for.cache_clear()


def merged_difference(family: str, packed: Path) -> float:
    """Train adapters two steps, merge them in both ways; the larger relative difference of the logits."""
    from peft import PeftModel

    ids = tokens(2, 9)
    with (
        tempfile.TemporaryDirectory() as adapter,
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
        reference_kernel(),
    ):
        warnings.simplefilter("ignore")  # PEFT's, of tied embeddings and gradient checkpointing
        torch.manual_seed(0)
        adapted = arb_hf.lora.add_lora(auto_class(family).from_pretrained(packed), r=4)
        optimizer = torch.optim.Adam((each for each in adapted.parameters() if each.requires_grad), lr=0.05)
        for _ in range(2):
            adapted(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        adapted.eval().save_pretrained(adapter)
        dense = arb_hf.dequantize(auto_class(family).from_pretrained(packed))
        with torch.no_grad():
            wanted = adapted(input_ids=ids).logits
            found = [
                PeftModel.from_pretrained(dense, adapter).merge_and_unload()(input_ids=ids).logits,
                arb_hf.lora.merge_lora(adapted)(input_ids=ids).logits,
            ]
    return max(float((each - wanted).norm() / wanted.norm()) for each in found)


def published_coverage(family: str) -> Coverage:
    """Coverage of a model of the configuration's default sizes, built without weights."""
    with torch.device("meta"):
        model = auto_class(family).from_config(AutoConfig.for_model(family, **PUBLISHED.get(family, {})))
    skip = HfQuantizer.get_modules_to_not_convert(model, None, add_default_skips=True)
    return survey(model, *find_decoder_layers(model), ArbConfig(), skip)


def reasons(coverage: Coverage) -> str:
    """What is kept of the decoder layers, by reason, with shares."""
    shares: dict[str, int] = {}
    for _, kept, _, weights in coverage.groups():
        if kept is not None:
            shares[kept] = shares.get(kept, 0) + weights
    return "; ".join(f"{weights / coverage.weights:.1%} {kept}" for kept, weights in shares.items())


def row(family: str, quick: bool) -> str:
    """A line of the table."""
    with tempfile.TemporaryDirectory() as dense, tempfile.TemporaryDirectory() as packed:
        model = binarize(family, Path(dense), Path(packed))
        again = auto_class(family).from_pretrained(packed)
        same = [torch.equal(*pair) for pair in zip(outputs(model), outputs(again), strict=True)]
        difference = merged_difference(family, Path(packed))
    coverage = model.arb_report.coverage if quick else published_coverage(family)
    why = reasons(coverage) if coverage.share < 0.95 else ""
    verdicts = " | ".join("identical" if each else "DIFFERS" for each in same)
    return f"| {family} | {coverage.share:.1%} | {verdicts} | {difference:.0e} | {why} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="model types to try (default: all)")
    parser.add_argument(
        "--quick", action="store_true", help="coverage of the tiny models instead of the published sizes"
    )
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("arb_hf").setLevel(logging.ERROR)  # few tokens reach tiny experts
    torch.set_num_threads(1)
    print(
        "| family | coverage | logits after loading | generate with cache | adapters merged "
        "| kept, where coverage is under 95 % |"
    )
    print("|---|---|---|---|---|---|")
    for family in arguments.families or FAMILIES:
        print(row(family, arguments.quick), flush=True)


if __name__ == "__main__":
    main()
