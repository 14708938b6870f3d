"""Every exported C function under AddressSanitizer and UBSan, on random and hostile shapes and values; ``make asan``.

    python tests/long/asan.py --seconds 300 --seed 0

Builds arb_hf/csrc with the compiler's sanitizers into a temporary folder and calls it as the package does, from Python with
the sanitizer's runtime loaded first: torch's tensors then have guarded ends. The first finding ends the run with exit
code 1 and the sanitizer's report; otherwise the calls of each function are printed.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "arb_hf" / "csrc"
FLAGS = ("-std=gnu11", "-O1", "-g", "-fno-omit-frame-pointer", "-ffp-contract=off", "-fopenmp", "-fPIC")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SPECIAL = (0.0, -0.0, 1e-45, 1e-30, 1e30, 3e38, -3e38, float("inf"), float("-inf"), float("nan"))


def exports() -> set[str]:
    """Names of the C functions that the library shows."""
    return set(re.findall(r"ARB_EXPORT \w+ (\w+)\(", "".join(path.read_text() for path in SOURCES.glob("*.c"))))


class Counting:
    """The library, which notes how often each function was asked for."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.calls = library, collections.Counter[str]()

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += 1
        return getattr(self.library, name)


def drive(path: str, seconds: float, seed: int) -> None:
    """Call everything until the time is over."""
    sys.path.insert(0, str(ROOT))
    import torch

    from arb_hf import native

    library = Counting(ctypes.CDLL(path))
    native.library = lambda: library  # type: ignore[assignment, return-value]
    stop, count = time.time() + seconds, 0
    while time.time() < stop:
        random = Random(seed + count)
        torch.manual_seed(seed + count)
        torch.set_num_threads(random.choice((1, 2, 3)))
        isa = random.randrange(library.arb_cpu_isa() + 1)
        native.isa = lambda isa=isa: isa  # type: ignore[assignment]
        print(f"seed {seed + count}", file=sys.stderr, flush=True)
        random.choice((kernels, kernels, kernels, searches, updates, matrices))(random, torch)
        count += 1
    missing = exports() - library.calls.keys()
    print(f"{count} rounds in {seconds:.0f} s under AddressSanitizer and UBSan, findings 0")
    for name, calls in sorted(library.calls.items()):
        print(f"{calls:>9}  {name}")
    if missing:
        raise SystemExit(f"never called: {', '.join(sorted(missing))}")


def overflow(path: str) -> None:
    """What the sanitizer must find: a tensor read past its end by one number."""
    import torch

    values = torch.ones(5)
    ctypes.CDLL(path).arb_sort_magnitudes(
        ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(6), ctypes.c_void_p(values.data_ptr())
    )


def build(compiler: str, folder: Path) -> str:
    """Path of the library with sanitizers."""

    def compiled(source: Path) -> str:
        result = str(folder / f"{source.stem}.o")
        subprocess.run([compiler, *FLAGS, *SANITIZERS, "-c", str(source), "-o", result], check=True)
        return result

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sorted(SOURCES.glob("*.c"))))
    library = str(folder / "sanitized.so")
    subprocess.run([compiler, *FLAGS, *SANITIZERS, "-shared", *objects, "-o", library, "-lm"], check=True)
    return library


def matrix(random: Random, torch: Any, *shape: int) -> Any:
    """Random numbers, some matrices with special ones, some constant."""
    values = torch.randn(*shape) * 10.0 ** random.choice((0, 0, 0, -20, 20))
    kind = random.random()
    if kind < 0.2:
        for value in random.choices(SPECIAL, k=3):
            values[torch.rand(*shape) < 0.1] = value
    elif kind < 0.3:
        values.fill_(random.choice(SPECIAL))
    return values


