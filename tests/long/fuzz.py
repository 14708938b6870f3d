"""Tries damaged checkpoints for as long as it is told, in processes of their own; ``make fuzz`` runs it.

    python tests/long/fuzz.py --seconds 300 --seed 0

Prints how many were tried, how often each kind of refusal came, and every finding: an error of another type, a crash, more
than 4 GiB of memory, more than a minute. The exit code is 1 if there are findings.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from random import Random

TESTS = Path(__file__).parents[1]
MEMORY, PATIENCE = 4 << 30, 60  # bytes of address space beyond what importing takes; seconds


def work(seed: int, stop: float) -> None:
    """Try seeds from ``seed`` on until ``stop``; one JSON line before and after each."""
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging

    from helpers.damage import damage, inspection, outcome

    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with tempfile.TemporaryDirectory() as temporary:
        while time.time() < stop:
            done = damage(Random(seed), Path(temporary) / "model")
            print(json.dumps({"seed": seed, "damage": done}), flush=True)
            signal.alarm(PATIENCE)
            for look in (outcome, inspection):
                try:
                    result = {"kind": look(Path(temporary) / "model")}
                except Exception as error:
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    said = f"{type(error).__name__}: {str(error)[:300]} ({where.filename}:{where.lineno})"
                    result = {"finding": f"{look.__name__}: {said}"}
                print(json.dumps(result), flush=True)
            signal.alarm(0)
            seed += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        work(args.seed, args.worker)
        return 0
    start, seed, tried, crashes = time.time(), args.seed, 0, 0
    kinds: collections.Counter[str] = collections.Counter()
    findings: list[str] = []
    last: dict[str, object] = {}
    while time.time() < start + args.seconds:
        command = [sys.executable, __file__, "--seed", str(seed), "--worker", str(start + args.seconds)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                message = json.loads(line)
                if "seed" in message:
                    last, tried = message, tried + 1
                elif "finding" in message:
                    findings.append(f"seed {last['seed']}, {last['damage']}: {message['finding']}")
                else:
                    kinds[message["kind"]] += 1
        if process.returncode:
            crashes += 1
            findings.append(
                f"seed {last.get('seed')}, {last.get('damage')}: the process ended with {process.returncode}"
            )
        seed = int(str(last.get("seed", seed))) + 1
    print(f"{tried} damaged checkpoints in {time.time() - start:.0f} s, each loaded and inspected")
    for kind, count in kinds.most_common():
        print(f"{count:>8}  {kind}")
    print(f"{len(findings)} findings, {crashes} crashes")
    print("\n".join(findings))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
