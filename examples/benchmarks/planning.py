"""What `arb_hf.plan` says against what a run then gives: bytes of the weight files, bits, seconds.

    python examples/benchmarks/planning.py [--quick] [--model MODEL] [--layers 4] [--samples 32] [--length 512] [--tune-steps 32]

Without `--model`, a random Qwen3-MoE of width 256 with 8 layers; with it, the first `--layers` decoder layers of a model
(0 for all), on random tokens. Seconds are CPU seconds of one thread, in the plan as in the run, so that neither a busy
machine nor the number of cores matters; constants of `arb_hf/planning/duration.py` are fitted by them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig

import arb_hf
from arb_hf import ArbConfig


def experts(layers: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=192,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=1024,
        dtype="bfloat16",
    )


def write_model(folder: Path, source: str | None, layers: int) -> None:
    """The model to plan and to binarize, in bfloat16."""
    if source is None:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(experts(layers or 8), dtype=torch.bfloat16).save_pretrained(folder)
        return
    config = AutoConfig.from_pretrained(source)
    config.num_hidden_layers = layers or config.num_hidden_layers
    AutoModelForCausalLM.from_pretrained(source, config=config, dtype=torch.bfloat16).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one layer and few tokens: whether it works")
    parser.add_argument("--model", help="folder or Hub name")
    parser.add_argument("--layers", type=int, default=0, help="decoder layers to take, 0 for all")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tune-steps", type=int, default=0)
    parser.add_argument("--refinement", default="full")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.layers, arguments.samples, arguments.length = 1, 4, 64
    time.perf_counter = time.process_time  # the clock of the plan and of the run's stages
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dense, packed = Path(folder) / "dense", Path(folder) / "packed"
        write_model(dense, arguments.model, arguments.layers)
        vocabulary = AutoConfig.from_pretrained(dense).vocab_size
        generator = torch.Generator().manual_seed(0)
        config = ArbConfig(
            refinement=arguments.refinement,
            tune_steps=arguments.tune_steps,
            scale_dtype="int8" if arguments.refinement == "full" else "float16",
            num_samples=arguments.samples,
            sequence_length=arguments.length,
            dataset=torch.randint(0, vocabulary, (arguments.samples, arguments.length), generator=generator),
        )
        plan = arb_hf.plan(dense, config)
        model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype="auto")
        model.save_pretrained(packed)
        written = sum(path.stat().st_size for path in packed.glob("*.safetensors"))
    stages = model.arb_report.stages
    rows = [
        ("bytes", plan.bytes, written),
        ("bits", plan.bits_per_weight, arb_hf.bits_per_weight(model)),
        *((stage, plan.seconds.get(stage, 0.0), seconds) for stage, seconds in stages.items()),
        ("all seconds", sum(plan.seconds.values()), sum(stages.values())),
    ]
    print(f"load {os.getloadavg()[0]:.1f}\n\n| | planned | run | planned / run |\n|---|---|---|---|")
    for name, planned, found in rows:
        shown = (f"{planned:,}", f"{found:,}") if name == "bytes" else (f"{planned:.3f}", f"{found:.3f}")
        print(f"| {name} | {' | '.join(shown)} | {planned / found:.2f} |")


if __name__ == "__main__":
    main()
