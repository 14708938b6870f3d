"""How far inputs have come from the original model's, and what each matrix makes up for."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from arb_hf.binarize.hessian import AIM, aim, factorize
from arb_hf.calibrate import layer as layer_module
from arb_hf.calibrate.batches import Batch
from arb_hf.calibrate.capture import capture, run_layer
from arb_hf.calibrate.hessians import accumulate
from helpers import tiny
from helpers.models import llama, token_samples

OUTSIDE_MLP = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]


@pytest.fixture(scope="module")
def scene():
    """A layer, its linears, and calls whose inputs differ from the reference's."""
    model = llama()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        calls = list(capture(model, model.model.layers, [Batch(ids[None], None) for ids in token_samples(3)]))
    for call in calls:
        call.reference = call.hidden
        call.hidden = call.hidden * (1 + 0.3 * torch.randn(call.hidden.shape, generator=generator))
    layer = model.model.layers[0]
    return layer, {name: each for name, each in layer.named_modules() if isinstance(each, torch.nn.Linear)}, calls


@torch.no_grad()
def inputs_of(layer, name, calls, states):
    found = []
    handle = layer.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0][0]))
    for call in calls:
        run_layer(layer, call, 0, getattr(call, states))
    handle.remove()
    return torch.cat(found)


@torch.no_grad()
def test_drifts_are_sums_over_tokens_of_inputs_and_how_far_they_have_come(scene):
    layer, linears, calls = scene
    groups = {name: group for group in accumulate(layer, linears, calls, 0) for name in group.names}
    for name in OUTSIDE_MLP:
        x, y = inputs_of(layer, name, calls, "hidden"), inputs_of(layer, name, calls, "reference")
        torch.testing.assert_close(groups[name].mean_drift(), x.T @ (y - x) * (2 / 3), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_inputs_inside_mlps_have_no_drift(scene):
    layer, linears, calls = scene
    groups = {name: group for group in accumulate(layer, linears, calls, 0) for name in group.names}
    assert groups["mlp.up_proj"].mean_drift() is not None
    assert groups["mlp.down_proj"].mean_drift() is None


@torch.no_grad()
def test_padding_does_not_drift(scene):
    layer, linears, calls = scene
    mask = torch.ones(calls[0].hidden.shape[:2], dtype=torch.long)
    mask[:, 40:] = 0
    padded = [dataclasses.replace(call, mask=mask, reference=call.reference.clone()) for call in calls]
    before = {group.names[0]: group.mean_drift() for group in accumulate(layer, linears, padded, 0)}
    for call in padded:
        call.reference[:, 40:] += 5.0
    after = {group.names[0]: group.mean_drift() for group in accumulate(layer, linears, padded, 0)}
    assert torch.equal(before["self_attn.q_proj"], after["self_attn.q_proj"])


def test_the_aim_lies_on_the_way_to_the_least_squares_solution():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(200, 24, generator=generator)
    x = y + 0.4 * torch.randn(200, 24, generator=generator)
    weight = torch.randn(10, 24, generator=generator)
    factor = factorize(x.T @ x, 24, 1e-6)
    best = torch.linalg.lstsq(x, y @ weight.T).solution.T
    found = aim(weight, x.T @ (y - x), factor)
    torch.testing.assert_close(found, weight + AIM * (best - weight), rtol=1e-3, atol=1e-3)


def test_without_drift_the_aim_is_the_weight_to_the_last_bit():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(aim(weight, torch.zeros(8, 8), factorize(x.T @ x, 8, 0.01)), weight)


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("refinement", ["full", "paper"])
def test_the_original_model_is_followed_through_every_layer_by_full_alone(tmp_path, monkeypatch, refinement, budget):
    """Also where the Hessians of a layer do not fit into memory together and take several passes."""
    tiny.save_model(tmp_path, layers=3)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    samples = token_samples(2)
    with torch.no_grad():
        hidden = dense(torch.stack(samples), output_hidden_states=True).hidden_states
    seen = []
    pass_on = layer_module._pass_on

    def note(run, index, *rest):
        seen.append([None if batch.reference is None else batch.reference.clone() for batch in run.captured])
        pass_on(run, index, *rest)

    monkeypatch.setattr(layer_module, "_pass_on", note)
    if budget is not None:
        monkeypatch.setattr("arb_hf.calibrate.matrices.hessian_budget", lambda *_: budget)
    loading = {"dtype": torch.float32}
    tiny.binarize(tmp_path, loading, dataset=samples, num_samples=2, refinement=refinement, tune_steps=0)
    assert len(seen) == 3
    if refinement == "paper":
        assert all(each is None for layer in seen for each in layer)
        return
    for index in (0, 1):  # what transformers calls the last hidden state has passed the norm
        torch.testing.assert_close(torch.cat(seen[index]), hidden[index + 1], rtol=1e-4, atol=1e-4)
