"""What each step of ``refinement="full"`` gives: output error, bits and CPU seconds on some matrices of a model.

    python examples/benchmarks/ablation.py --model MODEL --data FOLDER --layers 2 12

Inputs are those of the full-precision model on the calibration windows of ``protocol.py``. A line with a plus adds its
step to the lines before it; a line with "only" adds it to the free levels. With ``--perplexity`` the whole model is
binarized instead, by the steps of each line, and its perplexity measured as in ``protocol.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from protocol import (
    EVALUATION_WINDOWS,
    LENGTH,
    add_data_option,
    binarize,
    calibration_tokens,
    calibration_windows,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from arb_hf import bits_per_weight
from arb_hf.binarize import BinarizeOptions, binarize_weight
from arb_hf.binarize.full import driver
from arb_hf.binarize.full.coded import CodedBlock
from arb_hf.binarize.full.steps import nearest_codes
from arb_hf.binarize.hessian import output_error
from arb_hf.calibrate.batches import Batch
from arb_hf.calibrate.capture import capture, run_layer
from arb_hf.calibrate.decoder import find_decoder_layers, is_plain_linear
from arb_hf.calibrate.hessians import accumulate
from arb_hf.evaluate import perplexity
from arb_hf.text import read_text, tokenize


@dataclass(frozen=True)
class Steps:
    """Which steps are taken; ``scale_dtype`` as in ``ArbConfig``."""

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


@contextlib.contextmanager
def taking(steps: Steps) -> Iterator[None]:
    """Within, ``refinement="full"`` takes these steps only; a sweep is one step."""
    sweeping = threading.local()  # matrices may be binarized side by side

    def sweep(*arguments: Any, whole: Callable = driver._descend, **options: Any) -> list[CodedBlock]:
        sweeping.now = True
        try:
            return whole(*arguments, **options)
        finally:
            sweeping.now = False

    def without_feedback(block: CodedBlock, values: Tensor, upper: Tensor) -> tuple[CodedBlock, None]:
        return nearest_codes(block, values), None

    def without_curvature(fit: Callable) -> Callable:
        def fitted(block: CodedBlock, values: Tensor, curvature: Tensor | None) -> CodedBlock:
            return fit(block, values, curvature) if curvature is None or getattr(sweeping, "now", False) else block

        return fitted

    def as_published(error: Tensor, upper: Tensor, later: Tensor) -> Tensor:
        return later.T @ (error / upper.diagonal()[:, None])

    replaced: dict[str, Any] = {"SWEEPS": steps.sweeps, "_descend": sweep}
    if not steps.feedback:
        replaced["round_with_feedback"] = without_feedback
    if not steps.exact:
        replaced["exact_compensation"] = as_published
    if not steps.rows:
        replaced["fit_rows"] = without_curvature(driver.fit_rows)
    if not steps.columns:
        replaced["fit_columns"] = without_curvature(driver.fit_columns)
    with patch.multiple(driver, **replaced):
        yield


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
    text = tokenize(read_text(arguments.data / "wiki.test.raw"), tokenizer)
    for name in names:
        steps = VARIANTS.get(name)
        options: dict[str, Any] = {"refinement": "paper"}
        if steps is not None:
            options = {"scale_dtype": steps.scale_dtype, "tune_steps": 0}
        with contextlib.nullcontext() if steps is None else taking(steps):
            model, seconds = binarize(arguments.model, windows, 0, options, torch.float32)
        value = perplexity(model, text, sequence_length=LENGTH, max_windows=arguments.eval_windows)
        print(f"{name:48s} {bits_per_weight(model):6.3f} bits  perplexity {value:10.2f}  {seconds:5.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="path of a model, or its name on the Hub")
    add_data_option(parser)
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 12], help="decoder layers to take matrices from")
    parser.add_argument("--windows", type=int, default=32, help="calibration windows")
    parser.add_argument("--threads", type=int, default=1, help="number of threads for torch")
    parser.add_argument(
        "--perplexity", action="store_true", help="binarize and measure the whole model with each variant"
    )
    parser.add_argument("--eval-windows", type=int, default=EVALUATION_WINDOWS, help="windows for the perplexity")
    parser.add_argument("--variants", nargs="+", choices=["published", *VARIANTS], default=["published", *VARIANTS])
    parser.add_argument("--quick", action="store_true", help="one layer, 4 windows: a smoke test")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.layers, arguments.windows, arguments.eval_windows = [0], 4, 4
    torch.set_num_threads(arguments.threads)
    if arguments.perplexity:
        return perplexities(arguments, arguments.variants)
    found = matrices(arguments)
    print(f"{'':48s}" + "".join(f"{name:>22s}" for name, _, _ in found) + f"{'bits':>8s}{'CPU s':>8s}")
    for name in arguments.variants:
        steps = VARIANTS.get(name)
        options = (
            BinarizeOptions(refinement="paper") if steps is None else BinarizeOptions(scale_dtype=steps.scale_dtype)
        )
        begin = time.process_time()
        with torch.no_grad(), contextlib.nullcontext() if steps is None else taking(steps):
            results = [binarize_weight(weight, hessian, options) for _, weight, hessian in found]
        seconds = time.process_time() - begin
        errors = [
            output_error(weight - binary.rounded().dequantize(), weight, hessian)
            for (_, weight, hessian), binary in zip(found, results, strict=True)
        ]
        bits = sum(each.form.bits() for each in results) / sum(weight.numel() for _, weight, _ in found)
        print(f"{name:48s}" + "".join(f"{error:22.5f}" for error in errors) + f"{bits:8.3f}{seconds:8.2f}", flush=True)


if __name__ == "__main__":
    main()
