"""LoRA on binary layers: training, saving, loading, refusals; with trained scales."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import arb_hf
from arb_hf import scales
from arb_hf.format.form import BinaryForm
from arb_hf.report import Measurement
from helpers import tiny
from helpers.byte_model import byte_tokens, logits, save_byte_model, train

pytest.importorskip("peft")
lora = pytest.importorskip("arb_hf.lora")
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT's
    pytest.mark.usefixtures("exact_kernel"),
]


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


def test_merging_into_binary_weights_is_refused_with_both_ways_out(model):
    adapted = lora.add_lora(model, r=4)
    with pytest.raises(ValueError, match=r"cannot be merged into binary weights.*arb_hf\.lora\.merge_lora"):
        adapted.merge_and_unload()
    with pytest.raises(ValueError, match=r"PEFT merges it into arb_hf\.dequantize"):
        adapted.merge_adapter()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "init_lora_weights": "gaussian", "lora_dropout": 0.1},
        {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"down_proj": 5}},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["o_proj", "lm_head"], "trainable_token_indices": [1, 2]},
    ],
    ids=["plain", "rslora", "patterns", "saved head", "head and tokens"],
)
def test_a_merged_model_is_the_packed_one_with_its_adapters(model, packed, tmp_path, options):
    adapted = lora.add_lora(model, r=4, **options)
    train(adapted, trainable(adapted), steps=2)
    adapted.save_pretrained(tmp_path)
    wanted = logits(adapted)
    assert not torch.allclose(wanted, logits(arb_hf.from_pretrained(packed)), rtol=0.01)
    dense = arb_hf.dequantize(arb_hf.from_pretrained(packed))
    torch.testing.assert_close(logits(lora.load_lora(dense, tmp_path).merge_and_unload()), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(lora.load_lora(arb_hf.from_pretrained(packed), tmp_path)), wanted, rtol=0, atol=0)
    merged = lora.merge_lora(adapted)
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    assert not arb_hf.nn.binary_modules(merged)


def test_an_adapter_of_the_dense_model_fits_the_packed_one(packed, tmp_path):
    dense = get_peft_model(
        arb_hf.dequantize(arb_hf.from_pretrained(packed)),
        LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    train(dense, trainable(dense), steps=2)
    dense.save_pretrained(tmp_path)
    again = lora.load_lora(arb_hf.from_pretrained(packed), tmp_path)
    torch.testing.assert_close(logits(again), logits(dense), rtol=1e-4, atol=1e-5)


def random_adapters(adapted, seed=0):
    """Fill every adapter with its own random numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def test_every_row_of_a_batch_gets_the_adapter_that_it_asks_for(model):
    adapted = lora.add_lora(lora.add_lora(model, r=4), "other", r=2).eval()
    random_adapters(adapted)
    ids = byte_tokens(3, 12, seed=4)

    def run(rows, **options):
        with torch.no_grad():
            return adapted(ids[rows], **options).logits

    alone = []
    for row, name in enumerate(["other", "default"]):
        adapted.set_adapter(name)
        alone.append(run([row]))
    with adapted.disable_adapter():
        alone.append(run([2]))
    mixed = run([0, 1, 2], adapter_names=["other", "default", "__base__"])
    torch.testing.assert_close(mixed, torch.cat(alone), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="non-existing adapter"):
        run([0, 1, 2], adapter_names=["other", "default", "third"])


def test_several_adapters_are_active_combined_and_deleted(model, packed, tmp_path):
    adapted = lora.add_lora(model, r=4)
    random_adapters(adapted)
    adapted.save_pretrained(tmp_path)
    one = logits(adapted.eval())
    lora.load_lora(adapted, tmp_path, adapter_name="second")
    adapted.load_adapter(str(tmp_path), "third")  # PEFT's own
    for name in ("second", "third"):
        adapted.set_adapter(name)
        torch.testing.assert_close(logits(adapted), one, rtol=0, atol=0)
    for kind in ("svd", "cat"):
        adapted.add_weighted_adapter(["second", "third"], [0.5, 0.5], kind, combination_type=kind)
        adapted.set_adapter(kind)
        torch.testing.assert_close(logits(adapted), one, rtol=1e-4, atol=1e-5)
    adapted.base_model.set_adapter(["default", "second"])
    both = logits(adapted)
    assert not torch.allclose(both, one, rtol=0.01)
    torch.testing.assert_close(logits(lora.merge_lora(adapted)), both, rtol=1e-4, atol=1e-5)


