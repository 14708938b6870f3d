"""What a few more precise layers gain: perplexity and bits with other options for the first and last decoder layer.

    python examples/benchmarks/overrides.py MODEL --calibrate wiki.valid.raw --evaluate wiki.test.raw [--quick]

Prints a Markdown table: for each setting the perplexity, the stored bits per binarized weight, and the stored bits per weight
of all the decoder layers' matrices, where matrices that are kept count with 16 bits, as in a bfloat16 checkpoint.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import arb_hf
from arb_hf import ArbConfig
from arb_hf.evaluate import perplexity

KEPT_BITS = 16


def settings(last: int) -> dict[str, dict | None]:
    """Overrides by name; None binarizes nothing."""
    ends = ("model.layers.0", f"model.layers.{last}")
    finer = {name: {"block_size": 64} for name in ends}
    return {
        "full precision": None,
        "all layers alike": {},
        "first and last layer kept": dict.fromkeys(ends),
        "first and last layer in blocks of 64": finer,
        "the same, the others with one group": {"*": {"group_bitmap": False}} | finer,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="path of a model, or its name on the Hub")
    parser.add_argument("--calibrate", required=True, help="text to calibrate on")
    parser.add_argument("--evaluate", required=True, help="text to measure perplexity on")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter windows, fewer iterations")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the settings to run")
    arguments = parser.parse_args()
    samples, length, iterations, windows = (8, 256, 5, 8) if arguments.quick else (32, 512, 15, 40)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    last = AutoModelForCausalLM.from_pretrained(arguments.model).config.num_hidden_layers - 1
    print("| setting | perplexity | bits per binarized weight | bits per decoder weight | binarized | seconds |")
    print("|---|---|---|---|---|---|", flush=True)
    for number, (name, overrides) in enumerate(settings(last).items()):
        if arguments.only and number not in arguments.only:
            continue
        start, config = time.perf_counter(), None
        if overrides is not None:
            data = {"dataset": arguments.calibrate, "num_samples": samples, "sequence_length": length}
            config = ArbConfig(**data, refinement="paper", iterations=iterations, overrides=overrides)
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=torch.float32, **({} if config is None else {"quantization_config": config})
        )
        seconds = time.perf_counter() - start
        loss = perplexity(model, tokenizer, arguments.evaluate, length, windows)
        if config is None:
            print(f"| {name} | {loss:.1f} | | {KEPT_BITS} | 0 % | {seconds:.0f} |", flush=True)
            continue
        bits, share = arb_hf.bits_per_weight(model), model.arb_report.coverage.share
        whole = bits * share + KEPT_BITS * (1 - share)
        print(f"| {name} | {loss:.1f} | {bits:.3f} | {whole:.3f} | {share:.1%} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
