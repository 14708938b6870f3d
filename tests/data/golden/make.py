"""Writes the golden files: packed models of the present format, one for every method and option that shapes them.

    python tests/data/golden/make.py

Only what is missing is made: a file that was published once is never written again, whatever becomes of the code that
made it, for it stands for the checkpoints that people keep. A new option, a new value of one, or a new form of storing
gets new cases here (tests/format/test_golden.py fails until it has one). ``digests.json`` has the hash of every file,
and of every matrix as the release that wrote it unpacked it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from arb_hf import ArbConfig
from arb_hf.binarize.methods import METHODS
from arb_hf.format.form import SCALE_DTYPES
from arb_hf.nn import binary_modules, int8_tables

HERE = Path(__file__).parent
VOCABULARY = 24
GROUPINGS = {
    "two": {"group_bitmap": True, "column_group_bitmap": True},
    "ordinary": {"group_bitmap": True, "column_group_bitmap": False},
    "one": {"group_bitmap": False, "column_group_bitmap": False},
}
Case = tuple[str, dict[str, Any], dict[str, Any]]  # family, options of its config, options of ArbConfig


def cases() -> dict[str, Case]:
    """Every golden model by name."""
    found: dict[str, Case] = {}
    for method in METHODS:
        for grouping, bitmaps in GROUPINGS.items():
            for dtype in SCALE_DTYPES:
                found[f"{method}-{grouping}-{dtype}"] = (
                    "llama",
                    {},
                    {"method": method, "scale_dtype": dtype, **bitmaps},
                )
    for method in ("arb-rc", "arb-x"):
        found[f"{method}-full"] = ("llama", {}, {"method": method, "refinement": "full", "tune_steps": 0})
        found[f"{method}-full-one-int8"] = (
            "llama",
            {},
            {"method": method, "refinement": "full", "tune_steps": 2, "scale_dtype": "int8", **GROUPINGS["one"]},
        )
        found[f"{method}-no-salient"] = ("llama", {}, {"method": method, "max_salient_columns": 1})
        found[f"{method}-block-64"] = ("llama", {}, {"method": method, "block_size": 64})
        found[f"{method}-block-4096"] = ("llama", {}, {"method": method, "block_size": 4096})
    many = {"salient_metric": "magnitude", "max_salient_columns": 4096, "iterations": 3, "damping": 0.1}
    found["many-salient"] = ("llama", {}, many)
    found["many-salient-one-group"] = ("llama", {}, many | GROUPINGS["one"])
    found["biases"] = ("llama", {"attention_bias": True, "mlp_bias": True}, {})
    found["untied-head"] = ("llama", {"tie_word_embeddings": False}, {"modules_to_not_convert": ["k_proj"]})
    mixed = {"*.q_proj": {"method": "arb", "scale_dtype": "int8"}, "*.v_proj": None, "*.mlp": {"block_size": 96}}
    found["overrides"] = ("llama", {}, {"overrides": mixed, "minimum_coverage": 0.5})
    found["shards"] = ("llama", {"num_hidden_layers": 2}, {})
    found["wide"] = ("llama", {"intermediate_size": 301}, {"max_salient_columns": 20})
    found["wide-means-one-group"] = ("llama", {"intermediate_size": 301}, {"method": "arb"} | GROUPINGS["one"])
    found["experts"] = ("mixtral", {"hidden_size": 48, "intermediate_size": 40}, {})
    found["conv1d"] = ("gpt2", {}, {})
    # Version 2 of the format: int8 embeddings and heads. The files above are of version 1, and were made before.
    tables = {"refinement": "full", "tune_steps": 0, "scale_dtype": "int8", "embedding_dtype": "int8"}
    found["int8-tied"] = ("llama", {}, tables)
    found["int8-untied"] = ("llama", {"tie_word_embeddings": False}, tables)
    found["int8-head-bias"] = ("phi", {"tie_word_embeddings": False, "hidden_act": "silu"}, tables)
    found["int8-head-only"] = (
        "llama",
        {"tie_word_embeddings": False},
        tables | {"overrides": {"*.embed_tokens": None}},
    )
    found["bits"] = ("llama", {"num_hidden_layers": 2}, tables | {"bits": 6.0})
    found["distilled"] = ("llama", {"num_hidden_layers": 1}, tables | {"distill_steps": 2})
    found["int8-none"] = ("llama", {}, {"embedding_dtype": "model"})
    return found


def dense_model(family: str, options: dict[str, Any]) -> PreTrainedModel:
    """A tiny random model in bfloat16 whose matrices fill no block, no word and no byte."""
    sizes = {"vocab_size": VOCABULARY, "tie_word_embeddings": True, "max_position_embeddings": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "gpt2":
            config = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=44, n_inner=37, n_layer=1, n_head=2)
            model: PreTrainedModel = GPT2LMHeadModel(config)
        else:
            common = sizes | {"hidden_size": 36, "intermediate_size": 41, "num_hidden_layers": 1}
            common |= {"num_attention_heads": 6, "num_key_value_heads": 2} | options
            if family == "llama":
                model = LlamaForCausalLM(LlamaConfig(**common))
            elif family == "phi":
                model = PhiForCausalLM(PhiConfig(**common, partial_rotary_factor=1.0))
                model.lm_head.bias.data.normal_()
            else:
                model = MixtralForCausalLM(MixtralConfig(**common, num_local_experts=3, num_experts_per_tok=2))
    return model.to(torch.bfloat16).eval()


def make(folder: Path, family: str, model_options: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Write one case; returns its entry in ``digests.json``."""
    generator = torch.Generator().manual_seed(1)
    data = [torch.randint(0, VOCABULARY, (32,), generator=generator) for _ in range(16)]
    dense = folder / "dense"
    dense_model(family, model_options).save_pretrained(dense)
    defaults = {"block_size": 32, "max_salient_columns": 8, "refinement": "paper", "scale_dtype": "float16"}
    config = ArbConfig(**{"dataset": data} | defaults | options)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=torch.bfloat16)
    model.config._name_or_path = ""
    for path in dense.iterdir():
        path.unlink()
    dense.rmdir()
    model.save_pretrained(folder, max_shard_size="6KB" if folder.name == "shards" else "5GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    return {
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())},
        "dense": {name: digest(module.binary_weight().dequantize()) for name, module in binary_modules(model).items()},
        "tables": {name: digest(module.dequantized()) for name, module in int8_tables(model).items()},
    }


def digest(tensor: torch.Tensor) -> str:
    """Of the shape, type and bits of a tensor."""
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode() + tensor.numpy().tobytes()).hexdigest()


def main() -> None:
    digests = json.loads((HERE / "digests.json").read_text()) if (HERE / "digests.json").exists() else {}
    for name, case in cases().items():
        if name in digests:
            continue
        (HERE / name).mkdir()
        digests[name] = make(HERE / name, *case)
        (HERE / "digests.json").write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n")
        print(name, sum(path.stat().st_size for path in (HERE / name).iterdir()), "bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
