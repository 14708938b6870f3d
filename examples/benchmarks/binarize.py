"""Speed of finding masks and parameters against the published loops, and the memory that one matrix takes.

    python examples/benchmarks/binarize.py [--quick] [--json FILE]

The peer is ``published_loops.py``. All versions run in turn on the same matrices with one thread, and medians of CPU time are
compared. A ratio of 8.0x means an eighth of the peer's time. "torch" is this package without its C library, "C" with it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import published_loops as published
import torch
from torch import Tensor

from arb_hf import native
from arb_hf.binarize import BinarizeOptions
from arb_hf.binarize.hessian import factorize, saliency
from arb_hf.binarize.matrix import solve
from arb_hf.binarize.paper import arb, arb_rc, arb_x, partition
from arb_hf.binarize.paper.fit import Group

Stage = dict[str, Callable[[], object]]  # version -> what to time
PEER = "published"


def without_library(work: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with mock.patch.object(native, "usable", return_value=False):
            return work()

    return run


def versions(peer: Callable[[], object], ours: Callable[[], object]) -> Stage:
    stage = {PEER: peer, "torch": without_library(ours)}
    return stage | {"C": ours} if native.library() is not None else stage


def random_problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Gaussian weights and the Hessian of inputs with a few strong channels."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    inputs = torch.randn(2 * columns, columns, generator=generator) * (0.1 + torch.rand(columns, generator=generator))
    inputs[:, :: max(1, columns // 24)] *= 3
    return weight, inputs.T @ inputs


def stages(rows: int) -> dict[str, Stage]:
    """Searches and update loops of one block ``[rows, 128]``."""
    weight, hessian = random_problem(rows, 128)
    diagonal = factorize(hessian, 128, 0.01).upper.diagonal()
    metric = saliency(weight, diagonal, "hessian")
    salient = partition.find_salient_columns(metric, 50)
    everywhere = salient.expand_as(metric)
    rest = published.residual_binarization(metric, everywhere, 2)
    plain, left, moment = metric[:, ~salient], (metric - rest)[:, salient], hessian / 2
    large = torch.zeros_like(everywhere)
    large[:, ~salient] = partition.split(plain, partition.quantiles(metric.abs() * ~salient), 1, left, metric)

    def split() -> object:
        return partition.split(plain, partition.quantiles(metric.abs() * ~salient), 1, left, metric)

    def split_by_output() -> object:
        thresholds = partition.quantiles(metric.abs() * ~salient)
        return partition.split_by_output(plain, thresholds, ~salient, left, moment, metric)

    def split_salient() -> object:
        chosen = metric[:, salient]
        return partition.split(chosen, partition.quantiles(chosen), 2, plain, metric)

    searches = {
        "salient search": versions(
            lambda: published.salient_search(metric), lambda: partition.find_salient_columns(metric, 50)
        ),
        "split search": versions(lambda: published.split_search(metric, ~everywhere, 1, rest), split),
        "split search, salient": versions(
            lambda: published.split_search(metric, everywhere, 2, metric * ~salient), split_salient
        ),
        "split search, arb-x": versions(
            lambda: published.split_search(metric, ~everywhere, 1, rest, moment), split_by_output
        ),
    }
    groups = {"order 1": (~everywhere & ~large, ~salient, 1), "order 2": (everywhere, salient, 2)}
    return searches | {
        f"update {method}, {name}": update(weight, *group, method, moment)
        for name, group in groups.items()
        for method in ("arb", "arb-rc", "arb-x")
        if not (method == "arb-x" and rows > 1024)
    }


def update(weight: Tensor, mask: Tensor, columns: Tensor, order: int, method: str, moment: Tensor) -> Stage:
    group = Group(weight, mask.float(), columns, order, 15, moment)
    fits: dict[str, Callable[[], object]] = {
        "arb": lambda: arb.fit(group),
        "arb-rc": lambda: arb_rc.fit(group),
        "arb-x": lambda: arb_x.fit(group),
    }
    return versions(lambda: published.binarize_group(weight, mask, order, method, moment), fits[method])


def methods(rows: int, columns: int) -> dict[str, Stage]:
    """Whole matrices, factor given."""
    weight, hessian = random_problem(rows, columns)
    factor = factorize(hessian, columns, 0.01)

    def one(method: str, column_groups: bool) -> Stage:
        options = BinarizeOptions(method=method, column_group_bitmap=column_groups, refinement="paper")
        return versions(
            lambda: published.binarize(weight, hessian, factor.upper, method, column_groups),
            lambda: solve(weight, hessian, factor, options),
        )

    cases = {"billm": False, "arb": False, "arb-rc": True, "arb-x": False}
    return {f"{method}{' + CGB' * groups}, {rows} x {columns}": one(method, groups) for method, groups in cases.items()}


def measure(stage: Stage, repeats: int) -> dict[str, float]:
    """Median CPU seconds of every version, run in turn."""
    seconds: dict[str, list[float]] = {version: [] for version in stage}
    for _ in range(repeats):
        for version, work in stage.items():
            start = time.process_time()
            work()
            seconds[version].append(time.process_time() - start)
    return {version: statistics.median(times) for version, times in seconds.items()}


MEMORY = """
import re, torch
from pathlib import Path
from arb_hf.binarize import BinarizeOptions, binarize_weight
torch.set_num_threads(1)
def memory(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))
options = BinarizeOptions(method="arb-x", column_group_bitmap=False, refinement="paper")
small = torch.randn(64, 64)
binarize_weight(small, small.T @ small, options)
before = memory("VmRSS")
generator = torch.Generator().manual_seed(0)
weight = torch.randn({size}, {size}, generator=generator)
hessian = torch.zeros({size}, {size})
for _ in range(16):
    inputs = torch.randn({size} // 8, {size}, generator=generator)
    hessian.addmm_(inputs.T, inputs)
del inputs
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
binarize_weight(weight, hessian, options)
print((memory("VmHWM") - before) / (4 * weight.numel()))
"""


def peak_memory(size: int) -> float:
    """Peak growth of a fresh process, from W and H on, in units of the float32 matrix (Linux)."""
    done = subprocess.run([sys.executable, "-c", MEMORY.format(size=size)], check=True, capture_output=True, text=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller matrices, one repeat")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, size, repeats = (512, 192, 1) if arguments.quick else (4096, 576, 5)
    isa = native.ISAS[native.isa()] if native.library() is not None else "none"
    print(f"C library: {isa}; one thread, CPU time, median of {repeats}")
    work = {f"{name}, {rows} x 128": stage for name, stage in stages(rows).items()}
    work |= {f"{name}, 512 x 128": stage for name, stage in stages(512).items() if "update arb-x" in name}
    work |= methods(size, size)
    results = {}
    for name, stage in work.items():
        seconds = results[name] = measure(stage, repeats)
        ours = [f"{version} {seconds[PEER] / value:7.1f}x ({1e3 * value:.1f} ms)" for version, value in seconds.items()]
        print(f"{name:38s} published {1e3 * seconds[PEER]:8.1f} ms   " + "   ".join(ours[1:]), flush=True)
    width = 1024 if arguments.quick else 4096
    memory = peak_memory(width)
    print(f"peak memory, arb-x, {width} x {width}: {memory:.2f} x the float32 matrix (W, H and factor included)")
    if arguments.json:
        record = {"isa": isa, "machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        record |= {"repeats": repeats, "cpu_seconds": results, "peak_memory": {str(width): memory}}
        arguments.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
