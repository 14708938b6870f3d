"""What somebody does first with an installed wheel: ``arb-hf --version``, binarize, save, reload, generate; with kernels.

Run by `.ci/wheels` and by cibuildwheel in an environment that holds the wheel and its dependencies alone.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import arb_hf
from arb_hf import native

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def main() -> None:
    script = Path(sys.executable).with_name("arb-hf")
    version = subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    print(version)
    assert version.endswith("C kernels built"), version
    tokens = torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(0))
    config = arb_hf.ArbConfig(dataset=list(tokens), num_samples=8, sequence_length=32, tune_steps=2)
    with tempfile.TemporaryDirectory() as folder:
        dense, packed = Path(folder, "dense"), Path(folder, "packed")
        LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, bos_token_id=0, eos_token_id=1)).save_pretrained(dense)
        model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
        arb_hf.save_pretrained(model, None, packed)
        model = arb_hf.from_pretrained(packed)
        generated = model.generate(tokens[:1, :4], max_new_tokens=8, do_sample=False)
    print(f"generated {generated[0, 4:].tolist()}")
    print(f"instruction set {native.ISAS[native.isa()]}, {openmp()}")


def openmp() -> str:
    """Name the OpenMP library of this process; there must be one only, torch's."""
    maps = Path("/proc/self/maps")
    if not maps.exists():  # macOS
        return "OpenMP of torch"
    found = {Path(name) for name in re.findall(r"\S*/lib(?:gomp|omp|iomp5)[-.]\S*", maps.read_text())}
    assert len(found) == 1, found
    return f"OpenMP {found.pop()}"


if __name__ == "__main__":
    main()
