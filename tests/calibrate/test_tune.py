"""Tuning of decoder layers by gradient: it lowers held-out losses, discards what does not, and is reproducible."""

import dataclasses
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from arb_hf import ArbCalibrationError, ArbConfig
from arb_hf.binarize import BinarizeOptions, binarize_weight
from arb_hf.binarize.full import latent as latent_module
from arb_hf.binarize.full.driver import assemble, take_apart
from arb_hf.binarize.full.latent import LatentWeight, best_alone
from arb_hf.binarize.hessian import factorize, output_error
from arb_hf.calibrate import descent, processes, tune
from arb_hf.calibrate import model as model_module
from arb_hf.calibrate.batches import Batch
from arb_hf.calibrate.capture import CapturedBatch, capture, run_layer
from arb_hf.calibrate.hessians import accumulate
from arb_hf.calibrate.processes import Processes
from arb_hf.calibrate.spool import Spool, updated
from arb_hf.calibrate.tune import token_errors, tune_layer
from arb_hf.cli.parser import build_parser
from arb_hf.exact import autocast_off, autocast_on
from arb_hf.nn import BinaryLinear
from arb_hf.report import ArbReport, TuneRecord
from helpers import tiny
from helpers.models import llama, token_samples

FORMS = [
    {"method": "arb-rc", "scale_dtype": "int8"},
    {"method": "arb-rc", "column_group_bitmap": False},
    {"method": "arb-x"},
    {"method": "arb-rc", "group_bitmap": False, "column_group_bitmap": False},
]


def binary(dense, **options):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(300, dense.shape[1], generator=generator) * torch.rand(dense.shape[1], generator=generator)
    options = BinarizeOptions(block_size=64, **({"scale_dtype": "float16"} | options))
    return binarize_weight(dense, inputs.T @ inputs, options).rounded()


