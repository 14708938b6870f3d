"""Binarize a model, measure it, and publish it with its model card.

    python examples/quantize_and_push.py HuggingFaceTB/SmolLM2-135M-Instruct --repo me/SmolLM2-135M-arb-rc

Without ``--repo`` everything is written to ``--out`` and nothing is pushed: look at the card first, then run
``arb-hf push OUT me/name``. To push, log in with ``hf auth login`` first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import arb_hf
from arb_hf import ArbConfig
from arb_hf.evaluate import evaluation_windows, perplexity
from arb_hf.report import Measurement

DATA = Path(__file__).parent / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="name on the Hub or folder")
    parser.add_argument("--out", default="model-arb-rc", help="folder to write")
    parser.add_argument("--repo", help="repository on the Hub to push to, as owner/name")
    parser.add_argument("--calibration", default=str(DATA / "wikitext2.calibration.raw"), help="text to calibrate on")
    parser.add_argument("--text", default=str(DATA / "wikitext2.heldout.raw"), help="text to measure perplexity on")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument(
        "--tune-steps", type=int, default=32, help="steps of tuning per decoder layer; 0 takes a sixth of the time"
    )
    parser.add_argument("--quick", action="store_true", help="few windows: a smoke test")
    arguments = parser.parse_args()
    samples, count = (4, 2) if arguments.quick else (32, 20)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = evaluation_windows(tokenizer, arguments.text, arguments.length, count)
    before = perplexity(AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto"), windows)

    config = ArbConfig(
        tune_steps=arguments.tune_steps,
        dataset=arguments.calibration,
        num_samples=samples,
        sequence_length=arguments.length,
    )
    model = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=config, dtype="auto")
    after = perplexity(model, windows)
    protocol = f"{len(windows)} windows of {arguments.length} tokens, {str(model.dtype).removeprefix('torch.')}"
    model.arb_report.add(Measurement("perplexity", Path(arguments.text).name, protocol, after, before))

    print(model.arb_report.table())
    print(arb_hf.summary(model))
    print(f"perplexity {before:.2f} -> {after:.2f} at {arb_hf.bits_per_weight(model):.3f} bits per weight")
    arb_hf.save_pretrained(model, tokenizer, arguments.out)
    print(f"written to {arguments.out}; its model card is {Path(arguments.out) / 'README.md'}")
    if arguments.repo:
        print(arb_hf.push_to_hub(model, tokenizer, arguments.repo).commit_url)


if __name__ == "__main__":
    main()
