"""Calibration under `refinement="full"`: aiming at the full-precision model, and tuning what is continuous."""

import pytest
import torch
from conftest import llama, token_samples
from transformers import AutoModelForCausalLM

from arb_hf import ArbConfig
from arb_hf.binarize import BinarizeOptions, binarize_weight
from arb_hf.binarize.hessian import factorize
from arb_hf.binarize.refine import aimed_weight
from arb_hf.calibrate.capture import capture, run_layer
from arb_hf.calibrate.data import Batch
from arb_hf.calibrate.sequential import groups_in_turn, stages
from arb_hf.calibrate.tune import token_loss, tune_layer
from arb_hf.nn import BinaryLinear


def test_aimed_weight_makes_up_for_changed_inputs():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 32, generator=generator)
    full = torch.randn(200, 32, generator=generator)
    inputs = full + 0.3 * torch.randn(200, 32, generator=generator)
    hessian, cross = inputs.T @ inputs, inputs.T @ full
    aimed = aimed_weight(weight, hessian, cross, factorize(hessian, 32, 1e-4))
    wanted = full @ weight.T
    best = torch.linalg.lstsq(inputs, wanted).solution.T
    torch.testing.assert_close(aimed, best, rtol=1e-2, atol=1e-2)
    same = aimed_weight(weight, hessian, hessian, factorize(hessian, 32, 0.01))
    torch.testing.assert_close(same, weight)
    assert torch.equal(aimed_weight(weight, hessian, cross, factorize(None, 32, 0.01)), weight)


@pytest.fixture(scope="module")
def at_second_layer():
    """A tiny model, its second layer and linears, and calls whose inputs have drifted from full precision."""
    model = llama()
    with torch.no_grad():
        calls = capture(model, model.model.layers, [Batch(ids[None], None) for ids in token_samples(16)])
        generator = torch.Generator().manual_seed(0)
        for call in calls:
            call.reference = run_layer(model.model.layers[0], call, 0)
            noise = torch.randn(call.reference.shape, generator=generator)
            call.hidden = call.reference + 0.1 * call.reference.std() * noise
    layer = model.model.layers[1]
    linears = {name: each for name, each in layer.named_modules() if isinstance(each, torch.nn.Linear)}
    return layer, linears, calls


@torch.no_grad()
def test_stages_follow_the_calls(at_second_layer):
    layer, linears, calls = at_second_layer
    found = stages(layer, linears, calls[0], 1)
    assert [[name.split(".")[1] for name in names] for names in found] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


@torch.no_grad()
def test_moments_are_of_both_models_inputs(at_second_layer):
    layer, linears, calls = at_second_layer
    group = next(groups_in_turn(layer, linears, calls, 1))
    rows = torch.cat([layer.input_layernorm(call.hidden)[0] for call in calls])
    full = torch.cat([layer.input_layernorm(call.reference)[0] for call in calls])
    torch.testing.assert_close(group.total, rows.T @ rows, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(group.cross, rows.T @ full, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_later_groups_see_the_weights_binarized_before(at_second_layer):
    layer, linears, calls = at_second_layer
    originals = {name: linear.weight.data for name, linear in linears.items()}
    try:
        groups = groups_in_turn(layer, linears, calls, 1)
        for name in next(groups).names:
            linears[name].weight.data = torch.zeros_like(originals[name])
        group = next(groups)
        assert group.total.abs().max() == 0  # no values, so nothing reaches o_proj
        assert group.cross.abs().max() == 0
    finally:
        for name, linear in linears.items():
            linear.weight.data = originals[name]


@torch.no_grad()
@pytest.mark.parametrize("options", [{"method": "arb-rc", "scale_dtype": "int8"}, {"method": "arb-x"}])
def test_tuning_lowers_the_held_out_loss(at_second_layer, options):
    layer, linears, calls = at_second_layer
    targets = [run_layer(layer, call, 1) for call in calls]
    weights = {
        n: binarize_weight(each.weight, None, BinarizeOptions(refinement="full", **options))
        for n, each in linears.items()
    }
    state = torch.random.get_rng_state()
    norms = {name: p.clone() for name, p in layer.named_parameters() if p.dim() == 1}
    tuned, record = tune_layer(layer, weights, calls, targets, 1, steps=24, seed=0)
    again = tune_layer(layer, weights, calls, targets, 1, steps=0, seed=0)[1]
    assert torch.equal(state, torch.random.get_rng_state())
    assert record.after < 0.95 * record.before
    assert again.steps == 0
    for name, weight in tuned.items():
        assert torch.equal(weight.signs, weights[name].signs)
        linears[name].weight.data = BinaryLinear.from_binary_weight(weight).binary_weight().dequantize()
    losses = [token_loss(run_layer(layer, calls[i], 1), targets[i], None).item() for i in (14, 15)]
    assert sum(losses) / 2 == pytest.approx(record.after, rel=1e-3)
    for name, before in norms.items():
        layer.get_parameter(name).data = before


def test_token_loss_leaves_padding_out():
    out, target = torch.ones(1, 4, 8), torch.full((1, 4, 8), 2.0)
    out[0, 3] = 100
    assert token_loss(out, target, torch.tensor([[1, 1, 1, 0]])).item() == pytest.approx(0.25)


def test_full_model_runs_and_is_nearer(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    ids = torch.stack(token_samples(4, seed=5))
    with torch.no_grad():
        wanted = model(ids).logits
    errors = []
    for options in ({}, {"refinement": "full"}, {"refinement": "full", "tune_steps": 24}):
        config = ArbConfig(dataset=token_samples(16), **options)
        binary = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
        with torch.no_grad():
            errors.append((binary(ids).logits - wanted).square().mean().item())
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < errors[1]


def test_tune_steps_need_full():
    with pytest.raises(ValueError, match=r"tune_steps=3 .*refinement"):
        ArbConfig(tune_steps=3)
