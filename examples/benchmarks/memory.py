"""Peak memory of binarizing against the model's depth.

    python examples/benchmarks/memory.py [--quick] [--depths 8 16 32] [--hidden 1024] [--tune-steps N] [--large]

Random LLaMA-shaped bfloat16 checkpoints are written layer by layer to a temporary folder. Each is binarized in a new
process, whose anonymous and file-backed resident memory (RssAnon and RssFile in /proc) is sampled from outside. The
full-precision weights are mapped from the checkpoint: they count as file-backed, and the system may drop them at any
time. Only the packed layers should grow with depth, so the slope of the peak is printed beside their size. ``--large``
adds a checkpoint of 1.1 billion parameters (2.2 GB, the shape of TinyLlama). Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

SAMPLES, LENGTH = 4, 128
MB = 1e6


def shape(layers: int, hidden: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(hidden // 512, 1),
        vocab_size=4096,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def tinyllama() -> LlamaConfig:
    config = shape(22, 2048)
    config.intermediate_size, config.vocab_size = 5632, 32000
    return config


def write_checkpoint(config: LlamaConfig, folder: Path) -> int:
    """A shard per decoder layer, so that one layer at most is ever held; returns the bytes written."""
    generator = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}
    written = 0

    def write(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal written
        tensors = {}
        for name, size in shapes.items():
            norm = len(size) == 1
            tensors[name] = (torch.ones(size) if norm else torch.randn(size, generator=generator) * 0.02).bfloat16()
            files[name] = file
            written += tensors[name].nbytes
        save_file(tensors, folder / file, metadata={"format": "pt"})

    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    outer = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,), "lm_head": (vocabulary, hidden)}
    write("outer.safetensors", {f"{name}.weight": size for name, size in outer.items()})
    for index in range(config.num_hidden_layers):
        layer = {f"model.layers.{index}.{name}.weight": size for name, size in linears.items()}
        write(f"layer-{index:03d}.safetensors", layer)
    index_file = {"metadata": {"total_size": written}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    config.save_pretrained(folder)
    return written


def binarize(folder: str, options: dict[str, Any]) -> None:
    """What the fresh process does; prints when it starts and what it made."""
    from transformers import AutoModelForCausalLM

    from arb_hf import ArbConfig
    from arb_hf.nn import BinaryLinear

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 4096, (SAMPLES, LENGTH), generator=generator)
    config = ArbConfig(dataset=tokens, **options)
    print("{}", flush=True)
    start = time.process_time()
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    packed = sum(
        tensor.nbytes
        for module in model.modules()
        if isinstance(module, BinaryLinear)
        for tensor in module.packed.values()
    )
    print(json.dumps({"packed": packed, "cpu_seconds": time.process_time() - start}), flush=True)


def resident(pid: int) -> tuple[float, float]:
    """Anonymous and file-backed resident bytes of a process."""
    lines = dict(line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(lines["RssAnon"].split()[0]) * 1024, int(lines["RssFile"].split()[0]) * 1024


def measure(folder: Path, options: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", str(folder), json.dumps(options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        base = resident(process.pid)
        peak = list(base)
        while process.poll() is None:
            try:
                peak = [max(each) for each in zip(peak, resident(process.pid), strict=True)]
            except (KeyError, OSError):  # it has just ended
                break
            time.sleep(0.01)
        out, errors = process.stdout.read(), process.stderr.read()
        if process.wait():
            raise SystemExit(errors)
    return {"base": base[0], "anonymous": peak[0], "file": peak[1]} | json.loads(out)


def report(config: LlamaConfig, options: dict[str, Any]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(config, Path(folder))
        found = measure(Path(folder), options)
    print(
        f"{config.num_hidden_layers:>6}{config.hidden_size:>8}{size / MB:>14.0f}{found['packed'] / MB:>10.1f}"
        f"{found['base'] / MB:>10.0f}{found['anonymous'] / MB:>16.0f}{found['file'] / MB:>14.0f}{found['cpu_seconds']:>9.0f}",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="*", default=[8, 16, 32], help="numbers of decoder layers to try")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size")
    parser.add_argument(
        "--iterations", type=int, default=1, help="rounds of refinement, which change the time but not the memory"
    )
    parser.add_argument("--large", action="store_true", help="also run a checkpoint of 1.1 billion parameters")
    parser.add_argument("--quick", action="store_true", help="depths 2, 4, 8 at hidden size 256")
    parser.add_argument("--tune-steps", type=int, help='use refinement="full" with this number of tuning steps')
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, made = options.child
        return binarize(folder, json.loads(made))
    made = {"refinement": "paper", "iterations": options.iterations}
    if options.tune_steps is not None:
        made = {"tune_steps": options.tune_steps}
    if options.quick:
        options.depths, options.hidden = [2, 4, 8], 256
    print(
        f"{'layers':>6}{'hidden':>8}{'checkpoint MB':>14}{'packed':>10}{'start':>10}{'anonymous peak':>16}{'file-backed':>14}{'CPU s':>9}"
    )
    found = {depth: report(shape(depth, options.hidden), made) for depth in options.depths}
    if len(found) > 1:
        first, last = found[min(found)], found[max(found)]
        steps = max(found) - min(found)
        slope, packed = ((last[key] - first[key]) / steps / MB for key in ("anonymous", "packed"))
        print(f"per layer: anonymous peak {slope:.2f} MB, packed layer {packed:.2f} MB")
    if options.large:
        report(tinyllama(), made)


if __name__ == "__main__":
    main()
