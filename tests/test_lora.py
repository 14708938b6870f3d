"""LoRA on binary layers: training, saving, loading, refusals; and trained scales."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import arb_hf
from arb_hf.report import Measurement
from byte_model import byte_tokens, save_byte_model

pytest.importorskip("peft")
lora = pytest.importorskip("arb_hf.lora")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT's
    pytest.mark.usefixtures("exact_kernel"),
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = save_byte_model(tmp_path_factory.mktemp("lora") / "dense")
    config = arb_hf.ArbConfig(dataset=byte_tokens(), num_samples=4, block_size=32, iterations=2)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    arb_hf.save_pretrained(model, None, folder.parent / "packed")
    return folder.parent / "packed"


@pytest.fixture
def model(packed):
    return arb_hf.from_pretrained(packed)


def train(model, parameters, steps=8, rate=1e-2):
    """Losses of a few steps on one batch."""
    ids = byte_tokens(2, 24, seed=1)
    optimizer = torch.optim.Adam(parameters, lr=rate)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def random_layer(method, scale_dtype):
    options = arb_hf.ArbConfig(method=method, scale_dtype=scale_dtype, block_size=32, iterations=2).options()
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    return arb_hf.nn.BinaryLinear.from_binary_weight(arb_hf.binarize_weight(weight, None, options))


def logits(model):
    with torch.no_grad():
        return model(byte_tokens(1, 16, seed=2)).logits


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_new_adapters_change_nothing_and_learn(model):
    before = logits(model)
    planes = {name: module.weight.clone() for name, module in arb_hf.checkpoint.binary_modules(model).items()}
    adapted = lora.add_lora(model, r=4)
    torch.testing.assert_close(logits(adapted), before, rtol=0, atol=0)
    assert all("lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)
    assert len(trainable(adapted)) == 2 * len(planes)
    losses = train(adapted, trainable(adapted), steps=20)
    assert losses[-1] < 0.9 * losses[0]
    for name, module in arb_hf.checkpoint.binary_modules(adapted).items():
        original = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        assert torch.equal(module.weight, planes[original])
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), before, rtol=0, atol=0)


def test_adapters_are_saved_and_loaded(model, packed, tmp_path):
    adapted = lora.add_lora(model, r=4, target_modules=["q_proj", "down_proj"])
    train(adapted, trainable(adapted), steps=2)
    adapted.save_pretrained(tmp_path)
    again = lora.load_lora(arb_hf.from_pretrained(packed), tmp_path)
    torch.testing.assert_close(logits(again), logits(adapted), rtol=0, atol=0)
    assert not trainable(again)
    assert trainable(lora.load_lora(arb_hf.from_pretrained(packed), tmp_path, is_trainable=True))


def test_merging_and_dora_are_refused_with_the_reason(model):
    with pytest.raises(ValueError, match="DoRA"):
        lora.add_lora(copy.deepcopy(model), r=4, use_dora=True)
    adapted = lora.add_lora(model, r=4)
    with pytest.raises(ValueError, match="cannot be merged into binary weights"):
        adapted.merge_and_unload()
    with pytest.raises(ValueError, match=r"arb_hf\.dequantize"):
        adapted.merge_adapter()


def test_merging_into_dense_weights_works_as_the_refusal_says(model, packed, tmp_path):
    adapted = lora.add_lora(model, r=4)
    train(adapted, trainable(adapted), steps=2)
    adapted.save_pretrained(tmp_path)
    merged = lora.load_lora(arb_hf.dequantize(arb_hf.from_pretrained(packed)), tmp_path).merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-5)


def test_scales_train_and_go_back_into_the_format(model, tmp_path):
    before = logits(model)
    scales = lora.unfreeze_scales(model)
    torch.testing.assert_close(logits(model), before)
    assert all(parameter.dtype == torch.float32 for parameter in scales)
    losses = train(model, scales, rate=3e-3)
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in scales)
    assert losses[-1] < losses[0]
    trained = logits(model)
    lora.freeze_scales(model)
    torch.testing.assert_close(logits(model), trained, rtol=0.05, atol=5e-3)  # float16 scales
    assert not torch.allclose(logits(model), before, rtol=0.05, atol=5e-3)
    arb_hf.save_pretrained(model, None, tmp_path)
    torch.testing.assert_close(logits(arb_hf.from_pretrained(tmp_path)), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("load", [arb_hf.from_pretrained, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("adapters", [False, True])
def test_figures_of_other_scales_are_not_published(packed, tmp_path, load, adapters):
    folder = tmp_path / "measured"
    shutil.copytree(packed, folder)
    report = arb_hf.load_report(folder)
    report.add(Measurement("perplexity", "wikitext2", "a test", 12.5))
    report.to_json(folder / "arb_report.json")
    arb_hf.save_pretrained(load(folder), None, tmp_path / "same")
    assert "12.5" in (tmp_path / "same" / "README.md").read_text()
    model = load(folder)
    trained = lora.add_lora(model, r=2) if adapters else model
    lora.unfreeze_scales(trained)
    lora.freeze_scales(trained)
    model = trained.unload() if adapters else model
    arb_hf.save_pretrained(model, None, tmp_path / "trained")
    card = (tmp_path / "trained" / "README.md").read_text()
    assert "12.5" not in card and "The scales of the binary layers were trained afterwards." in card
    assert arb_hf.load_report(tmp_path / "trained").scales_trained


def test_scales_and_adapters_train_together(model):
    adapted = lora.add_lora(model, r=4)
    scales = lora.unfreeze_scales(adapted)
    losses = train(adapted, trainable(adapted))
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in scales)
    lora.freeze_scales(adapted)
    assert all("lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("method", ["arb-rc", "arb"])
def test_a_step_is_relative_to_the_scale(method):
    layer = random_layer(method, "float16")
    scaled = lora.ScaledLinear(layer)
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
    planes = {name: module.packed for name, module in arb_hf.checkpoint.binary_modules(model).items()}
    steps = lora.unfreeze_scales(model)
    with torch.no_grad():
        steps[-1] += 1e6
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj after training: .* lower rate"):
        lora.freeze_scales(model)
    scaled = {name: each for name, each in model.named_modules() if isinstance(each, lora.ScaledLinear)}
    assert scaled.keys() == planes.keys()
    for name, each in scaled.items():
        assert all(torch.equal(tensor, planes[name][key]) for key, tensor in each.binary.packed.items())


def test_int8_scales_train_too(packed, tmp_path):
    dense = packed.parent / "dense"
    config = arb_hf.ArbConfig(dataset=byte_tokens(), num_samples=4, block_size=32, iterations=2, scale_dtype="int8")
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    before = logits(model)
    losses = train(model, lora.unfreeze_scales(model), rate=3e-2)
    assert losses[-1] < losses[0]
    trained = logits(model)
    lora.freeze_scales(model)
    change = (trained - before).norm()
    assert (logits(model) - trained).norm() < 0.1 * change
    arb_hf.save_pretrained(model, None, tmp_path)
    torch.testing.assert_close(logits(arb_hf.from_pretrained(tmp_path)), logits(model), rtol=0, atol=0)


def test_a_dense_model_is_refused(tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(save_byte_model(tmp_path / "dense"))
    with pytest.raises(ValueError, match="no binary layers"):
        lora.lora_config(dense)
    with pytest.raises(ValueError, match="no binary layers"):
        lora.unfreeze_scales(dense)
