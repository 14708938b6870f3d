"""Speed of a run with two processes against one.

    python examples/benchmarks/processes.py [--quick] [--hidden 1024] [--layers 3] [--rounds 3]

A random LLaMA-shaped checkpoint is binarized in turn by one process and by two, of one thread each, with `accelerate`'s
environment variables and gloo. Each round prints the ratio of wall times, which needs two idle cores, and the ratio of CPU
times (of the one process to the busier of the two), which does not. Both are taken from after loading to the end of the
run.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from memory import shape, write_checkpoint


def child(folder: str, samples: int, iterations: int) -> None:
    """One process: binarizes and prints its wall and CPU seconds, and the mean output error per layer."""
    from transformers import AutoModelForCausalLM

    from arb_hf import ArbConfig
    from arb_hf.calibrate.model import binarize_model

    torch.set_num_threads(1)
    tokens = torch.randint(0, 4096, (samples, 256), generator=torch.Generator().manual_seed(0))
    config = ArbConfig(dataset=tokens, refinement="paper", iterations=iterations)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wall, cpu = time.perf_counter(), time.process_time()
    report = binarize_model(model, config, ["lm_head"])
    layers: dict[int, list[float]] = {}
    for each in report.matrices:
        layers.setdefault(each.layer, []).append(each.solve.output_error or 0.0)
    errors = [statistics.mean(each) for each in layers.values()]
    print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, errors]))


def run(command: list[str], count: int) -> list[tuple[float, float, list[float]]]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        variables | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "RANK": str(i), "LOCAL_RANK": str(i)}
        for i in range(count)
    ]
    started = [subprocess.Popen(command, env=each, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for each in ranks]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("a process failed")
    return [json.loads(out.splitlines()[-1]) for out in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size")
    parser.add_argument("--layers", type=int, default=3, help="number of decoder layers")
    parser.add_argument("--samples", type=int, default=32, help="number of calibration samples")
    parser.add_argument("--iterations", type=int, default=15, help="rounds of refinement")
    parser.add_argument("--rounds", type=int, default=3, help="how often to repeat the comparison")
    parser.add_argument("--quick", action="store_true", help="one round of two layers of hidden size 256")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.samples, options.iterations)
        return
    if options.quick:
        options.hidden, options.layers, options.rounds = 256, 2, 1
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(shape(options.layers, options.hidden), Path(folder))
        command = [sys.executable, __file__, "--child", folder, "--samples", str(options.samples)]
        command += ["--iterations", str(options.iterations)]
        for number in range(options.rounds):
            (one,), two = run(command, 1), run(command, 2)
            wall, cpu = one[0] / max(each[0] for each in two), one[1] / max(each[1] for each in two)
            apart = max(abs(a - b) / a for a, b in zip(one[2], two[0][2], strict=True))
            ratios.append((wall, cpu))
            print(
                f"round {number}: wall {one[0]:.1f} s / {max(each[0] for each in two):.1f} s = {wall:.2f} x, "
                f"CPU {one[1]:.1f} s / {max(each[1] for each in two):.1f} s = {cpu:.2f} x, "
                f"errors per layer within {apart:.1e} relative",
                flush=True,
            )
    print(
        f"median: wall {statistics.median(r[0] for r in ratios):.2f} x, CPU {statistics.median(r[1] for r in ratios):.2f} x"
    )


if __name__ == "__main__":
    main()
