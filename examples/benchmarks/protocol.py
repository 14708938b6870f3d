"""Whole-model comparisons under one protocol: perplexity, gap to full precision, true bits, seconds.

    python examples/benchmarks/protocol.py --model MODEL --data FOLDER --method arb-rc --refinement paper full --seeds 0 1 2

FOLDER holds ``wiki.valid.raw`` (calibration) and ``wiki.test.raw`` (evaluation), the validation and test text of
WikiText-2 raw: the joined rows of ``wikitext-2-raw-v1`` of ``Salesforce/wikitext`` on the Hub, or the files of its archive.
``--calibration c4`` also needs ``c4.calib.jsonl``, with a ``text`` field on each line.

Calibration takes 32 windows of 512 tokens of the joined text, with starts drawn by a generator that has the run's seed.
Evaluation takes the first 40 non-overlapping windows of 512 tokens, in float32. Perplexity is
exp(mean negative log-likelihood of the 511 predicted tokens of each window); the gap is
log(perplexity) - log(perplexity in full precision).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import arb_hf
from arb_hf import ArbConfig
from arb_hf.evaluate import perplexity
from arb_hf.text import read_text, tokenize

LENGTH = 512
CALIBRATION_WINDOWS = 32
EVALUATION_WINDOWS = 40


@dataclass
class Run:
    """One binarized model and what it reached; a full-precision run has no options."""

    seed: int | None
    perplexity: float
    gap: float
    bits_per_weight: float
    seconds: float
    calibration: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        name = " ".join(f"{key}={value}" for key, value in self.options.items()) or "full precision"
        seed = "" if self.seed is None else f"seed {self.seed} "
        return f"{name:90s} {seed}ppl {self.perplexity:9.2f}  gap {self.gap:6.3f}  bits {self.bits_per_weight:6.3f}  {self.seconds:6.0f} s"


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """``--data FOLDER``, whose two files are there, or argparse says which is not."""
    words = "folder with wiki.valid.raw and wiki.test.raw, the validation and test text of WikiText-2 raw"
    parser.add_argument("--data", required=True, type=_text_folder, help=words)


def _text_folder(name: str) -> Path:
    missing = [file for file in ("wiki.valid.raw", "wiki.test.raw") if not (Path(name) / file).is_file()]
    if missing:
        raise argparse.ArgumentTypeError(f"{name} has no {' and no '.join(missing)}")
    return Path(name)


def calibration_windows(tokens: Tensor, seed: int) -> list[Tensor]:
    """32 windows ``[512]`` at starts drawn by a local generator."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(tokens) - LENGTH, (CALIBRATION_WINDOWS,), generator=generator)
    return [tokens[start : start + LENGTH] for start in starts.tolist()]


def binarize(
    path: str, windows: list[Tensor], seed: int, options: dict[str, Any], dtype: torch.dtype
) -> tuple[Any, float]:
    """The binarized model and the seconds it took."""
    config = ArbConfig(dataset=windows, num_samples=len(windows), sequence_length=LENGTH, seed=seed, **options)
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=dtype).eval()
    return model, time.perf_counter() - start


def calibration_tokens(name: str, data: Path, tokenizer: Any) -> Tensor:
    return tokenize(read_text(data / ("wiki.valid.raw" if name == "wiki" else "c4.calib.jsonl")), tokenizer)


def options_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One set of :class:`ArbConfig` options per method and refinement asked for."""
    extra = {key: json.loads(value) for key, value in (pair.split("=", 1) for pair in arguments.option)}
    return [
        {"method": method, "refinement": refinement, **extra}
        for method in arguments.method
        for refinement in arguments.refinement
    ]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="path of a model, or its name on the Hub")
    add_data_option(parser)
    parser.add_argument("--method", nargs="+", default=["arb-rc"], help="as in ArbConfig, one or more")
    parser.add_argument("--refinement", nargs="+", default=["paper", "full"], help="as in ArbConfig, one or more")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds for choosing the windows")
    parser.add_argument("--calibration", choices=["wiki", "c4"], default="wiki", help="text to calibrate on")
    parser.add_argument(
        "--option",
        nargs="*",
        default=[],
        metavar="KEY=JSON",
        help="more options of ArbConfig, such as scale_dtype='\"int8\"'",
    )
    parser.add_argument(
        "--full-precision", type=float, help="perplexity in full precision, if known from an earlier run"
    )
    parser.add_argument("--threads", type=int, help="number of threads for torch")
    parser.add_argument("--json", type=Path, help="file to append one line of JSON per run to")
    parser.add_argument("--quick", action="store_true", help="4 windows for calibration and evaluation: a smoke test")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    evaluation = tokenize(read_text(arguments.data / "wiki.test.raw"), tokenizer)
    calibration = calibration_tokens(arguments.calibration, arguments.data, tokenizer)
    count = 4 if arguments.quick else EVALUATION_WINDOWS

    def report(run: Run) -> None:
        print(run.line(), flush=True)
        if arguments.json:
            with arguments.json.open("a") as file:
                file.write(json.dumps(asdict(run)) + "\n")

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    full = arguments.full_precision or perplexity(model, evaluation, sequence_length=LENGTH, max_windows=count)
    report(Run(None, full, 0.0, 32.0, 0.0))
    del model
    for options in options_of(arguments):
        for seed in arguments.seeds:
            windows = calibration_windows(calibration, seed)[: 4 if arguments.quick else None]
            model, seconds = binarize(arguments.model, windows, seed, options, torch.float32)
            bits = arb_hf.bits_per_weight(model)
            value = perplexity(arb_hf.dequantize(model), evaluation, sequence_length=LENGTH, max_windows=count)
            gap = math.log(value) - math.log(full)
            report(Run(seed, value, gap, bits, seconds, arguments.calibration, options))
            del model


if __name__ == "__main__":
    main()
