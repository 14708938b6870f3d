"""PEFT's own ways onto a packed model: they work, or say how arb_hf does it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import arb_hf
from helpers.byte_model import byte_tokens, logits, save_packed, train
from helpers.families import save_family

peft = pytest.importorskip("peft")
lora = pytest.importorskip("arb_hf.lora")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT's
    pytest.mark.usefixtures("exact_kernel"),
]


@pytest.fixture(scope="module")
def adapter(packed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    adapted = lora.add_lora(arb_hf.from_pretrained(packed), r=2)
    train(adapted, [each for each in adapted.parameters() if each.requires_grad], steps=2)
    adapted.save_pretrained(folder)
    return folder


def plain(**options):
    return peft.LoraConfig(task_type="CAUSAL_LM", **options)


WAYS = {
    "get_peft_model": lambda model, folder: peft.get_peft_model(model, plain(target_modules=["q_proj"])),
    "a dense layer": lambda model, folder: peft.get_peft_model(model, plain(target_modules=["lm_head"])),
    "a parameter": lambda model, folder: peft.get_peft_model(
        model, plain(target_modules=[], target_parameters=["q_proj.weight"])
    ),
    "add_adapter": lambda model, folder: model.add_adapter(plain(target_modules=["q_proj"])),
    "load_adapter": lambda model, folder: model.load_adapter(str(folder)),
    "PeftModel": lambda model, folder: peft.PeftModel.from_pretrained(model, folder),
    "AutoPeftModel": lambda model, folder: peft.AutoPeftModelForCausalLM.from_pretrained(folder),
    "AutoModel": lambda model, folder: AutoModelForCausalLM.from_pretrained(folder),
    "IA3": lambda model, folder: peft.get_peft_model(
        model, peft.IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[])
    ),
    "OFT": lambda model, folder: peft.get_peft_model(model, peft.OFTConfig(target_modules=["q_proj"])),
    "LoHa": lambda model, folder: peft.get_peft_model(model, peft.LoHaConfig(target_modules=["q_proj"])),
    "AdaLoRA": lambda model, folder: peft.get_peft_model(
        model, peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9)
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_peft_alone_is_sent_to_arb_hf(way, packed, adapter):
    with pytest.raises((ValueError, TypeError), match=r"arb_hf\."):
        WAYS[way](arb_hf.from_pretrained(packed), adapter)


def test_peft_does_not_adapt_the_few_dense_linears_of_a_mixture_alone(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_family("mixtral", tmp_path))
    with pytest.raises(ValueError, match=r"PEFT alone does not know packed layers: .* arb_hf\.lora\.add_lora"):
        peft.get_peft_model(model, plain(target_modules="all-linear"))


def test_a_config_of_arb_hf_serves_pefts_functions(packed, adapter):
    wanted = logits(lora.load_lora(arb_hf.from_pretrained(packed), adapter))
    weights = peft.load_peft_weights(adapter, device="cpu")
    model = arb_hf.from_pretrained(packed)
    adapted = peft.get_peft_model(model, lora.lora_config(model, r=2))
    assert not peft.set_peft_model_state_dict(adapted, weights).unexpected_keys
    torch.testing.assert_close(logits(adapted), wanted, rtol=0, atol=0)
    model = arb_hf.from_pretrained(packed)
    model.add_adapter(lora.lora_config(model, r=2))
    assert not peft.set_peft_model_state_dict(model, weights).unexpected_keys
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
    ],
    ids=lambda config: type(config).__name__,
)
@pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:Converting a tensor")
def test_what_does_not_touch_binary_layers_works_and_is_no_lora(config, packed, tmp_path):
    adapted = peft.get_peft_model(arb_hf.from_pretrained(packed), config)
    parameters = [each for each in adapted.parameters() if each.requires_grad]
    losses = train(adapted, parameters, steps=3)
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(arb_hf.from_pretrained(packed), tmp_path)
    torch.testing.assert_close(logits(again.eval()), logits(adapted), rtol=0, atol=0)
    with pytest.raises(ValueError, match="not LoRA: "):
        lora.load_lora(arb_hf.from_pretrained(packed), tmp_path)


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "int8"])
def test_preparing_for_training_leaves_a_packed_model_as_it_is(scale_dtype, tmp_path):
    folder = save_packed(tmp_path, scale_dtype=scale_dtype)
    model = arb_hf.from_pretrained(folder)
    before = logits(model)
    prepared = peft.prepare_model_for_kbit_training(model)
    assert any(each.dtype != torch.float32 for each in model.state_dict().values() if each.is_floating_point())
    torch.testing.assert_close(logits(prepared), before, rtol=0, atol=0)
    peft.prepare_model_for_kbit_training(prepared)
    arb_hf.save_pretrained(prepared, None, tmp_path / "again")
    torch.testing.assert_close(logits(arb_hf.from_pretrained(tmp_path / "again")), before, rtol=0, atol=0)


def test_a_prepared_model_trains_adapters_and_scales(packed):
    adapted = lora.add_lora(peft.prepare_model_for_kbit_training(arb_hf.from_pretrained(packed)), r=2)
    arb_hf.scales.unfreeze(adapted)
    losses = train(adapted, [each for each in adapted.parameters() if each.requires_grad], steps=3)
    assert losses[-1] < losses[0]


def test_gradients_are_recomputed_through_adapters(packed):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        adapted = lora.add_lora(arb_hf.from_pretrained(packed), r=2, init_lora_weights=False).train()
        if checkpointing:
            adapted.enable_input_require_grads()
            adapted.gradient_checkpointing_enable()
        ids = byte_tokens(2, 12)
        adapted(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: each.grad for name, each in adapted.named_parameters() if each.requires_grad})
    assert all(torch.allclose(each, gradients[1][name], rtol=1e-4, atol=1e-7) for name, each in gradients[0].items())
