"""Trained scales: they learn, go back into the format, and nothing false is published of them."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import arb_hf
from arb_hf import scales
from arb_hf.nn import ScaledLinear
from arb_hf.report import Measurement
from helpers.byte_model import logits, save_packed, train

pytestmark = pytest.mark.usefixtures("exact_kernel")


def random_layer(method, scale_dtype):
    options = arb_hf.ArbConfig(
        method=method, scale_dtype=scale_dtype, block_size=32, refinement="paper", iterations=2
    ).options()
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    return arb_hf.nn.BinaryLinear.from_binary_weight(arb_hf.binarize_weight(weight, None, options))


def test_scales_train_and_go_back_into_the_format(model, tmp_path):
    before = logits(model)
    steps = scales.unfreeze(model)
    torch.testing.assert_close(logits(model), before)
    assert all(parameter.dtype == torch.float32 for parameter in steps)
    losses = train(model, steps, rate=3e-3)
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in steps)
    assert losses[-1] < losses[0]
    trained = logits(model)
    scales.freeze(model)
    torch.testing.assert_close(logits(model), trained, rtol=0.05, atol=5e-3)  # float16 scales
    assert not torch.allclose(logits(model), before, rtol=0.05, atol=5e-3)
    arb_hf.save_pretrained(model, None, tmp_path)
    torch.testing.assert_close(logits(arb_hf.from_pretrained(tmp_path)), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("load", [arb_hf.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_figures_of_other_scales_are_not_published(packed, tmp_path, load):
    folder = tmp_path / "measured"
    shutil.copytree(packed, folder)
    report = arb_hf.load_report(folder)
    report.add(Measurement("perplexity", "wikitext2", "a test", 12.5))
    report.to_json(folder / "arb_report.json")
    arb_hf.save_pretrained(load(folder), None, tmp_path / "same")
    assert "12.5" in (tmp_path / "same" / "README.md").read_text()
    model = load(folder)
    scales.unfreeze(model)
    scales.freeze(model)
    arb_hf.save_pretrained(model, None, tmp_path / "trained")
    card = (tmp_path / "trained" / "README.md").read_text()
    assert "12.5" not in card and "The scales of the binary layers were trained afterwards." in card
    assert arb_hf.load_report(tmp_path / "trained").scales_trained


@pytest.mark.parametrize("method", ["arb-rc", "arb"])
def test_a_step_is_relative_to_the_scale(method):
    layer = random_layer(method, "float16")
    scaled = ScaledLinear(layer)
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(scaled(x), layer(x))
    with torch.no_grad():
        scaled.steps["row_parameters"] += 0.5
    scales = layer.form.scale_slots
    before, after = layer.row_parameters.float(), scaled.stored()["row_parameters"].float()
    torch.testing.assert_close(after[:, :scales], 1.5 * before[:, :scales], rtol=1e-3, atol=1e-6)
    moved = 0.5 * before[:, :scales].mean(1, keepdim=True).expand_as(before[:, scales:])  # means, which may be 0
    torch.testing.assert_close(after[:, scales:] - before[:, scales:], moved, rtol=1e-2, atol=1e-3)


def test_scales_that_no_longer_fit_are_refused_by_layer(model):
    planes = {
        name: {key: tensor.clone() for key, tensor in module.packed.items()}
        for name, module in arb_hf.checks.binary_modules(model).items()
    }
    steps = scales.unfreeze(model)
    with torch.no_grad():
        steps[-1] += 1e6
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj after training: .* lower rate"):
        scales.freeze(model)
    scaled = {name: each for name, each in model.named_modules() if isinstance(each, ScaledLinear)}
    assert scaled.keys() == planes.keys()
    for name, each in scaled.items():
        assert all(torch.equal(tensor, planes[name][key]) for key, tensor in each.binary.packed.items())


def test_int8_scales_train_too(tmp_path):
    model = arb_hf.from_pretrained(save_packed(tmp_path / "int8", scale_dtype="int8"))
    before = logits(model)
    losses = train(model, scales.unfreeze(model), rate=3e-2)
    assert losses[-1] < losses[0]
    trained = logits(model)
    scales.freeze(model)
    change = (trained - before).norm()
    assert (logits(model) - trained).norm() < 0.1 * change
    arb_hf.save_pretrained(model, None, tmp_path)
    torch.testing.assert_close(logits(arb_hf.from_pretrained(tmp_path)), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("scale_dtype", ["float16", "int8"])
@pytest.mark.parametrize("name", ["row_parameters", "column_scales"])
def test_scales_that_are_not_finite_are_refused(scale_dtype, name):
    layer = torch.nn.Sequential(random_layer("arb-rc", scale_dtype))
    scales.unfreeze(layer)
    with torch.no_grad():
        layer[0].steps[name][0, 0] = float("nan")
    with pytest.raises(ValueError, match="0 after training: its scales are not finite"):
        scales.freeze(layer)


def test_a_model_in_training_is_neither_saved_nor_made_dense(model, tmp_path):
    scales.unfreeze(model)
    for take in (lambda: arb_hf.save_pretrained(model, None, tmp_path), lambda: arb_hf.dequantize(model)):
        with pytest.raises(ValueError, match=r"call arb_hf\.scales\.freeze\(model\) first"):
            take()
    assert not list(tmp_path.iterdir())


def test_each_step_has_its_time(model):
    with pytest.raises(ValueError, match="no scales are being trained"):
        scales.freeze(model)
    scales.unfreeze(model)
    with pytest.raises(ValueError, match="being trained: call"):
        scales.unfreeze(model)
    scales.freeze(model)
    with pytest.raises(ValueError, match="no scales are being trained"):
        scales.freeze(model)
    with pytest.raises(ValueError, match="no binary layers"):
        scales.unfreeze(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="0 is on disk"):
        scales.unfreeze(torch.nn.Sequential(random_layer("arb-rc", "float16").to("meta")))


def test_a_report_that_cannot_be_read_comes_before_any_change(packed, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(packed, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    scales.unfreeze(model)
    (folder / "arb_report.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        scales.freeze(model)
    assert any(isinstance(each, ScaledLinear) for each in model.modules())


def test_casting_the_model_rounds_nothing_that_is_trained(model, packed):
    scales.unfreeze(model)
    model.to(torch.bfloat16).to(torch.float32)
    scales.freeze(model)
    before = arb_hf.checks.binary_modules(arb_hf.from_pretrained(packed))
    for name, module in arb_hf.checks.binary_modules(model).items():
        assert all(torch.equal(tensor, before[name].packed[key]) for key, tensor in module.packed.items())


def test_layers_whose_scales_want_gradients_take_no_shortcut():
    layer = random_layer("arb-rc", "float32")
    x = torch.randn(1, 40, generator=torch.Generator().manual_seed(1))
    assert not layer(x).requires_grad
    layer.row_parameters.requires_grad_()
    assert layer(x).requires_grad
    with torch.no_grad():
        assert not layer(x).requires_grad
