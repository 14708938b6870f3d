"""Numbers far from ordinary: weights and Hessians of any size, scales their type cannot hold, overflow, determinism."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from arb_hf import ArbCalibrationError, ArbConfig, binarize_weight
from arb_hf.binarize import BinarizeOptions, binarize_and_record
from arb_hf.binarize.hessian import factorize
from arb_hf.binarize.methods import METHODS
from arb_hf.binarize.options import REFINEMENTS
from arb_hf.format.packing import pack
from arb_hf.format.weight import BinaryWeight
from arb_hf.nn import BinaryLinear
from helpers.models import llama, token_samples
from helpers.process import fresh_process

HERE = Path(__file__).parent
POWERS = (2.0**-100, 2.0**-33, 2.0**66, 2.0**100)
FACTORS = (1e-30, 1e-20, 1e-10, 3.0, 1e10, 1e20, 1e30)


def problem(n: int = 24, m: int = 130) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, m, generator=generator)
    return torch.randn(n, m, generator=generator) * 0.03, 2 * inputs.T @ inputs / 8


def options(method: str = "arb-rc", refinement: str = "paper", scale_dtype: str = "float32") -> BinarizeOptions:
    return BinarizeOptions(method, block_size=64, refinement=refinement, scale_dtype=scale_dtype, max_salient_columns=9)


def distance(one: BinaryWeight, other: BinaryWeight, factor: float = 1.0) -> float:
    """Relative, of ``one / factor`` from ``other``."""
    expected = other.dequantize()
    return ((one.dequantize() / factor - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("refinement", REFINEMENTS)
def test_scaled_weights_give_scaled_results(method, refinement):
    weight, hessian = problem()
    chosen = options(method, refinement)
    expected = binarize_weight(weight, hessian, chosen)
    for factor in POWERS:
        assert torch.equal(
            binarize_weight(weight * factor, hessian, chosen).dequantize(), expected.dequantize() * factor
        )
    for factor in FACTORS:  # the product is rounded, and so are the results
        assert distance(binarize_weight(weight * factor, hessian, chosen), expected, factor) < 2e-6, factor


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("refinement", REFINEMENTS)
def test_scaled_hessians_give_the_same_results(method, refinement):
    weight, hessian = problem()
    chosen = options(method, refinement)
    expected = binarize_weight(weight, hessian, chosen)
    for factor in (2.0**-66, 2.0**66):
        assert torch.equal(binarize_weight(weight, hessian * factor, chosen).dequantize(), expected.dequantize())
    for factor in (1e-20, 1e-10, 1e10, 1e20):
        assert distance(binarize_weight(weight, hessian * factor, chosen), expected) < 2e-6, factor


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_errors_of_scaled_weights_are_the_same(factor):
    weight, hessian = problem()
    factor_of = factorize(hessian, 130, 0.01)
    ordinary = binarize_and_record(weight, hessian, factor_of, options())[1]
    scaled = binarize_and_record(weight * factor, hessian, factor_of, options())[1]
    assert scaled.output_error == pytest.approx(ordinary.output_error, rel=1e-5)
    assert scaled.weight_error == pytest.approx(ordinary.weight_error, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
@pytest.mark.parametrize("method", ["arb-rc", "arb"])
def test_scales_are_stored_soundly_or_refused(method, dtype):
    """Of 20 orders of magnitude float16 and int8 (whose steps are float16) hold some, the others all."""
    weight, hessian = problem()
    factor_of = factorize(hessian, 130, 0.01)
    chosen = options(method, scale_dtype=dtype)
    stored, refused = {}, {}
    for exponent in range(-30, 31, 2):
        try:
            stored[exponent] = binarize_and_record(weight * 10.0**exponent, hessian, factor_of, chosen)[1].output_error
        except ArbCalibrationError as error:
            refused[exponent] = str(error)
    for exponent, message in refused.items():
        assert ("and the smallest" if exponent < 0 else "scales end at 6.55e+04") in message
        assert 'scale_dtype="float32" or "bfloat16"' in message
    assert max(stored.values()) < 1.2 * min(stored.values())
    if dtype in ("float16", "int8"):
        assert -6 < min(stored) <= -2 and 4 <= max(stored) <= 6
    else:
        assert list(stored) == list(range(-30, 31, 2))


def test_packing_refuses_what_it_cannot_store():
    weight, hessian = problem()
    binary = binarize_weight(weight * 1e10, hessian, options(scale_dtype="float16"))
    for store in (pack, BinaryLinear.from_binary_weight):
        with pytest.raises(ArbCalibrationError, match=r"its scales reach .*, but float16 scales end at 6.55e\+04"):
            store(binary)


def test_the_refusal_names_the_layer(tmp_path):
    model = llama(1)
    model.model.layers[0].mlp.up_proj.weight.data *= 1e-8
    model.model.layers[0].mlp.down_proj.weight.data *= 1e8  # the function stays what it was
    model.save_pretrained(tmp_path)
    chosen = {"dataset": token_samples(), "refinement": "paper", "iterations": 2}
    with pytest.raises(ArbCalibrationError, match=r"^model\.layers\.0\.mlp\.up_proj: its scales are at most .*float16"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=ArbConfig(**chosen), dtype=torch.float32)
    config = ArbConfig(**chosen, scale_dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    errors = {each.kind: each.solve.output_error for each in model.arb_report.matrices}
    assert 0 < errors["mlp.up_proj"] < 0.5 and 0 < errors["mlp.down_proj"] < 0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("refinement", REFINEMENTS)
@pytest.mark.parametrize("part", [slice(0, 64), slice(64, 128), slice(128, 130), slice(0, 130)])
def test_a_zero_block_of_the_hessian(method, refinement, part):
    """Columns that no calibration input reached become 0, and the others are binarized as if they were alone."""
    weight, hessian = problem()
    hessian[part], hessian[:, part] = 0, 0
    binary, record = binarize_and_record(weight, hessian, factorize(hessian, 130, 0.01), options(method, refinement))
    dense = binary.rounded().dequantize()
    assert dense.isfinite().all()
    assert record.dead_columns == part.stop - part.start
    assert not dense[:, part].abs().max() > 1e-6 * weight.abs().max()
    assert record.output_error < 0.25


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_not_finite(tmp_path, value):
    model = llama(2)
    model.model.layers[1].input_layernorm.weight.data[7] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ArbCalibrationError, match=r"^model\.layers\.1\.self_attn\.[qkv]_proj: the Hessian is not finite"
    ):
        AutoModelForCausalLM.from_pretrained(
            tmp_path,
            quantization_config=ArbConfig(dataset=token_samples(), refinement="paper", iterations=2),
            dtype=torch.float32,
        )


def test_overflow_in_a_float16_model(tmp_path):
    model = llama(2)
    model.model.layers[0].mlp.down_proj.weight.data *= 3e5
    model.model.layers[0].mlp.up_proj.weight.data *= 100
    model.half().save_pretrained(tmp_path)
    chosen = ArbConfig(dataset=token_samples(), refinement="paper", iterations=2)
    with pytest.raises(
        ArbCalibrationError, match=r"decoder layer 0 gives NaN or infinite activations in torch\.float16"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=chosen, dtype=torch.float16)


DIGEST = """
import hashlib, sys, torch
torch.set_num_threads(int(sys.argv[1]))
from test_numbers import options, problem
from arb_hf import binarize_weight
digest = hashlib.sha256()
weight, hessian = problem(96, 300)
for method in ("arb-rc", "arb-x", "arb", "billm"):
    for refinement in ("paper", "full"):
        digest.update(binarize_weight(weight, hessian, options(method, refinement)).dequantize().numpy().tobytes())
print(digest.hexdigest())
"""


def test_runs_in_other_processes_give_the_same_bits():
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); sys.argv[1:] = ['2']\n" + DIGEST
    first, second = (fresh_process(code).stdout.strip() for _ in range(2))
    assert len(first) == 64 and first == second


@pytest.mark.parametrize("refinement", REFINEMENTS)
def test_other_numbers_of_threads_give_the_same_quality(refinement):
    """Not the same bits: the last ones of a Cholesky factor depend on how many threads share the work."""
    weight, hessian = problem(96, 300)
    before, found = torch.get_num_threads(), {}
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            for _ in range(2):
                factor = factorize(hessian, 300, 0.01)
                binary, record = binarize_and_record(weight, hessian, factor, options("arb-rc", refinement))
                bits = (binary.dequantize(), record.output_error)
                assert torch.equal(found.setdefault(threads, bits)[0], bits[0])
    finally:
        torch.set_num_threads(before)
    assert all(error == pytest.approx(found[1][1], rel=1e-2) for _, error in found.values())
