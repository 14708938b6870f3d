"""Tokens per second of a packed model in vLLM, against the dense model in bf16, at several batch sizes.

    python examples/benchmarks/serving.py --packed ./packed --dense MODEL [--threads 2] [--json FILE]

Needs vLLM and arb_hf in one environment (README, "Serving with vLLM"). Every measurement is a process of its own: the
engine starts, generates once to warm up, then ``--tokens`` tokens for each of the batch's requests, without stopping early.
The two models take turns and the best of ``--repeats`` counts, so that other load on the machine affects both alike.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

BATCHES = (1, 4, 16, 64)
PROMPT = list(range(100, 131))  # after a token of each request's own
MEASURE = """
import json, sys, time
from vllm import LLM, SamplingParams
folder, batches, tokens, prompt, eager = json.loads(sys.argv[1])
llm = LLM(folder, dtype="bfloat16", enforce_eager=eager, max_model_len=512, max_num_seqs=max(batches),
          enable_prefix_caching=False, seed=0)
speeds = {}
for batch in batches:
    requests = [{"prompt_token_ids": [first, *prompt]} for first in range(1, 1 + batch)]
    for count in (4, tokens):  # the first is to warm up
        wanted = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        start = time.perf_counter()
        llm.generate(requests, wanted, use_tqdm=False)
        seconds = time.perf_counter() - start
    speeds[batch] = batch * tokens / seconds
print("SPEEDS", json.dumps(speeds))
"""


def measure(folder: str, batches: list[int], tokens: int, threads: int, eager: bool) -> dict[int, float]:
    """Tokens per second by batch size, from a fresh process."""
    variables = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": str(threads)}
    variables |= {"VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}" if threads > 1 else "0"}
    request = json.dumps([folder, batches, tokens, PROMPT, eager])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, request], env=os.environ | variables, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("SPEEDS ")]
    if not lines:
        sys.exit(f"vLLM did not run {folder}:\n{done.stderr[-2000:]}")
    return {int(batch): speed for batch, speed in json.loads(lines[0].removeprefix("SPEEDS ")).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", required=True, help="folder of the packed model")
    parser.add_argument("--dense", help="the model it was made from; without it the packed one is measured alone")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="requests at a time")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate for each request")
    parser.add_argument("--repeats", type=int, default=3, help="measurements, of which the best counts")
    parser.add_argument("--threads", type=int, default=2, help="threads of the engine on a CPU")
    parser.add_argument("--compile", action="store_true", help="with torch.compile, which takes minutes to start")
    parser.add_argument("--quick", action="store_true", help="batches 1 and 4, 8 tokens, once: a smoke test")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    batches, tokens, repeats = list(arguments.batches), arguments.tokens, arguments.repeats
    if arguments.quick:
        batches, tokens, repeats = [1, 4], 8, 1
    folders = {"packed": arguments.packed} | ({"dense bf16": arguments.dense} if arguments.dense else {})
    best = {name: dict.fromkeys(batches, 0.0) for name in folders}
    for _ in range(repeats):
        for name, folder in folders.items():
            speeds = measure(folder, batches, tokens, arguments.threads, not arguments.compile)
            best[name] = {batch: max(best[name][batch], speeds[batch]) for batch in batches}
    print(f"tokens per second, {arguments.threads} threads\n\n| batch | {' | '.join(folders)} |")
    print("|---" * (len(folders) + 1) + "|")
    for batch in batches:
        print(f"| {batch} | {' | '.join(f'{best[name][batch]:.1f}' for name in folders)} |")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"threads": arguments.threads, "tokens": tokens, "speeds": best}, indent=1)
        )


if __name__ == "__main__":
    main()