@pytest.fixture
def dense():
    return torch.randn(40, 168, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", FORMS)
def test_blocks_come_apart_and_together(dense, options):
    weight = binary(dense, **options)
    again = assemble(take_apart(weight), weight.form)
    assert torch.equal(again.dequantize(), weight.dequantize())
    values = torch.cat([block.values() for block in take_apart(weight)]).T
    torch.testing.assert_close(values, weight.dequantize())


@pytest.mark.parametrize("options", FORMS)
def test_latent_weight_starts_as_it_was(dense, options):
    weight = binary(dense, **options)
    latent = LatentWeight(weight, weight.dequantize())
    torch.testing.assert_close(latent.dense(), weight.dequantize())
    torch.testing.assert_close(latent.binary_weight().dequantize(), weight.dequantize(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("options", FORMS)
def test_gradients_are_exact_for_scales_and_straight_through_for_latent_weights(dense, options, monkeypatch):
    monkeypatch.setattr(latent_module, "nearest_codes", lambda block, _: block)  # choices have no derivative
    weight = binary(dense, **options)
    latent = LatentWeight(weight, dense)
    direction = torch.randn(dense.shape, generator=torch.Generator().manual_seed(3))
    (latent.dense() * direction).sum().backward()
    torch.testing.assert_close(latent.shifts.grad, direction.T * weight.dequantize().square().mean(1).sqrt())
    for scale in latent.scales:
        step = 1e-2 * torch.randn(scale.shape, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            scale += step
            above = latent.dense()
            scale -= 2 * step
            change = (above - latent.dense()) / 2 * direction
            scale += step
        assert (scale.grad * step).sum().item() == pytest.approx(change.sum().item(), abs=1e-4 * change.norm().item())


def strong_llama(layers=2, **options):
    """A tiny model whose layers change the hidden states a lot, so that there is something to learn."""
    model = llama(layers, **options)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.dim() == 2:
                parameter *= 10
    return model


@pytest.fixture(scope="module")
def scene():
    """A tiny model's second layer, and calls whose inputs have drifted from full precision, channel by channel."""
    model = strong_llama()
    with torch.no_grad():
        calls = list(capture(model, model.model.layers, [Batch(ids[None], None) for ids in token_samples(16)]))
        drift = 1 + 0.3 * torch.randn(96, generator=torch.Generator().manual_seed(0))
        for call in calls:
            full = run_layer(model.model.layers[0], call, 0)
            call.hidden = full * drift
            call.reference = run_layer(model.model.layers[1], call, 1, full)
    return model.model.layers[1], calls


def tuned(scene, steps=24, seed=0, calls=None, **options):
    layer, every = scene
    linears = {name: each for name, each in layer.named_modules() if isinstance(each, torch.nn.Linear)}
    chosen = BinarizeOptions(block_size=64, **({"scale_dtype": "float16"} | options))
    hessians = {name: group.hessian() for group in accumulate(layer, linears, every, 1) for name in group.names}
    weights = {name: binarize_weight(each.weight, hessians[name], chosen) for name, each in linears.items()}
    starts = {name: start_of(weights[name], each.weight, hessians[name]) for name, each in linears.items()}
    norms = {name: p for name, p in layer.named_parameters() if p.dim() == 1}
    try:
        found, record = tune_layer(
            layer, weights, starts, calls or every, 1, steps=steps, seed=seed, processes=Processes()
        )
        after = {name: layer.get_parameter(name).clone() for name in norms}
    finally:
        restore(layer, norms)
    return weights, found, record, after


def start_of(weight, dense, hessian):
    return best_alone(weight.rounded().dequantize(), dense, hessian, factorize(hessian, dense.shape[1], 0.01))


def restore(layer, norms):
    for name, parameter in norms.items():
        module, _, key = name.rpartition(".")
        setattr(layer.get_submodule(module), key, parameter)


@torch.no_grad()
@pytest.mark.parametrize("options", FORMS)
def test_tuning_lowers_the_held_out_loss_of_what_is_stored(scene, options):
    state = torch.random.get_rng_state()
    before = {name: p.clone() for name, p in scene[0].named_parameters()}
    weights, found, record, norms = tuned(scene, **options)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], p) for name, p in scene[0].named_parameters())
    assert record.after < 0.99 * record.before
    assert {name: weight.form for name, weight in found.items()} == {name: w.form for name, w in weights.items()}
    packed = {f"{n}.weight": BinaryLinear.from_binary_weight(w).binary_weight().dequantize() for n, w in found.items()}
    losses = [
        token_errors(run_layer(scene[0], call, 1, parameters=packed | norms), call.reference, None)[0].item()
        for call in scene[1][14:]
    ]
    assert sum(losses) / (2 * 48) == pytest.approx(record.after, rel=1e-5)


@torch.no_grad()
def test_latent_weights_start_where_each_weight_is_best_alone(scene):
    layer, calls = scene
    name = "mlp.down_proj"
    dense = layer.get_submodule(name).weight
    inputs = []
    handle = layer.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    for call in calls:
        run_layer(layer, call, 1)
    handle.remove()
    x = torch.cat(inputs)
    weight = binarize_weight(dense, x.T @ x, BinarizeOptions(block_size=64, scale_dtype="float16")).rounded()
    start = start_of(weight, dense, x.T @ x)
    error = dense - weight.dequantize()
    damped = x.T @ x + 0.01 * x.square().sum(0).mean() * torch.eye(x.shape[1])
    for row, column in ((0, 0), (5, 100), (95, 167)):
        moved = error[row].clone()
        moved[column] = dense[row, column] - start[row, column]
        assert (moved @ damped)[column].abs() < 1e-3 * (error[row].abs() @ damped.abs())[column]
    latent = LatentWeight(weight, start).binary_weight()
    assert (latent.signs != weight.signs).float().mean() < 0.1


@torch.no_grad()
def test_tuning_is_reproducible_by_its_seed(scene, monkeypatch):
    monkeypatch.setattr(
        descent, "STEP_TOKENS", 4 * 48
    )  # a step takes four batches of the fourteen: seeds differ in which
    first, same, other = (tuned(scene, seed=seed)[1] for seed in (0, 0, 1))
    assert all(torch.equal(first[name].dequantize(), same[name].dequantize()) for name in first)
    assert not all(torch.equal(first[name].dequantize(), other[name].dequantize()) for name in first)


@torch.no_grad()
def test_useless_steps_are_discarded(scene, monkeypatch):
    monkeypatch.setattr(tune, "SCALE_RATE", 10.0)
    norms = {name: p.clone() for name, p in scene[0].named_parameters() if p.dim() == 1}
    weights, found, record, after = tuned(scene, steps=4)
    assert record.after == record.before
    assert all(found[name] is weight for name, weight in weights.items())
    assert all(torch.equal(after[name], norm) for name, norm in norms.items())


@torch.no_grad()
def test_one_batch_cannot_be_held_out(scene):
    weights, found, record, _ = tuned(scene, calls=scene[1][:1])
    assert record.steps == 0
    assert all(found[name] is weight for name, weight in weights.items())


@torch.no_grad()
def test_padding_takes_no_part(scene):
    """What stands in padded places changes nothing."""
    layer, calls = scene
    mask = torch.ones(1, 48, dtype=torch.long)
    mask[:, 40:] = 0
    results = []
    for noise in (0.0, 5.0):
        changed = []
        for call in calls:
            reference = call.reference.clone()
            reference[:, 40:] += noise
            changed.append(dataclasses.replace(call, mask=mask, reference=reference))
        results.append(tuned((layer, changed), steps=8))
    assert results[0][2].after == results[1][2].after
    assert all(torch.equal(w.dequantize(), results[1][1][name].dequantize()) for name, w in results[0][1].items())


def test_no_token_outweighs_the_others():
    out, target = torch.ones(1, 4, 8), torch.full((1, 4, 8), 2.0)
    out[0, 2] = 1e6
    out[0, 3] = torch.nan_to_num(torch.tensor(torch.inf))
    total, count = token_errors(out[:, :3], target[:, :3], None)
    assert count == 3
    assert total.item() == pytest.approx(0.2 + 0.2 + 1.0)
    total, count = token_errors(out[:, :3], target[:, :3], torch.tensor([[1, 1, 0]]))
    assert (total.item(), count) == (pytest.approx(0.4), 2)


def test_whole_model_comes_nearer_and_keeps_its_norms(tmp_path):
    model = strong_llama()
    model.save_pretrained(tmp_path / "dense")
    ids = torch.stack(token_samples(4, seed=5))
    with torch.no_grad():
        wanted = model(ids).logits
    errors = []
    for steps in (0, 24):
        config = ArbConfig(dataset=token_samples(32), tune_steps=steps, scale_dtype="float16")
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=config, dtype=torch.float32
        )
        with torch.no_grad():
            errors.append((loaded(ids).logits - wanted).square().mean().item())
    assert errors[1] < errors[0]
    report = loaded.arb_report
    assert [each.layer for each in report.tuned] == [0, 1]
    assert all(each.after <= each.before for each in report.tuned)
    norms = {name: p for name, p in loaded.named_parameters() if "layernorm" in name}
    assert any(not torch.equal(p, model.get_parameter(name)) for name, p in norms.items())
    assert "held-out loss" in report.table()
    assert ArbReport.from_dict(report.to_dict()).tuned == report.tuned
    loaded.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, loaded(ids).logits)


