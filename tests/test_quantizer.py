"""Through transformers: binarize on the fly, save, load in fresh processes, refuse what is damaged."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import arb_hf
from arb_hf import ArbCalibrationError, ArbConfig, ArbFormatError
from arb_hf.nn import BinaryLinear
from helpers.byte_model import byte_tokens, save_byte_model
from helpers.models import llama, token_samples, word_tokenizer, words
from helpers.process import fresh_process

IDS = token_samples(1, 20, seed=9)[0][None]


def config(**options) -> ArbConfig:
    return ArbConfig(
        **({"dataset": token_samples(), "refinement": "paper", "iterations": 3, "batch_size": 4} | options)
    )


def binarize(folder, dtype=torch.float32, **options):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config(**options), dtype=dtype)


@pytest.fixture(scope="module")
def packed(tiny_model, tmp_path_factory):
    """A binarized tiny model, the folder it is saved in, and its logits."""
    model = binarize(tiny_model)
    folder = tmp_path_factory.mktemp("packed")
    model.save_pretrained(folder)
    return model, folder, model(IDS).logits


def test_every_linear_of_the_decoder_is_binary_and_nothing_else(packed):
    model, _, _ = packed
    binary = {name for name, module in model.named_modules() if isinstance(module, BinaryLinear)}
    assert len(binary) == 2 * 7
    assert all(name.startswith("model.layers.") for name in binary)
    assert type(model.lm_head) is torch.nn.Linear
    assert set(model.config.quantization_config.modules) == binary
    assert "lm_head" in model.config.quantization_config.modules_to_not_convert


def test_report_summary_and_bits_agree(packed, tmp_path):
    model, folder, _ = packed
    report = model.arb_report
    assert len(report.matrices) == 14
    assert report.samples == 8
    assert report.tokens == 8 * 48
    assert report.bits_per_weight == pytest.approx(arb_hf.bits_per_weight(model))
    on_disk = sum(
        tensor.numel() * tensor.element_size() * 8
        for name, tensor in load_file(folder / "model.safetensors").items()
        if ".layers." in name and "norm" not in name
    )
    assert on_disk / sum(each.weights for each in report.matrices) == pytest.approx(report.bits_per_weight)
    assert all(0 < each.solve.output_error < 1 for each in report.matrices)
    assert json.loads(report.to_json(tmp_path / "r.json"))["matrices"][0]["kind"] == "self_attn.q_proj"
    assert len(report.to_csv().splitlines()) == 15
    report.plot(tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 10_000
    assert "self_attn.q_proj" in arb_hf.summary(model)
    assert f"{report.bits_per_weight:.3f}" in arb_hf.summary(model)


def test_calibration_reduces_the_loss_of_outputs(tiny_model):
    """Later layers see the binarized prefix, and the whole model stays nearer to the original than without data."""
    dense = AutoModelForCausalLM.from_pretrained(tiny_model)(IDS).logits
    worse = binarize(tiny_model, method="billm", iterations=15)(IDS).logits
    better = binarize(tiny_model, method="arb-rc")(IDS).logits
    assert (better - dense).square().mean() < (worse - dense).square().mean()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_process_gives_identical_logits(tiny_model, tmp_path, dtype):
    model = binarize(tiny_model, getattr(torch, dtype))
    logits = model(IDS).logits
    assert logits.dtype == getattr(torch, dtype)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    save_file({"ids": IDS, "logits": logits}, tmp_path / "expected.st")
    result = fresh_process(f"""
