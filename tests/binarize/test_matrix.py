"""Edges of the published mathematics: every shape, degenerate weights and Hessians, what is refused."""

from functools import partial

import pytest
import torch

from arb_hf import ArbCalibrationError, ArbConfig, binarize_weight
from arb_hf.binarize import BinarizeOptions, binarize_and_record
from arb_hf.binarize.hessian import factorize

METHODS = ["arb-rc", "arb-x", "arb", "billm"]
published = partial(BinarizeOptions, refinement="paper")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian_of(size: int, tokens: int = 400, seed: int = 1) -> torch.Tensor:
    inputs = random(tokens, size, seed=seed)
    return 2 * inputs.T @ inputs


def error(binary, weight: torch.Tensor) -> float:
    return ((binary.dequantize() - weight).square().sum() / weight.square().sum()).item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("metric", ["hessian", "magnitude"])
@pytest.mark.parametrize(("groups", "columns"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("shape", [(8, 200), (3, 33), (1, 128), (16, 1), (5, 2), (1, 1), (40, 130)])
def test_every_form_and_shape(method, metric, groups, columns, shape):
    options = published(method, salient_metric=metric, group_bitmap=groups, column_group_bitmap=columns, iterations=3)
    weight = random(*shape)
    binary = binarize_weight(weight, hessian_of(shape[1]), options)
    dense = binary.dequantize()
    assert binary.shape == tuple(dense.shape) == shape
    assert torch.isfinite(dense).all()
    assert error(binary, weight) < 0.9
    assert binary.signs.unique().tolist() in ([-1, 0, 1], [-1, 1], [-1], [1], [0], [0, 1], [-1, 0])
    assert (binary.groups is not None) == groups


@pytest.mark.parametrize("method", METHODS)
def test_more_structure_costs_less_error(method):
    weight, hessian = random(64, 256), hessian_of(256)
    factor = factorize(hessian, 256, 0.01)
    errors = []
    for groups, columns in ((False, False), (True, False), (True, True)):
        options = published(method, group_bitmap=groups, column_group_bitmap=columns)
        errors.append(binarize_and_record(weight, hessian, factor, options)[1].output_error)
    assert errors[0] > 1.5 * max(errors[1:])
    if method != "arb-x":  # its column groups are chosen by squared error, and refitted to the output error
        assert errors[1] > errors[2]


@pytest.mark.parametrize("method", METHODS)
def test_zero_matrix_stays_zero(method):
    binary = binarize_weight(torch.zeros(6, 140), hessian_of(140), published(method=method))
    assert binary.dequantize().abs().max() == 0
    assert binary.rounded().dequantize().abs().max() == 0


@pytest.mark.parametrize("method", METHODS)
def test_dead_columns_become_zero_and_harm_nothing(method):
    weight, hessian = random(32, 160), hessian_of(160)
    dead = torch.zeros(160, dtype=torch.bool)
    dead[[0, 77, 159]] = True
    hessian[dead] = 0
    hessian[:, dead] = 0
    binary = binarize_weight(weight, hessian, published(method=method))
    assert torch.isfinite(binary.dequantize()).all()
    alive = weight.clone()
    alive[:, dead] = 0
    assert error(binary, alive) < 0.6
    if method == "arb-rc":
        assert binary.rounded().dequantize()[:, dead].abs().max() == 0


@pytest.mark.parametrize("method", METHODS)
def test_constant_rows(method):
    weight = random(16, 128)
    weight[3], weight[4] = 0.5, -0.25
    dense = binarize_weight(weight, hessian_of(128), published(method=method)).dequantize()
    assert torch.isfinite(dense).all()


def test_exact_zeros_are_stored_as_a_sign():
    weight = random(16, 128)
    weight[:, ::9] = 0
    weight[2, :40] = 0
    binary = binarize_weight(weight, hessian_of(128), published())
    assert (binary.signs == 0).any()
    assert (binary.rounded().signs != 0).all()
    assert torch.isfinite(binary.rounded().dequantize()).all()


def test_rank_deficient_hessian_climbs_the_damping_ladder():
    hessian = hessian_of(96, tokens=20)
    factor = factorize(hessian, 96, damping=0.0)
    assert factor.damping > 0
    assert not factor.data_free
    options = published(damping=0.0)
    binary, record = binarize_and_record(random(12, 96), hessian, factor, options)
    assert record.damping == factor.damping
    assert torch.isfinite(binary.dequantize()).all()


def test_hopeless_hessian_falls_back_to_no_data():
    hessian = -hessian_of(64)
    factor = factorize(hessian, 64, damping=0.01)
    assert factor.data_free
    weight = random(12, 64)
    binary, record = binarize_and_record(weight, hessian, factor, published())
    assert record.data_free
    assert error(binary, weight) < 0.5
    without = binarize_weight(weight, None, published())
    assert torch.equal(binary.dequantize(), without.dequantize())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_input_is_refused(bad):
    weight, hessian = random(4, 64), hessian_of(64)
    weight[2, 5] = bad
    with pytest.raises(ArbCalibrationError, match="weight is not finite: 1 of 256"):
        binarize_weight(weight, hessian, published())
    hessian[1, 1] = bad
    with pytest.raises(ArbCalibrationError, match="Hessian is not finite"):
        binarize_weight(random(4, 64), hessian, published())


def test_wrong_shapes_are_refused():
    with pytest.raises(ArbCalibrationError, match=r"\[32, 32\].*\[64, 64\]"):
        binarize_weight(random(4, 64), hessian_of(32), published())
    with pytest.raises(ArbCalibrationError, match="two dimensions"):
        binarize_weight(random(4, 4, 4), None, published())


def test_takes_a_config_and_leaves_inputs_alone():
    weight, hessian = random(8, 96).to(torch.bfloat16), hessian_of(96)
    copies = weight.clone(), hessian.clone()
    binary = binarize_weight(weight, hessian, ArbConfig(method="arb-x", block_size=64))
    assert binary.form.blocks == 2
    assert torch.equal(weight, copies[0])
    assert torch.equal(hessian, copies[1])


def test_same_input_same_bits():
    weight, hessian = random(48, 256), hessian_of(256)
    state = torch.random.get_rng_state()
    first, second = (binarize_weight(weight, hessian, published()) for _ in range(2))
    assert torch.equal(first.dequantize(), second.dequantize())
    assert torch.equal(torch.random.get_rng_state(), state)