def test_a_named_adapter_is_merged_and_an_unknown_one_refused(model):
    adapted = lora.add_lora(lora.add_lora(model, r=4), "other", r=2).eval()
    random_adapters(adapted)
    adapted.set_adapter("other")
    wanted = logits(adapted)
    adapted.set_adapter("default")
    with pytest.raises(ValueError, match="no adapter third: its adapters are default, other"):
        lora.merge_lora(adapted, ["third"])
    torch.testing.assert_close(logits(lora.merge_lora(adapted, ["other"])), wanted, rtol=1e-4, atol=1e-5)


def test_a_bias_of_an_adapter_is_not_lost_in_merging(model):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".lora_bias=True. was passed")
        adapted = lora.add_lora(model, r=4, lora_bias=True)
    with pytest.raises(ValueError, match="has no bias, and an adapter has one"):
        lora.merge_lora(adapted)
    assert arb_hf.nn.binary_modules(adapted)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # PEFT's, of which arb_hf makes an error
def test_an_adapter_comes_from_a_subfolder_and_a_half_one_is_refused(model, packed, tmp_path):
    adapted = lora.add_lora(model, r=4)
    random_adapters(adapted)
    adapted.save_pretrained(tmp_path / "checkpoint-2")
    again = lora.load_lora(arb_hf.from_pretrained(packed), tmp_path, subfolder="checkpoint-2")
    torch.testing.assert_close(logits(again), logits(adapted.eval()), rtol=0, atol=0)
    file = tmp_path / "checkpoint-2" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = min(tensors)
    untouched = arb_hf.from_pretrained(packed)
    before = logits(untouched)
    save_file({f"{first}.more": tensors[first].clone()} | tensors, file)
    with pytest.raises(ValueError, match="it has 1 tensors of no use here"):
        lora.load_lora(untouched, tmp_path, subfolder="checkpoint-2")
    del tensors[first]
    save_file(tensors, file)
    with pytest.raises(ValueError, match="it lacks 1 tensors"):
        lora.load_lora(untouched, tmp_path, subfolder="checkpoint-2")
    torch.testing.assert_close(logits(untouched), before, rtol=0, atol=0)
    lora.add_lora(untouched, r=2)


def test_all_linear_means_all_binary_layers(packed):
    names = [
        {name for name, each in lora.add_lora(arb_hf.from_pretrained(packed), r=2, **options).named_parameters()}
        for options in ({}, {"target_modules": "all-linear"})
    ]
    assert names[0] == names[1]