import torch, arb_hf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
expected = load_file({str(tmp_path / "expected.st")!r})
for load in (AutoModelForCausalLM.from_pretrained, arb_hf.from_pretrained):
    model = load({str(tmp_path)!r}, dtype=torch.{dtype})
    assert torch.equal(model(expected["ids"]).logits, expected["logits"])
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("proj.row_parameters"))
model = arb_hf.from_pretrained({str(tmp_path)!r})
assert model.dtype == torch.{dtype}
assert model.generate(expected["ids"], max_new_tokens=4, do_sample=False).shape[1] == expected["ids"].shape[1] + 4
print("identical")
""")
    assert result.stdout.strip().endswith("identical"), result.stderr


def test_without_the_plugin_loading_raises(packed):
    _, folder, _ = packed
    result = fresh_process(f"""
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(folder)!r})
""")
    assert result.returncode != 0
    assert "arb_hf" in result.stderr  # the warning names the package to import
    assert "size mismatch" in result.stderr or "mismatch" in result.stderr.lower()


def test_saving_a_loaded_model_again_changes_nothing(packed, tmp_path):
    _, folder, logits = packed
    again = arb_hf.from_pretrained(folder)
    again.save_pretrained(tmp_path)
    assert torch.equal(arb_hf.from_pretrained(tmp_path)(IDS).logits, logits)
    first, second = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (folder / "config.json").read_text() == (tmp_path / "config.json").read_text()


def test_tied_embeddings_stay_tied_and_dense(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    model = binarize(tmp_path / "dense")
    logits = model(IDS).logits
    model.save_pretrained(tmp_path / "packed")
    assert "lm_head.weight" not in load_file(tmp_path / "packed" / "model.safetensors")
    again = arb_hf.from_pretrained(tmp_path / "packed")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(IDS).logits, logits)


@pytest.mark.parametrize("options", [{"scale_dtype": "int8"}, {"scale_dtype": "bfloat16"}, {"group_bitmap": False}])
def test_other_forms_survive_saving(tiny_model, tmp_path, options):
    model = binarize(tiny_model, torch.bfloat16, method="arb", **options)
    logits = model(IDS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(arb_hf.from_pretrained(tmp_path)(IDS).logits, logits)


def test_runs_are_reproducible_and_leave_the_global_seed_alone(tiny_model):
    text = [words(600)]
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    options = {"dataset": text, "num_samples": 6, "sequence_length": 32}
    first, second = (binarize(tiny_model, seed=1, **options).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = binarize(tiny_model, seed=2, **options).state_dict()
    assert any(first[name].shape != other[name].shape or not torch.equal(first[name], other[name]) for name in first)


def test_tokenizer_can_be_the_models_own_or_given(tiny_model):
    text = {"dataset": [words(600)], "num_samples": 4, "sequence_length": 32}
    own = binarize(tiny_model, **text).state_dict()
    given = binarize(tiny_model, tokenizer=word_tokenizer(), **text).state_dict()
    named = binarize(tiny_model, tokenizer=str(tiny_model), **text).state_dict()
    assert all(torch.equal(own[name], given[name]) and torch.equal(own[name], named[name]) for name in own)


def test_padding_never_enters_the_hessian(tiny_model):
    """Left-out padding: samples cut to length and the same samples padded, with masks, give the same signs."""
    short = token_samples(8, 24)
    padded = [
        {"input_ids": torch.cat([ids, torch.full((9,), 5)]), "attention_mask": torch.tensor([1] * 24 + [0] * 9)}
        for ids in short
    ]
    one = binarize(tiny_model, dataset=short).arb_report
    other = binarize(tiny_model, dataset=padded).arb_report
    assert one.tokens == other.tokens == 8 * 24
    for a, b in zip(one.matrices, other.matrices, strict=True):
        assert a.solve.output_error == pytest.approx(b.solve.output_error, rel=1e-2)


def test_skipped_modules_add_to_the_default_list(tiny_model, tmp_path):
    model = binarize(tiny_model, modules_to_not_convert=["down_proj", "model.layers.1.self_attn"])
    binary = {name for name, module in model.named_modules() if isinstance(module, BinaryLinear)}
    assert len(binary) == 6 + 2
    assert type(model.lm_head) is torch.nn.Linear
    logits = model(IDS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(arb_hf.from_pretrained(tmp_path)(IDS).logits, logits)


def test_dequantize_gives_dense_layers_with_the_same_outputs(packed):
    _, folder, logits = packed
    model = arb_hf.dequantize(arb_hf.from_pretrained(folder))
    assert not any(isinstance(module, BinaryLinear) for module in model.modules())
    torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    assert not hasattr(model.config, "quantization_config")


def test_dequantize_gives_the_type_the_model_is_in(packed):
    model = arb_hf.dequantize(arb_hf.from_pretrained(packed[1], dtype=torch.float32).to(torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(IDS).logits.isfinite().all()


def test_nothing_of_the_makers_disk_is_stored(tiny_model, tmp_path):
    (tmp_path / "secret").mkdir()
    path = tmp_path / "secret" / "text.txt"
    path.write_text(words(600))
    model = binarize(tiny_model, dataset=str(path), num_samples=4, sequence_length=32, tokenizer=str(tiny_model))
    model.save_pretrained(tmp_path / "packed")
    stored = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert stored["dataset"] == "text.txt"
    assert "secret" not in json.dumps(stored)
    assert str(tiny_model) not in json.dumps(stored)


def test_non_finite_models_are_refused_by_name(tmp_path):
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ArbCalibrationError, match=r"model\.layers\.1\.mlp\.up_proj.*not finite: 1 of"):
        binarize(tmp_path)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 0
    model.model.embed_tokens.weight.data[:] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(ArbCalibrationError, match=r"model\.layers\.0\.self_attn\.q_proj.*not finite"):
        binarize(tmp_path)


def test_bad_data_is_refused_before_the_first_forward_pass(tiny_model, monkeypatch):
    monkeypatch.setattr("arb_hf.calibrate.model.capture", lambda *_: pytest.fail("a forward pass was spent"))
    with pytest.raises(ArbCalibrationError, match="has 20 tokens, fewer than one sequence"):
        binarize(tiny_model, dataset=[words(20)], sequence_length=32)


# Damaged checkpoints --------------------------------------------------------------------------------------------------


def damage_config(folder, change):
    path = folder / "config.json"
    stored = json.loads(path.read_text())
    change(stored["quantization_config"])
    path.write_text(json.dumps(stored))


def damage_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


Q = "model.layers.0.self_attn.q_proj"
W = f"{Q}.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(f"{Q}.second_plane"), rf"model\.safetensors: tensor {Q}\.second_plane is missing"),
        (lambda t: t.update({W: t[W][:-1].contiguous()}), rf"tensor {Q}\.weight is I32 \[2, 96\]"),
        (lambda t: t.update({W: t[W].float()}), rf"tensor {Q}\.weight is F32"),
        (lambda t: t.update({f"{Q}.extra": t[W].clone()}), rf"surplus tensor {Q}\.extra"),
        (lambda t: t[f"{Q}.row_parameters"].fill_(float("nan")), rf"{Q}\.row_parameters holds NaN"),
        (lambda t: t[f"{Q}.salient_columns"].fill_(255), rf"{Q}\.salient_columns marks 96 columns"),
        (lambda t: t.pop("model.norm.weight"), r"model\.safetensors: tensor model\.norm\.weight is missing"),
        (lambda t: t.update({"model.stray": torch.zeros(2)}), "unexpected keys in the checkpoint: model.stray"),
    ],
)
def test_damaged_tensors_are_refused(packed, tmp_path, damage, message):
    shutil.copytree(packed[1], tmp_path / "m")
    damage_tensors(tmp_path / "m", damage)
    with pytest.raises(ArbFormatError, match=message):
        arb_hf.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.update(format_version=99), "format_version 99 is newer"),
        (lambda c: c.update(modules={}), "modules is missing or empty"),
        (lambda c: c["modules"].update({"model.layers.7.q": {"salient_columns": 1}}), "no such module"),
        (lambda c: c["modules"].update({"model.norm": {"salient_columns": 1}}), "not a linear layer"),
        (lambda c: c["modules"].update({Q: {"salient_columns": 97}}), "97 salient columns of 96"),
        (lambda c: c.update(method="arb"), "expected"),
    ],
)
def test_damaged_configs_are_refused(packed, tmp_path, damage, message):
    shutil.copytree(packed[1], tmp_path / "m")
    damage_config(tmp_path / "m", damage)
    with pytest.raises(ArbFormatError, match=message):
        arb_hf.from_pretrained(tmp_path / "m")


def test_truncated_files_are_refused(packed, tmp_path):
    shutil.copytree(packed[1], tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArbFormatError, match=r"model\.safetensors: not a readable safetensors file"):
        arb_hf.from_pretrained(tmp_path / "m")


def test_dense_models_are_refused_by_checked_loading(tiny_model):
    with pytest.raises(ArbFormatError, match="is not a model packed by arb_hf"):
        arb_hf.from_pretrained(tiny_model)


def test_dequantizing_works_after_saving_too(packed, tmp_path):
    _, folder, logits = packed
    model = arb_hf.from_pretrained(folder)
    model.save_pretrained(tmp_path)  # turns config.dtype into its name
    dense = arb_hf.dequantize(model)
    assert not any(isinstance(module, BinaryLinear) for module in dense.modules())
    torch.testing.assert_close(dense(IDS).logits, logits, rtol=1e-2, atol=1e-2)


def test_tensor_parallelism_is_refused_by_name_before_weights_are_read(packed, tiny_model):
    """One process suffices: transformers wants to split over as many as there are."""
    _, folder, _ = packed
    result = fresh_process(
        f"""