def test_resumed_runs_keep_tuned_layers(tmp_path, monkeypatch):
    strong_llama(tiny.LAYERS, hidden_size=64).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    options = {"refinement": "full", "tune_steps": 4, "dataset": token_samples(16)}
    whole = tiny.binarize(tmp_path / "dense", **options)
    assert any(each.after < each.before for each in whole.arb_report.tuned)
    with monkeypatch.context() as patch:

        def stop(this, index, original=model_module.binarize_layer):
            if index == 2:
                raise KeyboardInterrupt
            return original(this, index)

        patch.setattr(model_module, "binarize_layer", stop)
        with pytest.raises(KeyboardInterrupt):
            tiny.binarize(tmp_path / "dense", checkpoint_dir=tmp_path / "checkpoint", **options)
    resumed = tiny.binarize(tmp_path / "dense", checkpoint_dir=tmp_path / "checkpoint", **options)
    tiny.assert_equal(tiny.saved(resumed, tmp_path / "a"), tiny.saved(whole, tmp_path / "b"))
    before, after = ([vars(each) | {"seconds": 0} for each in model.arb_report.tuned] for model in (whole, resumed))
    assert before == after
    assert len(after) == tiny.LAYERS


def test_spool_keeps_both_models_states_apart():
    states = torch.ones(1, 4, 8)
    for size in (0, 2 * states.nbytes):
        kept = Spool(size, None).keep(CapturedBatch(states, {}, None, reference=states))
        updated(kept.hidden, torch.zeros(1, 4, 8))
        assert torch.equal(kept.reference, states)
        assert kept.hidden.sum() == 0


