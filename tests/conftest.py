"""Fixtures that tests in several folders use."""

from helpers import tiny  # the first import: it takes the Hub away before transformers is imported

# isort: split
from pathlib import Path

import pytest

import arb_hf
from arb_hf.kernels import ops
from helpers.byte_model import save_packed
from helpers.models import llama, word_tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Folder of a tiny dense model and its tokenizer."""
    folder = tmp_path_factory.mktemp("dense")
    llama().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """Folder of the model of :mod:`helpers.tiny`."""
    folder = tmp_path_factory.mktemp("model")
    tiny.save_model(folder)
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """Folder of the packed model of :mod:`helpers.byte_model`."""
    return save_packed(tmp_path_factory.mktemp("byte-model"))


@pytest.fixture
def model(packed):
    """The model of ``packed``, loaded anew."""
    return arb_hf.from_pretrained(packed)


@pytest.fixture
def exact_kernel(monkeypatch):
    """Equality with dense weights is a matter of the reference kernel; the fast ones round more."""
    monkeypatch.setenv(ops.VARIABLE, "reference")
    ops.kernel_for.cache_clear()
    yield
    ops.kernel_for.cache_clear()