import torch.distributed, arb_hf
torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
from transformers import AutoModelForCausalLM
config = arb_hf.ArbConfig(dataset=["w1 w2"])
for source, options in (({str(folder)!r}, {{}}), ({str(tiny_model)!r}, {{"quantization_config": config}})):
    try:
        AutoModelForCausalLM.from_pretrained(source, tp_plan="auto", **options)
    except ValueError as error:
        assert "does not support tensor parallelism" in str(error) and "device_map='auto'" in str(error), error
        assert "serve it with vLLM" in str(error), error
        print("refused")
""",
        RANK="0",
        WORLD_SIZE="1",
        LOCAL_RANK="0",
    )
    assert result.stdout.count("refused") == 2, result.stderr


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_device_map_auto_sizes_a_packed_model_to_the_byte(tmp_path, monkeypatch, tied):
    save_byte_model(tmp_path / "dense", tie_word_embeddings=tied)
    config = arb_hf.ArbConfig(dataset=byte_tokens(), num_samples=4, block_size=32, tune_steps=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    arb_hf.save_pretrained(model, None, tmp_path / "packed")
    sizes, compute = [], transformers.integrations.accelerate.compute_module_sizes

    def noted(*args, **kwargs):
        found = compute(*args, **kwargs)
        sizes.append(found[0][""])
        return found

    monkeypatch.setattr(transformers.integrations.accelerate, "compute_module_sizes", noted)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map="auto", max_memory={"cpu": "1GB"})
    tensors = {each.data_ptr(): each for each in (*model.parameters(), *model.buffers())}
    assert max(sizes) == sum(
        each.nbytes for each in tensors.values()
    )  # transformers 5.0 asks for the buffers' alone too