@pytest.mark.parametrize("overrides", [False, True])
def test_layers_with_experts_are_left_out(tmp_path, caplog, overrides):
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=2))
    model.save_pretrained(tmp_path)
    kept = {"*.experts": None}  # stays in stacks
    with caplog.at_level(logging.WARNING, logger="arb_hf"):
        loaded = tiny.binarize(
            tmp_path, refinement="full", tune_steps=2, overrides=kept if overrides else None, minimum_coverage=0
        )
    assert "recompute" in loaded.arb_report.stages
    assert not loaded.arb_report.tuned
    assert "1 of 1 decoder layers are not tuned" in caplog.text


@torch.no_grad()
def test_the_loss_after_tuning_is_that_of_the_whole_layer_as_stored(scene):
    """Matrices that are not tuned count as binary too."""
    layer, calls = scene
    fixed = {"mlp.up_proj": binary(layer.mlp.up_proj.weight).dequantize()}
    weights = {"mlp.down_proj": binary(layer.mlp.down_proj.weight)}
    starts = {"mlp.down_proj": layer.mlp.down_proj.weight}
    before = {name: p for name, p in layer.named_parameters() if p.dim() == 1}
    found, record = tune_layer(layer, weights, starts, calls, 1, steps=8, seed=0, processes=Processes(), fixed=fixed)
    norms = {name: layer.get_parameter(name) for name in before}
    restore(layer, before)
    assert record.after < record.before
    stored = {f"{name}.weight": weight.rounded().dequantize() for name, weight in found.items()}
    stored |= {f"{name}.weight": each for name, each in fixed.items()} | norms
    losses = [
        token_errors(run_layer(layer, call, 1, parameters=stored), call.reference, None)[0] for call in calls[14:]
    ]
    assert (sum(losses) / (2 * 48)).item() == pytest.approx(record.after, rel=1e-5)


def test_nothing_is_left_on_what_the_layer_keeps(tmp_path):
    strong_llama().save_pretrained(tmp_path)
    options = {"overrides": {"*.down_proj": None}, "minimum_coverage": 0, "tune_steps": 4, "refinement": "full"}
    model = tiny.binarize(tmp_path, dataset=token_samples(16), **options)
    assert any(each.after < each.before for each in model.arb_report.tuned)
    assert all(parameter.grad is None for parameter in model.parameters())
    norms = [p for name, p in model.named_parameters() if "layernorm" in name]
    assert len({p.requires_grad for p in norms}) == 1


