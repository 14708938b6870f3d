"""Time of binarizing a whole model, stage by stage, and its peak memory.

    python examples/benchmarks/model.py --model MODEL --data FOLDER [--refinement paper] [--threads 2] [--json FILE]

Text and windows are those of ``protocol.py`` (32 windows of 512 tokens). Times are wall seconds, so the machine must be
idle. The stages are **forward**, the passes through the decoder layers, one to see the input of every linear layer and one
through the binary weights; **H**, sums of X^T X; **factor**, Cholesky factors of the inverse; **search**, salient columns
and groups; **update**, scales, means and signs (with ``refinement="full"``: all of its steps); and **rest**, the other work
of binarizing: carrying errors on, packing, measuring the output error. The sum of search and update is also printed
relative to forward.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from protocol import LENGTH, add_data_option, calibration_tokens, calibration_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

from arb_hf import ArbConfig
from arb_hf.binarize import matrix
from arb_hf.binarize.paper import driver
from arb_hf.calibrate import hessians, layer, matrices

# Where each stage is entered from; none of them is inside another.
ENTRIES: list[tuple[str, Any, str]] = [
    ("forward, inputs", hessians, "run_layer"),
    ("forward, binary", layer, "run_layer"),
    ("H", hessians.Moment, "add"),
    ("factor", matrices, "factorize"),
    ("search", driver, "_partition"),
    ("update", driver, "_binarize_block"),
    ("update", matrix, "binarize_full"),
]


@contextlib.contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Adds the wall seconds of every entry to its stage; ``H`` happens inside the first forward pass.

    Where matrices are binarized side by side, a worker's seconds count by its share of the threads.
    """
    threads, lock = torch.get_num_threads(), threading.Lock()

    def watch(stage: str, work: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                share = torch.get_num_threads() / threads  # less than 1 in one of several worker threads
                with lock:
                    seconds[stage] = seconds.get(stage, 0.0) + (time.perf_counter() - start) * share

        return watched

    with contextlib.ExitStack() as stack:
        for stage, owner, name in ENTRIES:
            stack.enter_context(mock.patch.object(owner, name, watch(stage, getattr(owner, name))))
        yield
    seconds["forward, inputs"] -= seconds["H"]


def peak_memory() -> int:
    """Bytes, of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="path of a model, or its name on the Hub")
    add_data_option(parser)
    parser.add_argument("--method", default="arb-rc", help="as in ArbConfig")
    parser.add_argument("--refinement", default="paper", help="as in ArbConfig")
    parser.add_argument("--tune-steps", type=int, default=0, help="steps of tuning, with --refinement full only")
    parser.add_argument("--batch-size", type=int, default=4, help="calibration windows per forward pass")
    parser.add_argument("--threads", type=int, default=2, help="number of threads for torch")
    parser.add_argument("--quick", action="store_true", help="2 windows and one iteration: a smoke test")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokens = calibration_tokens("wiki", arguments.data, AutoTokenizer.from_pretrained(arguments.model))
    windows = calibration_windows(tokens, 0)[: 2 if arguments.quick else None]
    config = ArbConfig(
        method=arguments.method,
        refinement=arguments.refinement,
        tune_steps=arguments.tune_steps,
        iterations=1 if arguments.quick and arguments.refinement == "paper" else 15,
        dataset=windows,
        num_samples=len(windows),
        sequence_length=LENGTH,
        batch_size=arguments.batch_size,
    )
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    with timed(seconds):
        model = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=config, dtype=torch.float32)
    total = time.perf_counter() - start
    stages = model.arb_report.stages
    found = {"load and dispatch": total - sum(stages.values()), "capture": stages["capture"]} | seconds
    found["rest"] = total - sum(found.values())
    for name, value in found.items():
        print(f"{name:20s} {value:7.1f} s  {value / total:5.1%}")
    forward = seconds["forward, inputs"] + seconds["forward, binary"]
    own = seconds.get("search", 0.0) + seconds["update"]
    memory = peak_memory()
    print(f"{'all':20s} {total:7.1f} s, {arguments.threads} threads, peak memory {memory / 1e6:.0f} MB")
    print(f"search + update: {own:.1f} s, {own / forward:.2f} x the two forward passes ({forward:.1f} s)")
    if arguments.json:
        record = {"seconds": found, "total": total, "threads": arguments.threads, "peak_bytes": memory}
        record |= {"method": arguments.method, "refinement": arguments.refinement, "windows": len(windows)}
        arguments.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
