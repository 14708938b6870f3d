"""Perplexity over true bits per weight: published binary methods, `refinement="full"`, and 2 to 4-bit peers.

    python examples/pareto.py --model MODEL --data FOLDER --csv pareto.csv --plot pareto.png

Data, calibration and evaluation are those of ``benchmarks/protocol.py``. Points that the CSV already holds are not run
again, so that a run can be stopped and continued. The peers are round-to-nearest and GPTQ-style rounding (asymmetric
min-max grids, a float16 scale and zero per 128 weights) and HQQ (needs ``pip install hqq``), with every stored bit counted.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import arb_hf
from arb_hf.binarize.hessian import HessianFactor, factorize
from arb_hf.calibrate.batches import Batch
from arb_hf.calibrate.capture import capture, run_layer
from arb_hf.calibrate.decoder import find_decoder_layers, is_plain_linear
from arb_hf.calibrate.hessians import accumulate
from arb_hf.evaluate import perplexity
from arb_hf.text import read_text, tokenize

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from protocol import (
    EVALUATION_WINDOWS,
    LENGTH,
    add_data_option,
    binarize,
    calibration_tokens,
    calibration_windows,
)

GROUP = 128
PAPER = {"refinement": "paper"}
FULL = {"tune_steps": 0}
TUNED: dict[str, Any] = {}
ONE_GROUP = {"group_bitmap": False, "column_group_bitmap": False}
NO_CGB = {"column_group_bitmap": False}
BINARY: dict[str, tuple[str, dict[str, Any]]] = {
    "ARB-RC one group": ("published", PAPER | ONE_GROUP),
    "ARB-RC": ("published", PAPER | NO_CGB),
    "ARB-RC + CGB": ("published", PAPER),
    "ARB-X": ("published", PAPER | NO_CGB | {"method": "arb-x"}),
    "ARB-X + CGB": ("published", PAPER | {"method": "arb-x"}),
    "ARB": ("published", PAPER | NO_CGB | {"method": "arb"}),
    "BiLLM": ("published", PAPER | NO_CGB | {"method": "billm"}),
    "full, one group, few salient": ("full", FULL | ONE_GROUP | {"max_salient_columns": 6}),
    "full, one group": ("full", FULL | ONE_GROUP),
    "full": ("full", FULL | NO_CGB),
    "full + CGB, few salient": ("full", FULL | {"max_salient_columns": 20}),
    "full + CGB": ("full", FULL),
    "tuned, one group": ("tuned", TUNED | ONE_GROUP),
    "tuned": ("tuned", TUNED | NO_CGB),
    "tuned + CGB": ("tuned", TUNED),
    **{f"bits={bits}": ("bits", FULL | {"bits": bits}) for bits in (1.3, 1.45, 1.6, 2.0, 2.3, 2.6, 2.87, 3.2)},
    **{f"bits={bits}, tuned": ("bits, tuned", TUNED | {"bits": bits}) for bits in (1.45, 2.3, 2.87)},
}
OURS = {
    "full": "arb_hf, all matrices alike, not tuned",
    "tuned": "arb_hf, all matrices alike",
    "bits": "arb_hf, bits=..., not tuned",
    "bits, tuned": "arb_hf, bits=...",
}
Rounding = Callable[[Tensor, HessianFactor], Tensor]


def grid_rounding(weight: Tensor, bits: int) -> Callable[[Tensor, int], Tensor]:
    """Rounding of columns to the min-max grid of their row and group of 128, float16 scale and zero."""
    top = 2**bits - 1
    groups = weight.split(GROUP, dim=1)
    low = torch.stack([each.amin(1).clamp(max=0) for each in groups], 1)
    high = torch.stack([each.amax(1).clamp(min=0) for each in groups], 1)
    scale = ((high - low) / top).clamp(min=1e-6).half().float()
    zero = (-low / scale).half().float()

    def rounded(values: Tensor, column: int) -> Tensor:
        s, z = scale[:, column // GROUP], zero[:, column // GROUP]
        return ((values / s + z).round().clamp(0, top) - z) * s

    return rounded


def nearest(weight: Tensor, factor: HessianFactor, bits: int) -> Tensor:
    rounded = grid_rounding(weight, bits)
    return torch.stack([rounded(weight[:, j], j) for j in range(weight.shape[1])], 1)


def gptq(weight: Tensor, factor: HessianFactor, bits: int) -> Tensor:
    """GPTQ-style: columns in turn, each error taken over by the columns after it."""
    rounded, upper = grid_rounding(weight, bits), factor.upper
    weight, result = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], GROUP):
        stop = min(start + GROUP, weight.shape[1])
        errors = []
        for j in range(start, stop):
            result[:, j] = rounded(weight[:, j], j)
            errors.append((weight[:, j] - result[:, j]) / upper[j, j])
            weight[:, j + 1 : stop] -= torch.outer(errors[-1], upper[j, j + 1 : stop])
        weight[:, stop:] -= torch.stack(errors, 1) @ upper[start:stop, stop:]
    return result


def hqq(weight: Tensor, factor: HessianFactor, bits: int) -> Tensor:
    try:
        from hqq.core.quantize import Quantizer
    except ImportError as error:
        raise SystemExit("the HQQ points need hqq: pip install hqq (or pass --skip hqq)") from error
    size = GROUP if weight.shape[1] % GROUP == 0 else GROUP // 2  # HQQ takes no incomplete groups
    packed, meta = Quantizer.quantize(
        weight, nbits=bits, group_size=size, axis=1, optimize=True, device="cpu", compute_dtype=torch.float32
    )
    return Quantizer.dequantize(packed, meta).float().reshape(weight.shape)


PEERS: dict[str, tuple[Callable[[Tensor, HessianFactor, int], Tensor], int]] = {
    **{f"RTN {bits} bits": (nearest, bits) for bits in (2, 3, 4)},
    **{f"GPTQ-style {bits} bits": (gptq, bits) for bits in (2, 3)},
    **{f"HQQ {bits} bits": (hqq, bits) for bits in (2, 3, 4)},
}


def linears_of(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a decoder layer, by their name in it."""
    return {name: module for name, module in layer.named_modules() if is_plain_linear(module)}


