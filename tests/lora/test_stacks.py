"""Adapters of stacked experts: the same file on the packed and on the dense model, every part of it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import arb_hf
from helpers.families import families, save_family

pytest.importorskip("peft")
lora = pytest.importorskip("arb_hf.lora")
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict  # noqa: E402

from arb_hf.lora.layers import LoraBinaryStack  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT's
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),  # PEFT's, of parameters
    pytest.mark.usefixtures("exact_kernel"),
]
IDS = families.tokens(2, 9)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Packed models by family, made when first asked for."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = save_family(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture
def load(saved):
    return lambda family="mixtral": AutoModelForCausalLM.from_pretrained(saved(family))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def filled(model, seed=0):
    """The same model with random numbers in every adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def difference(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_oss", "llama4_text", "deepseek_v3", "qwen3_moe", "mamba"])
def test_adapters_of_every_binary_layer_merge_without_loss(family, saved, load):
    assert families.merged_difference(family, saved(family)) < 1e-5
    model = load(family)
    matrices = set(arb_hf.nn.binary_modules(model))
    adapted = lora.add_lora(model, r=2)
    found = set()
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, lora.LoraBinaryLinear):
            found.add(name)
        elif isinstance(module, LoraBinaryStack):
            holder = name.replace(".base_layer", "")
            found |= {f"{holder}.{number}.{module.name}" for number in range(module.layout.count)}
    assert found == {name for name in matrices if family != "mamba" or not name.endswith("out_proj")}  # PEFT refuses it


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_what_is_saved_is_what_peft_saves_of_the_dense_model(family, load, tmp_path):
    adapted = filled(lora.add_lora(load(family), r=2))
    adapted.save_pretrained(tmp_path)
    dense = PeftModel.from_pretrained(arb_hf.dequantize(load(family)), tmp_path)
    ours, theirs = get_peft_model_state_dict(adapted), get_peft_model_state_dict(dense)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert difference(logits(dense), logits(adapted)) < 1e-5


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
        ("mixtral", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
        ("mixtral", {"target_modules": ["w1", "w2", "w3", "q_proj"]}),  # names of transformers 4
        ("qwen3_moe", {"target_modules": "all-linear"}),
        ("deepseek_v3", {"target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"]}),
        ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": ["1.mlp.experts.gate_up_proj"]}),
        ("llama4_text", {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    ],
)
def test_an_adapter_of_the_dense_model_works_on_the_packed_one(family, options, load, tmp_path):
    dense = get_peft_model(arb_hf.dequantize(load(family)), LoraConfig(task_type="CAUSAL_LM", r=2, **options))
    filled(dense).save_pretrained(tmp_path / "dense")
    wanted = logits(dense)
    adapted = lora.load_lora(load(family), tmp_path / "dense")
    assert difference(logits(adapted), wanted) < 1e-5 < 0.01 < difference(logits(load(family)), wanted)
    adapted.save_pretrained(tmp_path / "packed")
    assert (
        difference(logits(PeftModel.from_pretrained(arb_hf.dequantize(load(family)), tmp_path / "packed")), wanted)
        < 1e-5
    )


def test_a_file_of_single_experts_from_transformers_4_works(load, tmp_path):
    dense, tensors = arb_hf.dequantize(load()), {}
    generator = torch.Generator().manual_seed(0)

    def pair(name, weight):
        """Factors under the old name; what they add, for an alpha of 8 over a rank of 2."""
        out_features, in_features = weight.shape
        a, b = (
            torch.randn(2, in_features, generator=generator) / 9,
            torch.randn(out_features, 2, generator=generator) / 9,
        )
        tensors[f"base_model.model.{name}.lora_A.weight"], tensors[f"base_model.model.{name}.lora_B.weight"] = a, b
        weight += 4 * b @ a

    for number, layer in enumerate(dense.model.layers):
        experts = layer.mlp.experts
        for expert in range(experts.down_proj.shape[0]):
            name = f"model.layers.{number}.block_sparse_moe.experts.{expert}"
            first, third = experts.gate_up_proj.data[expert].chunk(2)
            pair(f"{name}.w1", first)
            pair(f"{name}.w3", third)
            pair(f"{name}.w2", experts.down_proj.data[expert])
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    LoraConfig(r=2, lora_alpha=8, target_modules=["w1", "w2", "w3"]).save_pretrained(tmp_path)
    assert difference(logits(lora.load_lora(load(), tmp_path)), logits(dense)) < 1e-5


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_several_adapters(family, load, tmp_path):
    adapted = filled(lora.add_lora(load(family), r=2))
    adapted.save_pretrained(tmp_path)
    one = logits(adapted)
    lora.load_lora(adapted, tmp_path, adapter_name="b")
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(load(family)))
    adapted.base_model.set_adapter(["default", "b"])
    both = logits(adapted)
    adapted.delete_adapter("default")
    assert torch.equal(logits(adapted), one)
    dense = PeftModel.from_pretrained(arb_hf.dequantize(load(family)), tmp_path)
    dense.load_adapter(tmp_path, "b")
    dense.base_model.set_adapter(["default", "b"])
    assert difference(logits(dense), both) < 1e-5 < difference(one, both)


