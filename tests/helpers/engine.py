"""Run vLLM's engine on a model: in this process, or ``python -m helpers.engine FOLDER RANKS`` in one of its own.

The run is as exact as vLLM is: float32, and the reference kernel where the packed layers are.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EXACT = {
    "ARB_HF_KERNEL": "reference",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


@contextlib.contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """A ``vllm.LLM`` in this process, which ends with the block; ``EXACT`` must be in the environment."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 4, "seed": 0}
    try:
        yield LLM(str(folder), **(defaults | options))
    finally:
        cleanup_dist_env_and_memory()


def run(llm: Any, prompts: list[list[int]], tokens: int) -> list[dict[str, list]]:
    """The tokens that a greedy run adds to each prompt, and the log probabilities of all tokens after the first."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    results = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], wanted, use_tqdm=False)
    found = []
    for prompt, result in zip(prompts, results, strict=True):
        output = result.outputs[0]
        every = [*zip(prompt, result.prompt_logprobs, strict=True)][1:]
        every += zip(output.token_ids, output.logprobs, strict=True)
        logs = [entry[token].logprob for token, entry in every]
        found.append({"ids": [*prompt, *output.token_ids], "logs": logs})
    return found


def main() -> None:
    folder, ranks = sys.argv[1:]
    request = json.loads(sys.stdin.read())
    with engine(Path(folder), tensor_parallel_size=int(ranks), **request.get("options", {})) as llm:
        answer = run(llm, request["prompts"], request["tokens"])
    print(f"\nANSWER {json.dumps(answer)}")


if __name__ == "__main__":
    main()