@torch.no_grad()
def round_model(model: Any, windows: list[Tensor], rounding: Callable, bits: int) -> None:
    """Round every linear of the decoder layers in place, layer after layer, each on the inputs the last ones leave."""
    _, layers = find_decoder_layers(model)
    calls = list(capture(model, layers, [Batch(window[None], None) for window in windows]))
    for index, layer in enumerate(layers):
        linears = linears_of(layer)
        for group in accumulate(layer, linears, calls, index):
            factor = factorize(group.hessian(), linears[group.names[0]].in_features, 0.01)
            for name in group.names:
                linears[name].weight.data = rounding(linears[name].weight.data, factor, bits)
        for call in calls:
            call.hidden = run_layer(layer, call, index)


def peer_bits(model: Any, rounding: Callable, bits: int) -> float:
    """Stored bits per weight: codes, and a float16 scale and zero per group."""
    _, layers = find_decoder_layers(model)
    stored = weights = 0
    for layer in layers:
        for linear in linears_of(layer).values():
            n, m = linear.weight.shape
            size = GROUP if rounding is not hqq or m % GROUP == 0 else GROUP // 2
            stored += n * (m * bits + -(-m // size) * 32)
            weights += n * m
    return stored / weights


def points(arguments: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[list[Tensor]], tuple[Any, float]]]]:
    """Family, name, and how to make the model: from calibration windows to ``(model, bits per weight)``."""
    for name, (family, options) in BINARY.items():

        def binary(windows: list[Tensor], options=options) -> tuple[Any, float]:
            model, _ = binarize(arguments.model, windows, arguments.seed, options, torch.float32)
            bits = arb_hf.bits_per_weight(model)
            return arb_hf.dequantize(model), bits

        yield family, name, binary
    for name, (rounding, bits) in PEERS.items():

        def peer(windows: list[Tensor], rounding=rounding, bits=bits) -> tuple[Any, float]:
            model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
            stored = peer_bits(model, rounding, bits)
            round_model(model, windows, rounding, bits)
            return model, stored

        yield name.split()[0], name, peer


