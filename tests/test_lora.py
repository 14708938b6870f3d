"""LoRA on binary layers: training, saving, loading, refusals; with trained scales."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import arb_hf
from arb_hf import scales
from arb_hf.report import Measurement
from helpers.byte_model import logits, save_byte_model, save_packed, train

pytest.importorskip("peft")
lora = pytest.importorskip("arb_hf.lora")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT's
    pytest.mark.usefixtures("exact_kernel"),
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return save_packed(tmp_path_factory.mktemp("lora"))


@pytest.fixture
def model(packed):
    return arb_hf.from_pretrained(packed)


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_new_adapters_change_nothing_and_learn(model):
    before = logits(model)
    planes = {name: module.weight.clone() for name, module in arb_hf.checks.binary_modules(model).items()}
    adapted = lora.add_lora(model, r=4)
    torch.testing.assert_close(logits(adapted), before, rtol=0, atol=0)
    assert all("lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)
    assert len(trainable(adapted)) == 2 * len(planes)
    losses = train(adapted, trainable(adapted), steps=20)
    assert losses[-1] < 0.9 * losses[0]
    for name, module in arb_hf.checks.binary_modules(adapted).items():
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


def test_scales_and_adapters_train_together(model):
    adapted = lora.add_lora(model, r=4)
    steps = scales.unfreeze(adapted)
    losses = train(adapted, trainable(adapted))
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in steps)
    scales.freeze(adapted)
    assert all("lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)


def test_a_model_with_adapters_publishes_no_figures_of_other_scales(packed, tmp_path):
    model = arb_hf.from_pretrained(packed)
    model.arb_report.add(Measurement("perplexity", "wikitext2", "a test", 12.5))
    adapted = lora.add_lora(model, r=2)
    scales.unfreeze(adapted)
    scales.freeze(adapted)
    arb_hf.save_pretrained(adapted.unload(), None, tmp_path)
    report = arb_hf.load_report(tmp_path)
    assert report.scales_trained and not report.measurements


def test_adapters_come_before_trained_scales(model, packed, tmp_path):
    adapted = lora.add_lora(arb_hf.from_pretrained(packed), r=2)
    adapted.save_pretrained(tmp_path)
    scales.unfreeze(model)
    for add in (lambda: lora.add_lora(model, r=2), lambda: lora.load_lora(model, tmp_path)):
        with pytest.raises(ValueError, match=r"being trained: call arb_hf\.scales\.freeze\(model\) first"):
            add()


def test_a_dense_model_is_refused(tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(save_byte_model(tmp_path / "dense"))
    with pytest.raises(ValueError, match="no binary layers"):
        lora.lora_config(dense)
