"""Shared pieces: offline hub, one thread count, tiny models and tokenizers, fresh processes."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from arb_hf.kernels import ops

DATA = Path(__file__).parent / "data"
VOCABULARY = 128


def llama(layers: int = 2, **options) -> LlamaForCausalLM:
    """A tiny random LLaMA with grouped-query attention and awkward sizes."""
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 96,
        "intermediate_size": 168,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**(defaults | options))).eval()


def token_samples(count: int = 8, length: int = 48, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for _ in range(count)]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, ``w0`` to ``w126``, that needs no download."""
    vocabulary = {"<unk>": 0} | {f"w{i}": i + 1 for i in range(VOCABULARY - 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")


def words(count: int) -> str:
    return " ".join(f"w{(i * i) % 127}" for i in range(count))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Folder of a tiny dense model and its tokenizer."""
    folder = tmp_path_factory.mktemp("dense")
    llama().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run Python code in a new process from this checkout; its output is captured."""
    variables = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=300)


@pytest.fixture
def exact_kernel(monkeypatch):
    """Equality with dense weights is a matter of the reference kernel; the fast ones round more."""
    monkeypatch.setenv(ops.VARIABLE, "reference")
    ops.kernel_for.cache_clear()
    yield
    ops.kernel_for.cache_clear()


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """Folder of the model of :mod:`tiny`, which imports this module."""
    import tiny

    folder = tmp_path_factory.mktemp("model")
    tiny.save_model(folder)
    return folder
