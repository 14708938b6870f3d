"""Kill runs at random moments and resume them: every result must be that of the run nobody disturbed.

    python tests/long/kills.py FOLDER [--kills 20] [--seed 0]

Runs are forked from this process, which has imported everything and has a single thread. Half of the kills strike at
a random time, half while a file is being written: before or after the n-th flush to disk. Prints a line a kill.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from arb_hf.calibrate import resume
from helpers import tiny
from helpers.forks import finish, forked


def binarize(model: Path, checkpoint_dir: Path | None, out: Path | None) -> None:
    packed = tiny.binarize(model, checkpoint_dir=checkpoint_dir, seed=1)
    if out is not None:
        packed.save_pretrained(out)


def die_at_flush(number: int, after: bool) -> None:
    """In a child: make the ``number``-th fsync the last thing that happens, before or after it took place."""
    original, calls = os.fsync, iter(range(1, 10**6))

    def fsync(descriptor: int) -> None:
        last = next(calls) == number
        if after or not last:
            original(descriptor)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    resume.os.fsync = fsync


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, expected = options.folder / "model", options.folder / "expected"
    tiny.save_model(model)
    start = time.monotonic()
    assert finish(forked(lambda: binarize(model, None, expected))) == 0
    duration = time.monotonic() - start
    wanted = (expected / "model.safetensors").read_bytes()
    chance = random.Random(options.seed)
    flushes = 2 * (1 + 2 * tiny.LAYERS)  # the file and its folder, for the manifest and two files a layer
    number, shorter = 0, 1.0
    while number < options.kills:
        folder, out = options.folder / f"run-{number}", options.folder / f"out-{number}"
        if number % 2:
            flush, after = chance.randint(1, flushes), chance.random() < 0.5
            moment = f"{'after' if after else 'before'} flush {flush}"
            child = forked(lambda f=folder, n=flush, a=after: (die_at_flush(n, a), binarize(model, f, None)))
        else:
            wait = chance.uniform(0, duration * shorter)
            moment = f"after {wait:.2f} s"
            child = forked(lambda f=folder: binarize(model, f, None))
            time.sleep(wait)
            os.kill(child, signal.SIGKILL)
        if finish(child) != -signal.SIGKILL:  # it was faster: again, earlier
            shutil.rmtree(folder)
            shorter *= 0.8
            continue
        stored = len(list(folder.glob("layer-*.json")))
        status = finish(forked(lambda f=folder, o=out: binarize(model, f, o)))
        equal = status == 0 and (out / "model.safetensors").read_bytes() == wanted
        leftovers = len(list(folder.glob("*.tmp")))
        print(f"kill {number}: {moment}, {stored} layers stored, equal {equal}, leftovers {leftovers}", flush=True)
        if not equal or leftovers:
            sys.exit(1)
        number += 1


if __name__ == "__main__":
    main()
