"""What each step of ``refinement="full"`` gives: output error, bits and CPU seconds on some matrices of a model.

    python examples/benchmarks/ablation.py --model MODEL --data FOLDER --layers 2 12

Inputs are those of the full-precision model on the calibration windows of ``protocol.py``. Every line with a plus adds
its step to the ones before it; a line with "only" adds it to the free levels. With ``--perplexity`` the whole model is
binarized instead, each line by its steps, and measured as ``protocol.py`` measures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from protocol import (
    EVALUATION_WINDOWS,
    LENGTH,
    binarize,
    calibration_tokens,
    calibration_windows,
    read_wikitext,
    tokenize,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from arb_hf import bits_per_weight
from arb_hf.binarize import BinarizeOptions, BinaryWeight, binarize_weight
from arb_hf.binarize.full import _curvature, _descend, assemble, choose_salient_columns, spans
from arb_hf.binarize.hessian import HessianFactor, factorize, output_error
from arb_hf.binarize.refine import (
    exact_compensation,
    fit_columns,
    fit_rows,
    nearest_codes,
    round_with_feedback,
    start,
)
from arb_hf.calibrate.capture import capture, run_layer
from arb_hf.calibrate.data import Batch
from arb_hf.calibrate.decoder import find_decoder_layers, is_plain_linear
from arb_hf.calibrate.hessians import accumulate
from arb_hf.evaluate import perplexity


@dataclass(frozen=True)
class Steps:
    """Which steps are taken; ``salient`` and ``scale_dtype`` as in ``BinarizeOptions``."""

    feedback: bool = True
    exact: bool = True
    rows: bool = True
    columns: bool = True
    sweeps: int = 0
    scale_dtype: str = "float16"


FREE = Steps(feedback=False, exact=False, rows=False, columns=False)
VARIANTS: dict[str, Steps] = {
    "free levels": FREE,
    "+ column feedback": Steps(exact=False, rows=False, columns=False),
    "+ exact compensation": Steps(rows=False, columns=False),
    "+ row scales under H": Steps(columns=False),
    "+ column scales under H": Steps(),
    "+ one sweep of block descent": Steps(sweeps=1),
    "+ two sweeps": Steps(sweeps=2),
    "(four sweeps)": Steps(sweeps=4),
    "+ 8-bit scales, bits spent on salient columns": Steps(sweeps=2, scale_dtype="int8"),
    "only column feedback": replace(FREE, feedback=True),
    "only exact compensation": replace(FREE, exact=True),
    "only row and column scales under H": replace(FREE, rows=True, columns=True),
    "only two sweeps": replace(FREE, sweeps=2),
    "only 8-bit scales": replace(FREE, scale_dtype="int8"),
}


def solve(weight: Tensor, hessian: Tensor, factor: HessianFactor, steps: Steps) -> BinaryWeight:
    """As ``binarize_full``, with the steps asked for."""
    options = BinarizeOptions(refinement="full", scale_dtype=steps.scale_dtype)
    salient = choose_salient_columns(weight, factor, options)
    form = options.form(*weight.shape, int(salient.sum()))
    wanted, curvature = weight.T.contiguous(), _curvature(hessian, factor)
    remaining, dense, blocks = wanted.clone(), torch.empty_like(wanted), []
    for span in spans(len(wanted), form.block_size):
        values, upper = remaining[span], factor.upper[span, span]
        effective = torch.cholesky_inverse(upper, upper=True)
        block = start(values, salient[span], form)
        block = nearest_codes(fit_columns(fit_rows(block, values, None), values, None), values)
        if steps.feedback:
            block, _ = round_with_feedback(block, values, upper)
        if steps.rows:
            block = fit_rows(block, values, effective)
        if steps.columns:
            block = fit_columns(block, values, effective)
        dense[span] = block.values()
        later, error = factor.upper[span, span.stop :], values - dense[span]
        if steps.exact:
            remaining[span.stop :] -= exact_compensation(error, upper, later)
        else:
            remaining[span.stop :] -= later.T @ (error / upper.diagonal()[:, None])
        blocks.append(block)
    gradient = curvature @ (wanted - dense)
    for sweep in range(steps.sweeps):
        blocks = _descend(blocks, dense, gradient, curvature, last=sweep == steps.sweeps - 1)
    return assemble(blocks, form)


@torch.no_grad()
def matrices(arguments: argparse.Namespace) -> list[tuple[str, Tensor, Tensor]]:
    """Name, weight and H of the matrices of some layers, one per distinct input."""
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = calibration_windows(calibration_tokens("wiki", arguments.data, tokenizer), 0)[: arguments.windows]
    _, layers = find_decoder_layers(model)
    calls = list(capture(model, layers, [Batch(window[None], None) for window in windows]))
    found = []
    for index, layer in enumerate(layers[: max(arguments.layers) + 1]):
        if index in arguments.layers:
            linears = {name: each for name, each in layer.named_modules() if is_plain_linear(each)}
            for group in accumulate(layer, linears, calls, index):
                name, hessian = group.names[0], group.hessian()
                assert hessian is not None
                found.append((f"{index}.{name}", linears[name].weight.data.float(), hessian))
        for call in calls:
            call.hidden = run_layer(layer, call, index)
    return found


def perplexities(arguments: argparse.Namespace, names: list[str]) -> None:
    """Bits, perplexity and seconds of the whole model, binarized by each variant's steps."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = calibration_windows(calibration_tokens("wiki", arguments.data, tokenizer), 0)[: arguments.windows]
    text = tokenize(tokenizer, read_wikitext(arguments.data / "wiki.test.raw"))
    for name in names:
        steps = VARIANTS.get(name)
        options: dict[str, Any] = {"refinement": "paper"}
        if steps is not None:
            options = {"refinement": "full", "scale_dtype": steps.scale_dtype, "tune_steps": 0}
        with patch("arb_hf.binarize.solve.binarize_full", lambda w, h, f, o, steps=steps: solve(w, h, f, steps)):
            model, seconds = binarize(arguments.model, windows, 0, options, torch.float32)
        value = perplexity(model, text, sequence_length=LENGTH, max_windows=arguments.eval_windows)
        print(f"{name:48s} {bits_per_weight(model):6.3f} bits  perplexity {value:10.2f}  {seconds:5.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model's path or name")
    parser.add_argument("--data", required=True, type=Path, help="folder with wiki.valid.raw")
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 12])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--perplexity", action="store_true", help="binarize and measure the whole model by each variant"
    )
    parser.add_argument("--eval-windows", type=int, default=EVALUATION_WINDOWS, help="windows of the perplexity")
    parser.add_argument("--variants", nargs="+", choices=["published", *VARIANTS], default=["published", *VARIANTS])
    parser.add_argument("--quick", action="store_true", help="one layer, 4 windows: a smoke test")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.layers, arguments.windows, arguments.eval_windows = [0], 4, 4
    torch.set_num_threads(arguments.threads)
    if arguments.perplexity:
        return perplexities(arguments, arguments.variants)
    found = matrices(arguments)
    factors = [factorize(hessian, weight.shape[1], 0.01) for _, weight, hessian in found]
    print(f"{'':48s}" + "".join(f"{name:>22s}" for name, _, _ in found) + f"{'bits':>8s}{'CPU s':>8s}")

    def line(name: str, make: Callable[[Tensor, Tensor, HessianFactor], BinaryWeight]) -> None:
        begin = time.process_time()
        results = [make(w, h, f) for (_, w, h), f in zip(found, factors, strict=True)]
        seconds = time.process_time() - begin
        errors = [
            output_error(w - binary.rounded().dequantize(), w, h)
            for (_, w, h), binary in zip(found, results, strict=True)
        ]
        bits = sum(each.form.bits() for each in results) / sum(w.numel() for _, w, _ in found)
        print(f"{name:48s}" + "".join(f"{error:22.5f}" for error in errors) + f"{bits:8.3f}{seconds:8.2f}", flush=True)

    with torch.no_grad():
        for name in arguments.variants:
            steps = VARIANTS.get(name)
            if steps is None:
                line(name, lambda w, h, f: binarize_weight(w, h, BinarizeOptions()))
            else:
                line(name, lambda w, h, f, steps=steps: solve(w, h, f, steps))


if __name__ == "__main__":
    main()