def test_output_errors_are_those_of_the_weights_as_stored_on_held_out_text(tmp_path):
    """Of a single layer, whose inputs are the same before and after."""
    strong_llama(layers=1).save_pretrained(tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    samples = token_samples(16)
    model = tiny.binarize(tmp_path, dataset=samples, num_samples=16, refinement="full", tune_steps=8, distill_steps=0)
    assert model.arb_report.tuned[0].after < model.arb_report.tuned[0].before
    with torch.no_grad():
        calls = list(capture(dense, dense.model.layers, [Batch(ids[None], None) for ids in samples]))
        layer = dense.model.layers[0]
        restore(layer, {name: p for name, p in model.model.layers[0].named_parameters() if "norm" in name})
        linears = {name: each for name, each in layer.named_modules() if isinstance(each, torch.nn.Linear)}
        held = calls[14:]
        hessians = {name: group.hessian() for group in accumulate(layer, linears, held, 0) for name in group.names}
        for record in model.arb_report.matrices:
            weight = layer.get_submodule(record.kind).weight
            stored = model.get_submodule(record.name).binary_weight().dequantize()
            expected = output_error(weight - stored, weight, hessians[record.kind])
            assert record.solve.output_error == pytest.approx(expected, rel=1e-4)
            change = (weight - stored).square().sum() / weight.square().sum()
            assert record.solve.weight_error == pytest.approx(change.item(), rel=1e-4)


def test_too_few_batches_are_warned_of(tmp_path, caplog):
    tiny.save_model(tmp_path, layers=1)
    model = tiny.binarize(tmp_path, refinement="full", tune_steps=2, dataset=token_samples(1), num_samples=1)
    assert "nothing is tuned: a process has a single batch" in caplog.text
    assert not model.arb_report.tuned


def test_published_modules_among_others_are_not_tuned(tmp_path, monkeypatch):
    asked = []

    def note(layer, weights, *rest, **options):
        asked.extend(weights)
        return weights, TuneRecord(0, 1.0, 1.0, 0, 0.0)

    monkeypatch.setattr("arb_hf.calibrate.layer.tune_layer", note)
    tiny.save_model(tmp_path, layers=1)
    tiny.binarize(tmp_path, refinement="full", overrides={"*.q_proj": {"refinement": "paper"}})
    full = ["down_proj", "gate_proj", "k_proj", "o_proj", "up_proj", "v_proj"]
    assert sorted(name.rpartition(".")[2] for name in asked) == full


def test_steps_by_default():
    assert ArbConfig().tune_steps == 32
    assert ArbConfig(tune_steps=0).tune_steps == 0
    assert ArbConfig(refinement="paper").tune_steps == 0
    with pytest.raises(ValueError, match=r"tune_steps=3 .*refinement"):
        ArbConfig(refinement="paper", tune_steps=3)


def test_command_line_takes_the_steps():
    argv = ["quantize", "model", "out", "--tune-steps", "4"]
    assert vars(build_parser(argv).parse_args(argv))["config.tune_steps"] == 4


def test_gradients_are_averaged(monkeypatch):
    def all_reduce(tensor):
        tensor += 3.0

    monkeypatch.setattr(processes.dist, "all_reduce", all_reduce)
    tensor = torch.ones(2)
    Processes(0, 2).average(tensor)
    assert tensor.tolist() == [2.0, 2.0]
    Processes().average(tensor)
    assert tensor.tolist() == [2.0, 2.0]


def test_failed_communication_names_the_process(monkeypatch):
    def broken(*_):
        raise RuntimeError("connection closed")

    monkeypatch.setattr(processes.dist, "all_reduce", broken)
    with pytest.raises(ArbCalibrationError, match="process 0 of 2"):
        Processes(0, 2).average(torch.ones(1))


def test_shorter_types_leave_no_casts_behind():
    """Casts that autocast caches stay until the outermost autocast ends, here that of a whole run: 20 GB on SmolLM2."""
    with autocast_off(), autocast_on(torch.device("cpu")):
        assert not torch.is_autocast_cache_enabled()