def test_options_that_choose_targets_choose_them(model):
    def chosen(**options):
        config = lora.lora_config(model, **options)
        return {name.removeprefix("model.layers.") for name in config.target_modules}

    assert chosen(target_modules=r".*\.o_proj") == {"0.self_attn.o_proj", "1.self_attn.o_proj"}
    assert chosen(target_modules=["o_proj"], layers_to_transform=[1]) == {"1.self_attn.o_proj"}
    assert {name[0] for name in chosen(layers_to_transform=[1])} == {"1"}
    assert chosen(exclude_modules=["mlp.down_proj"]) == chosen() - {"0.mlp.down_proj", "1.mlp.down_proj"}
    assert chosen(target_modules=["0.mlp.up_proj", "lm_head"]) == {"0.mlp.up_proj", "lm_head"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["o_proj", "oproj"]},
            "target_modules: no module of this model is called oproj. Its binary",
        ),
        ({"exclude_modules": ["oproj"]}, "exclude_modules: no module of this model is called oproj"),
        ({"target_parameters": ["o.weight"]}, "target_parameters: no parameter of this model is called o.weight"),
        ({"target_modules": ".*oproj"}, "no module of this model is a target"),
        ({"rank_pattern": {"oproj": 2}}, "rank_pattern: oproj is the name of none of the targets"),
        ({"alpha_pattern": {"oproj": 2}}, "alpha_pattern: oproj is the name of none of the targets"),
        ({"modules_to_save": ["mlp"]}, "modules_to_save: mlp would train a copy of model.layers.0.mlp.gate_proj"),
        ({"use_dora": True}, "use_dora=True is not possible on binary layers: DoRA needs dense weights"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not possible on binary layers"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' is not possible"),
        ({"bias": "all"}, "bias='all' is not possible on binary layers: would change the packed model"),
        ({"layer_replication": [(0, 2), (0, 2)]}, "layer_replication=.* is not possible"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens=.* arb_hf has plain LoRA only"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_has_no_place_is_refused_by_name_before_anything_changes(model, options, message):
    with pytest.raises(ValueError, match=message):
        lora.add_lora(model, r=4, **options)
    assert not any(isinstance(each, lora.LoraBinaryLinear) for each in model.modules())


def test_options_without_a_place_are_refused_by_the_layers_too():
    config = LoraConfig(use_dora=True)
    layer = arb_hf.nn.BinaryLinear(BinaryForm(8, 32, 0, 32, 1, 1, True, "float16"))
    with pytest.raises(ValueError, match="DoRA"):
        lora.LoraBinaryLinear(layer, "default", config, r=2)


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


def test_an_offloaded_model_is_refused(packed, tmp_path):
    places = {"model.layers.0": "disk"} | dict.fromkeys(["model.embed_tokens", "model.layers.1", "model.norm"], "cpu")
    model = arb_hf.from_pretrained(
        packed, device_map=places | {"model.rotary_emb": "cpu", "lm_head": "cpu"}, offload_folder=tmp_path
    )
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.q_proj is offloaded.*load the model without offloading"
    ):
        lora.add_lora(model, r=2)


def test_a_dense_model_is_refused(tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(save_byte_model(tmp_path / "dense"))
    with pytest.raises(ValueError, match="no binary layers"):
        lora.lora_config(dense)


@pytest.fixture(scope="module")
def with_tables(tmp_path_factory):
    """Folder of a packed model whose embedding and head are int8."""
    folder = tmp_path_factory.mktemp("tables")
    tiny.save_model(folder / "dense", layers=1, tie_word_embeddings=False)
    options = {"refinement": "full", "scale_dtype": "int8", "tune_steps": 0}
    arb_hf.save_pretrained(tiny.binarize(folder / "dense", **options), None, folder / "packed")
    return folder / "packed"


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "target_parameters": ["lm_head.weight"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [1, 2]},
        {"trainable_token_indices": {"embed_tokens": [1]}},
    ],
    ids=str,
)
def test_int8_tables_take_no_adapters_and_say_what_to_do(with_tables, options):
    with pytest.raises(ValueError, match=r"stored as int8 .*embedding_dtype=.*arb_hf\.dequantize"):
        lora.add_lora(arb_hf.from_pretrained(with_tables), r=2, **options)


def test_adapters_beside_int8_tables_train_and_merge(with_tables):
    ids = torch.arange(12)[None]
    model = arb_hf.from_pretrained(with_tables, dtype=torch.float32)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    adapted = lora.add_lora(model, r=2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted(input_ids=ids, labels=ids).loss.backward()
    gradients = [each.grad for name, each in adapted.named_parameters() if "lora_" in name]
    assert all(each is not None and each.norm() > 0 for each in gradients)
    expected = adapted.eval()(ids).logits.detach()
    merged = lora.merge_lora(adapted)(ids).logits
    assert (merged - expected).norm() < 1e-2 * expected.norm()
