"""`refinement="full"`: every step lowers the objective it claims to lower, and the whole beats `"paper"`."""

import itertools
from dataclasses import replace

import pytest
import torch

from arb_hf import native
from arb_hf.binarize import BinarizeOptions, binarize_and_record, binarize_weight
from arb_hf.binarize.full.driver import assemble, choose_salient_columns
from arb_hf.binarize.full.steps import (
    descend_codes,
    exact_compensation,
    fit_columns,
    fit_rows,
    nearest_codes,
    round_scales,
    round_with_feedback,
    start,
)
from arb_hf.binarize.hessian import damped, factorize
from arb_hf.format.packing import pack, unpack
from arb_hf.nn import BinaryLinear

FORMS = [
    pytest.param({"method": method, "group_bitmap": groups, "column_group_bitmap": columns}, id=f"{method}-{name}")
    for method in ("arb-rc", "arb-x")
    for groups, columns, name in ((True, True, "cgb"), (True, False, "groups"), (False, False, "one group"))
]


def problem(n=40, m=160, seed=0):
    """A heavy-tailed weight and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    weight = normal(n, m) * normal(n, 1).exp() ** 0.5 * normal(1, m).exp() ** 0.3
    inputs = normal(400, m) @ (torch.eye(m) + 0.3 * normal(m, m) / m**0.5) * normal(m).exp() ** 0.7
    return weight, inputs.T @ inputs


def coded(options, k=128, seed=0):
    """A block ``[k, n]`` with its first codes, its values and H."""
    weight, hessian = problem(m=k, seed=seed)
    salient = torch.zeros(k, dtype=torch.bool)
    salient[::9] = True
    form = BinarizeOptions(**({"scale_dtype": "float16"} | options)).form(len(weight), k, int(salient.sum()))
    values = weight.T.contiguous()
    return start(values, salient, form), values, hessian


def lost(block, values, hessian):
    difference = values - block.values()
    return ((hessian @ difference) * difference).sum(0).double()


def total(block, values, hessian):
    return lost(block, values, hessian).sum().item()


@pytest.mark.parametrize("options", FORMS)
class TestSteps:
    def test_nearest_codes_lower_every_weights_error(self, options):
        block, values, _ = coded(options)
        other = replace(block, codes=block.codes.roll(1, 1))
        error = (nearest_codes(other, values).values() - values).abs()
        assert (error <= (other.values() - values).abs() + 1e-6).all()

    def test_fit_rows_lowers_every_rows_output_error(self, options):
        block, values, hessian = coded(options)
        before, after = lost(block, values, hessian), lost(fit_rows(block, values, hessian), values, hessian)
        assert (after <= before * (1 + 1e-4)).all()
        assert after.sum() < 0.99 * before.sum()

    def test_fit_rows_without_hessian_lowers_the_weight_error(self, options):
        block, values, _ = coded(options)
        eye = torch.eye(len(values))
        assert total(fit_rows(block, values, None), values, eye) < total(block, values, eye)

    def test_fit_rows_is_a_minimum(self, options):
        block, values, hessian = coded(options)
        fitted = fit_rows(fit_rows(block, values, hessian), values, hessian)
        best = total(fitted, values, hessian)
        for slot in range(len(block.rows)):
            for factor in (0.98, 1.02):
                rows = fitted.rows.clone()
                rows[slot] *= factor
                assert total(replace(fitted, rows=rows), values, hessian) > best * (1 - 1e-5)

    @pytest.mark.parametrize("under_hessian", [True, False])
    def test_fit_columns_lowers_the_output_error(self, options, under_hessian):
        block, values, hessian = coded(options)
        fitted = fit_columns(block, values, hessian if under_hessian else None)
        objective = hessian if under_hessian else torch.eye(len(values))
        if block.form.has_column_scales:
            assert total(fitted, values, objective) < 0.99 * total(block, values, objective)
        else:
            assert fitted is block

    def test_feedback_beats_nearest_codes(self, options):
        block, values, hessian = coded(options)
        factor = factorize(hessian, len(values), 0.01)
        curvature = damped(hessian, factor.dead, factor.damping)
        fed, dense = round_with_feedback(block, values, factor.upper)
        torch.testing.assert_close(dense, fed.values(), rtol=1e-5, atol=1e-5)
        assert total(fed, values, curvature) < 0.9 * total(block, values, curvature)

    def test_descend_codes_lowers_every_rows_output_error(self, options):
        block, values, hessian = coded(options)
        dense = block.values()
        lower, now = descend_codes(block, hessian @ (values - dense), hessian, dense)
        torch.testing.assert_close(now, lower.values(), rtol=1e-5, atol=1e-5)
        before, after = lost(block, values, hessian), lost(lower, values, hessian)
        assert (after <= before * (1 + 1e-4)).all()
        assert after.sum() < 0.9 * before.sum()

    @pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "int8"])
    def test_rounded_scales_stay_as_they_are_when_packed(self, options, scale_dtype):
        block, values, hessian = coded(options | {"scale_dtype": scale_dtype})
        block = round_scales(fit_columns(fit_rows(block, values, hessian), values, hessian))
        weight = assemble([block], block.form)
        torch.testing.assert_close(weight.dequantize(), block.values().T, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weight.rounded().dequantize(), weight.dequantize(), rtol=1e-6, atol=1e-7)

    def test_start_and_fits_survive_zeros(self, options):
        block, values, hessian = coded(options)
        for zeros in (values * 0, torch.cat([values[:64], values[64:] * 0])):
            block = start(zeros, block.salient, block.form)
            block = fit_columns(fit_rows(block, zeros, hessian), zeros, hessian)
            assert torch.isfinite(block.values()).all()


def test_exact_compensation_is_the_best_later_columns_can_do():
    weight, hessian = problem(m=48)
    factor = factorize(hessian, 48, 0.01)
    curvature = damped(hessian, factor.dead, factor.damping)
    values = weight.T.contiguous()
    difference = torch.zeros_like(values)
    difference[:16] = values[:16] - values[:16].sign()
    difference[16:] = exact_compensation(difference[:16], factor.upper[:16, :16], factor.upper[:16, 16:])
    gradient = curvature @ difference
    assert gradient[16:].abs().max() < 1e-3 * gradient[:16].abs().max()


def test_salient_columns_are_the_layers_own_and_within_the_published_bits():
    weight, hessian = problem(n=64, m=384)
    weight[:, 128:256] *= 30
    for options in (BinarizeOptions(), BinarizeOptions(scale_dtype="float16"), BinarizeOptions(group_bitmap=False)):
        factor = factorize(hessian, 384, 0.01)
        salient = choose_salient_columns(weight, factor, options)
        assert salient[128:256].sum() > 0.9 * min(salient.sum(), 128) > 0
        published = replace(options, scale_dtype="float16").form(64, 384, round(0.045 * 384)).bits()
        assert options.form(64, 384, int(salient.sum())).bits() <= published
    full = binarize_weight(weight, hessian, BinarizeOptions(scale_dtype="float16"))
    assert 0 in [int(full.salient[i : i + 128].sum()) for i in (0, 128, 256)]  # a block may have none
    assert torch.equal(unpack(pack(full), full.form).dequantize(), full.rounded().dequantize())


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("scale_dtype", ["float16", "int8"])
def test_full_beats_paper(options, scale_dtype):
    weight, hessian = problem()
    factor = factorize(hessian, weight.shape[1], 0.01)
    records = [
        binarize_and_record(
            weight, hessian, factor, BinarizeOptions(refinement=refinement, scale_dtype=scale_dtype, **options)
        )[1]
        for refinement in ("paper", "full")
    ]
    assert records[1].output_error < 0.75 * records[0].output_error


@pytest.mark.parametrize("method", ["arb", "billm"])
def test_full_is_one_algorithm_for_every_form(method):
    weight, hessian = problem(n=16)
    one, other = (binarize_weight(weight, hessian, BinarizeOptions(method=each)) for each in (method, "arb-x"))
    assert torch.equal(one.dequantize(), other.dequantize())


@pytest.mark.parametrize(("n", "m"), [(7, 200), (33, 96), (5, 1), (1, 130), (4, 40)])
def test_any_shape_packs_and_runs(n, m):
    weight, hessian = problem(n, m)
    for options, scale_dtype in itertools.product(FORMS, ("float16", "int8")):
        options = BinarizeOptions(scale_dtype=scale_dtype, **options.values[0])
        full = binarize_weight(weight, hessian, options)
        layer, stored = BinaryLinear.from_binary_weight(full), full.rounded().dequantize()
        assert torch.equal(layer.binary_weight().dequantize(), stored)
        x = torch.randn(3, m, generator=torch.Generator().manual_seed(1))
        expected = x @ stored.T
        assert (layer(x) - expected).norm() <= 1e-3 * expected.norm()  # what the kernels promise


def test_without_data_and_with_dead_columns():
    weight, hessian = problem()
    free = binarize_weight(weight, None, BinarizeOptions())
    assert (free.dequantize() - weight).square().sum() < 0.2 * weight.square().sum()
    hessian[:, 10:20] = 0
    hessian[10:20] = 0
    dead = binarize_weight(weight, hessian, BinarizeOptions(scale_dtype="float16"))
    assert torch.isfinite(dead.dequantize()).all()
    assert torch.isfinite(binarize_weight(weight * 0, hessian, BinarizeOptions()).dequantize()).all()


@pytest.mark.skipif(not native.usable(torch.empty(0)), reason="the C library is not built")
@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
@pytest.mark.parametrize("options", FORMS)
def test_the_c_rounding_makes_the_choices_of_the_plain_one(options, isa, monkeypatch):
    if native.ISAS.index(isa) > native.isa():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setattr(native, "isa", lambda: native.ISAS.index(isa))
    generator = torch.Generator().manual_seed(3)
    for n, k in ((1, 33), (129, 7), (300, 128)):
        weight, hessian = problem(n, k)
        salient = torch.rand(k, generator=generator) < 0.2
        form = BinarizeOptions(**({"scale_dtype": "float16"} | options)).form(n, k, int(salient.sum()))
        values = weight.T.contiguous()
        block = fit_rows(start(values, salient, form), values, None)
        factor = factorize(hessian, k, 0.01)
        curvature = damped(hessian, factor.dead, factor.damping)
        fed, dense = round_with_feedback(block, values, factor.upper)
        down, lower = descend_codes(fed, curvature @ (values - dense), curvature, dense)
        with monkeypatch.context() as plain:
            plain.setattr(native, "usable", lambda values: False)
            expected, wanted = round_with_feedback(block, values, factor.upper)
            below, least = descend_codes(fed, curvature @ (values - dense), curvature, dense)
        for ours, theirs in ((fed.codes, expected.codes), (down.codes, below.codes)):
            assert (ours == theirs).float().mean() > 0.999, "only a last bit may tip a choice"
        assert torch.isclose(dense, wanted, rtol=1e-5, atol=1e-6).float().mean() > 0.999
        assert total(down, values, curvature) == pytest.approx(total(below, values, curvature), rel=1e-4)
        assert torch.isclose(lower, least, rtol=1e-5, atol=1e-6).float().mean() > 0.999
        torch.testing.assert_close(lower, down.values(), rtol=1e-5, atol=1e-6)
