"""Binarize one model by every published method with the same data and compare true bits, output error and perplexity.

python examples/compare_methods.py HuggingFaceTB/SmolLM2-135M-Instruct --plot methods.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import arb_hf
from arb_hf import ArbConfig
from arb_hf.evaluate import evaluation_windows, perplexity
from arb_hf.report import plot_comparison

DATA = Path(__file__).parent / "data"
FORMS = {  # those of the paper's tables, and the one with little more than one bit
    "billm": {"method": "billm", "column_group_bitmap": False},
    "arb": {"method": "arb", "column_group_bitmap": False},
    "arb-x": {"method": "arb-x", "column_group_bitmap": False},
    "arb-x + CGB": {"method": "arb-x"},
    "arb-rc": {"method": "arb-rc", "column_group_bitmap": False},
    "arb-rc + CGB": {"method": "arb-rc"},
    "arb-rc, one group": {"method": "arb-rc", "group_bitmap": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="name on the Hub or folder")
    parser.add_argument("--calibration", default=str(DATA / "wikitext2.calibration.raw"), help="text to calibrate on")
    parser.add_argument("--text", default=str(DATA / "wikitext2.heldout.raw"), help="text to measure perplexity on")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS), help="the ones to compare")
    parser.add_argument("--plot", metavar="FILE", help="draw the output errors of all runs to this image")
    parser.add_argument("--quick", action="store_true", help="few windows: a smoke test")
    arguments = parser.parse_args()
    samples, count = (4, 2) if arguments.quick else (32, 20)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = evaluation_windows(tokenizer, arguments.text, arguments.length, count)
    dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    print(f"{'form':<20}{'bits/weight':>12}{'output error':>14}{'perplexity':>12}")
    print(f"{'full precision':<20}{'':>12}{'':>14}{perplexity(dense, windows):>12.2f}", flush=True)
    reports = {}
    for form in arguments.forms:
        config = ArbConfig(
            refinement="paper",
            dataset=arguments.calibration,
            num_samples=samples,
            sequence_length=arguments.length,
            **FORMS[form],
        )
        model = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=config, dtype=torch.float32)
        reports[form] = model.arb_report
        bits, error = arb_hf.bits_per_weight(model), model.arb_report.output_error
        print(f"{form:<20}{bits:>12.3f}{error:>14.4f}{perplexity(model, windows):>12.2f}", flush=True)
    if arguments.plot:
        plot_comparison(reports, arguments.plot)


if __name__ == "__main__":
    main()