def kernels(random: Random, torch: Any) -> None:
    """The matmul and its transpose: any form, planes of any bits, a bitmap that may disagree with the count."""
    from arb_hf.errors import ArbFormatError
    from arb_hf.format.form import SCALE_DTYPES, BinaryForm
    from arb_hf.kernels import cpu

    n, m = random.choice((1, 2, 15, 16, 17, 33, 130, 500)), random.choice((1, 7, 8, 9, 31, 32, 33, 127, 129, 300, 700))
    block, share = 32 * random.choice((1, 2, 4, 5, 40)), random.choice((0.0, 0.05, 0.5, 1.0))
    groups = random.choice((1, 2))
    salient = torch.rand(m) < share
    claimed = int(salient.sum()) if random.random() < 0.8 else random.randrange(m + 1)
    stored = groups, random.randint(1, groups), random.random() < 0.5, random.choice(sorted(SCALE_DTYPES))
    form = BinaryForm(n, m, claimed, block, *stored)
    tensors = {}
    for name, (shape, dtype) in form.tensors().items():
        if dtype.is_floating_point:
            tensors[name] = matrix(random, torch, *shape).to(dtype)
        else:
            limits = torch.iinfo(dtype)
            tensors[name] = torch.randint(limits.min, limits.max + 1, shape).to(dtype)
    padded = torch.zeros(-(-m // 8) * 8, dtype=torch.uint8)
    padded[:m] = salient.to(torch.uint8)
    padded[m:] = random.randint(0, 1)
    tensors["salient_columns"] = (padded.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
    x = matrix(random, torch, random.choice((0, 1, 2, 5, 16, 17)), m).to(random.choice(list(cpu.ACTIVATIONS)))
    gradient = matrix(random, torch, random.choice((1, 3)), n).to(x.dtype)
    cpu.TILE_ROWS = random.choice((1, 16, 48, 480))
    try:
        cpu.linear(x, tensors, form)
        cpu.linear_transposed(gradient, tensors, form)
    except ArbFormatError:
        assert claimed != int(salient.sum())


def searches(random: Random, torch: Any) -> None:
    """The searches for salient columns and thresholds, and the sort."""
    from arb_hf.binarize.paper import compiled

    n, c = random.choice((1, 2, 31, 32, 33, 70)), random.choice((2, 3, 7, 16, 33, 64, 129))
    metric = matrix(random, torch, n, c)
    compiled.salient_errors(metric, random.randint(1, c - 1))
    thresholds = matrix(random, torch, random.choice((1, 2, 81))).abs().sort().values
    if random.random() < 0.1:
        thresholds = thresholds.flip(0)
    compiled.split_errors(metric, thresholds, random.choice((1, 2)))
    ordinary = torch.rand(c) < random.choice((0.0, 0.5, 1.0))
    compiled.output_errors(metric[:, ordinary], thresholds, ordinary, metric[:, ~ordinary], matrix(random, torch, c, c))
    compiled.sort_magnitudes(metric.abs().flatten()[: random.choice((0, 1, 5, n * c))])


def updates(random: Random, torch: Any) -> None:
    """The alternating updates of both methods."""
    from arb_hf.binarize.paper import compiled

    n, c = random.choice((1, 2, 31, 32, 33, 70)), random.choice((1, 2, 7, 33, 64, 129))
    values = matrix(random, torch, n, c)
    member = (torch.rand(n, c) < random.choice((0.0, 0.1, 0.9, 1.0))).float()
    compiled.fit_arb(values, member, random.choice((1, 2)), random.choice((0, 1, 3)))
    compiled.fit_arb_rc(values, member, random.choice((0, 1, 3)))


def matrices(random: Random, torch: Any) -> None:
    """Whole matrices, by every method and refinement."""
    from arb_hf.binarize import BinarizeOptions, binarize_weight
    from arb_hf.binarize.methods import METHODS
    from arb_hf.binarize.options import REFINEMENTS

    n, m = random.choice((1, 3, 33, 130)), random.choice((1, 2, 31, 33, 65, 150))
    inputs = torch.randn(2 * m, m)
    options = BinarizeOptions(
        method=random.choice(tuple(METHODS)), refinement=random.choice(REFINEMENTS), block_size=random.choice((32, 64, 128)),
        group_bitmap=random.random() < 0.7, column_group_bitmap=random.random() < 0.5, iterations=2,
        max_salient_columns=random.choice((1, 2, 20, 200)), salient_metric=random.choice(("hessian", "magnitude")),
        scale_dtype=random.choice(("float32", "float16", "int8")),
    )  # fmt: skip
    weight = torch.randn(n, m) * (torch.rand(n, m) < random.choice((0.1, 1.0)))
    binarize_weight(weight, random.choice((None, inputs.T @ inputs)), options)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--library", help=argparse.SUPPRESS)
    parser.add_argument("--canary", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.canary:
        overflow(args.library)
    elif args.library:
        drive(args.library, args.seconds, args.seed)
    if args.library:
        return 0
    compiler = os.environ.get("CC", "gcc")
    runtime = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout
    with tempfile.TemporaryDirectory() as folder:
        library = build(compiler, Path(folder))
        # Leaks are Python's and torch's at their end; Python's own allocator would hide the ends of small buffers.
        environment = os.environ | {
            "LD_PRELOAD": str(Path(runtime.strip()).resolve()),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONMALLOC": "malloc",
        }
        options = ["--library", library, "--seconds", str(args.seconds), "--seed", str(args.seed)]
        command = [sys.executable, __file__, *options]
        canary = subprocess.run([*command, "--canary"], env=environment, capture_output=True, text=True, check=False)
        if "heap-buffer-overflow" not in canary.stderr:
            print(f"a deliberate overflow was not found: the sanitizer does not work here\n{canary.stderr[-2000:]}")
            return 1
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(done.stderr[-6000:])
        print(f"a finding: exit code {done.returncode}")
    return 1 if done.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