def plot(rows: list[dict[str, str]], full: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for family in dict.fromkeys(row["family"] for row in rows if row["family"] != "full precision"):
        here = sorted(
            (float(row["bits"]), float(row["perplexity"]), row["name"]) for row in rows if row["family"] == family
        )
        axes.plot(
            [each[0] for each in here],
            [each[1] for each in here],
            marker="o",
            linewidth=2 if family in OURS else 0.8,
            label=OURS.get(family, "binary methods as published" if family == "published" else family),
            linestyle="none" if family == "published" else "-",
        )
        if family in ("published", *OURS):
            for bits, value, name in here:
                below = family == "tuned"
                axes.annotate(
                    name, (bits, value), fontsize=7, xytext=(4, -10 if below else 4), textcoords="offset points"
                )
    axes.axhline(full, color="grey", linestyle=":", label="full precision")
    axes.set(xlabel="true bits per weight", ylabel="perplexity, WikiText-2", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="path of a model, or its name on the Hub")
    add_data_option(parser)
    parser.add_argument("--calibration", choices=["wiki", "c4"], default="wiki", help="text to calibrate on")
    parser.add_argument("--csv", type=Path, default=Path("pareto.csv"), help="file of the points, read and written")
    parser.add_argument("--plot", type=Path, default=Path("pareto.png"), help="image to write")
    parser.add_argument("--seed", type=int, default=0, help="seed for choosing the windows")
    parser.add_argument("--threads", type=int, help="number of threads for torch")
    parser.add_argument("--skip", nargs="*", default=[], help="beginnings of names of points to leave out")
    parser.add_argument("--quick", action="store_true", help="4 windows for calibration and evaluation: a smoke test")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    evaluation = tokenize(read_text(arguments.data / "wiki.test.raw"), tokenizer)
    windows = calibration_windows(calibration_tokens(arguments.calibration, arguments.data, tokenizer), arguments.seed)
    windows = windows[: 4 if arguments.quick else None]
    count = 4 if arguments.quick else EVALUATION_WINDOWS
    rows: list[dict[str, str]] = []
    run = f"{Path(arguments.model).name} {arguments.calibration} seed {arguments.seed}"
    run += " quick" if arguments.quick else ""
    if arguments.csv.exists():
        with arguments.csv.open(newline="") as file:
            rows = list(csv.DictReader(file))
        others = sorted({row.get("run", "") for row in rows} - {run})
        if others:
            parser.error(
                f"{arguments.csv} holds points of another run ({others[0]}), not of ({run}): name another file"
            )

    def add(family: str, name: str, bits: float, value: float) -> None:
        row = {
            "family": family,
            "name": name,
            "bits": f"{bits:.4f}",
            "perplexity": f"{value:.3f}",
            "run": run,
        }
        rows.append(row)
        unfinished = arguments.csv.with_suffix(".unfinished")
        with unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row), extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        unfinished.replace(arguments.csv)
        print(f"{name:32s} {bits:6.3f} bits  perplexity {value:9.2f}", flush=True)

    known = {row["name"] for row in rows}
    if "full precision" not in known:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
        add(
            "full precision",
            "full precision",
            32,
            perplexity(model, evaluation, sequence_length=LENGTH, max_windows=count),
        )
        del model
    for family, name, make in points(arguments):
        if name in known or any(name.lower().startswith(each.lower()) for each in arguments.skip):
            continue
        model, bits = make(windows)
        add(family, name, bits, perplexity(model, evaluation, sequence_length=LENGTH, max_windows=count))
        del model
    full = next(float(row["perplexity"]) for row in rows if row["name"] == "full precision")
    plot(rows, full, arguments.plot)


if __name__ == "__main__":
    main()