def test_combinations_are_right_or_refused(load):
    adapted = filled(lora.add_lora(load(), r=8))
    lora.add_lora(adapted, "b", r=8)
    adapted.add_weighted_adapter(["default"], [1.0], "copy", combination_type="linear")
    wanted = logits(adapted)
    adapted.set_adapter("copy")
    assert difference(logits(adapted), wanted) < 1e-6
    for kind in ("cat", "linear"):
        lora.add_lora(adapted, kind, r=8, lora_alpha=8 if kind == "cat" else 16)
        with pytest.raises(ValueError, match="ranks of stacked experts were chosen for r=8"):
            adapted.add_weighted_adapter([kind, "b"], [1, 1], f"{kind} of two", combination_type=kind)
    with pytest.raises(ValueError, match="cannot be combined by their products"):
        adapted.add_weighted_adapter(["default", "b"], [1, 1], "svd", combination_type="svd")


def test_rows_of_a_mixed_batch_are_refused_where_experts_have_adapters(load):
    adapted = lora.add_lora(lora.add_lora(load(), r=2), "b", r=2).eval()
    with pytest.raises(ValueError, match="adapter_names is not possible where stacked experts have adapters"):
        adapted(input_ids=IDS, adapter_names=["default", "b"])
    attention = lora.add_lora(
        lora.add_lora(load(), r=2, target_modules=["o_proj"]), "b", r=2, target_modules=["o_proj"]
    )
    filled(attention)
    wanted = []
    for row, name in enumerate(["default", "b"]):
        attention.set_adapter(name)
        wanted.append(logits(attention)[row])
    with torch.no_grad():
        mixed = attention(input_ids=IDS, adapter_names=["default", "b"]).logits
    torch.testing.assert_close(mixed, torch.stack(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["experts.0.down_proj"]}, "1 of the 4 experts of model.layers.0.mlp.experts"),
        ({"target_modules": ["w1", "w2"]}, "w1 of experts is one matrix with w3; name gate_up_proj instead"),
        ({"modules_to_save": ["down_proj"]}, "would train a copy of model.layers.0.mlp.experts.0.down_proj"),
        ({"lora_bias": True}, "lora_bias is not possible for stacked experts"),
    ],
)
def test_what_stacked_experts_cannot_do_is_refused(options, message, load):
    with pytest.raises(ValueError, match=message):
        lora.add_lora(load(), r=2, **options)


def test_all_adapters_are_for_the_same_projections(load, tmp_path):
    adapted = lora.add_lora(load(), r=2)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has adapters of gate_up_proj and down_proj, the new one is for down_proj"):
        lora.add_lora(adapted, "b", target_modules=["down_proj"])
    with pytest.raises(ValueError, match=r"arb_hf\.lora\.load_lora\(model, path, adapter_name"):
        adapted.load_adapter(tmp_path, "b")
    assert list(adapted.peft_config) == ["default"]


def test_ranks_of_single_projections(load, tmp_path):
    adapted = filled(lora.add_lora(load(), r=2, rank_pattern={"down_proj": 3}, alpha_pattern={"gate_up_proj": 5}))
    stack = adapted.get_base_model().model.layers[0].mlp.experts
    assert {name: (each.r["default"], each.lora_alpha["default"]) for name, each in stack.stacks.items()} == {
        "gate_up_proj": (2, 5),
        "down_proj": (3, 8),
    }
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(lora.load_lora(load(), tmp_path)), logits(adapted))
    dense = PeftModel.from_pretrained(arb_hf.dequantize(load()), tmp_path).merge_and_unload()
    assert difference(logits(dense), logits(adapted)) < 1e-5


def test_experts_with_scales_in_training(load):
    adapted = filled(lora.add_lora(load(), r=2))
    before = logits(adapted)
    steps = arb_hf.scales.unfreeze(adapted)
    torch.testing.assert_close(logits(adapted), before, rtol=1e-4, atol=1e-5)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert sum(step.grad is not None for step in steps) > len(steps) // 2  # some experts saw no token
    with pytest.raises(ValueError, match=r"arb_hf\.scales\.freeze"):
        lora.merge_lora(adapted)
    arb_hf.scales.freeze(adapted)
    torch.testing.assert_close(logits(adapted), before, rtol=1e-4, atol=1e-5)
