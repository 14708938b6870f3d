"""Loading packed models of every class: with pictures, with another head, with code of their own; and every argument."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoProcessor,
    LlamaConfig,
)

import arb_hf
from arb_hf import ArbConfig, ArbFormatError
from arb_hf.auto import auto_class, needs_trust
from helpers.byte_model import VOCABULARY, byte_tokenizer, byte_tokens
from helpers.classes import save_own_model, save_vision_model

IDS = byte_tokens(2, 16, seed=2)
OPTIONS = {"dataset": byte_tokens(), "num_samples": 4, "block_size": 32, "refinement": "paper", "iterations": 2}


def snippet(folder) -> str:
    """The code in a folder's model card, which calls the model by the folder's name, with the whole path in its place."""
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert f'"{folder.name}"' in code
    return code.replace(f'"{folder.name}"', f'"{folder}"')


def run(code: str, capsys) -> str:
    """What a snippet prints."""
    exec(code, {})
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A vision-language model in memory, and the folder that it was saved to with its processor."""
    home = tmp_path_factory.mktemp("vision")
    processor = AutoProcessor.from_pretrained(save_vision_model(home / "dense"))
    text = {"dataset": ["one text and another " * 60], "sequence_length": 32, "tokenizer": processor}
    model = AutoModelForImageTextToText.from_pretrained(
        home / "dense", quantization_config=ArbConfig(**(OPTIONS | text))
    )
    arb_hf.save_pretrained(model, processor, home / "packed")
    return model, home / "packed"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A model with code of its own, in memory and in a folder."""
    home = tmp_path_factory.mktemp("own")
    dense = save_own_model(home / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        dense, trust_remote_code=True, quantization_config=ArbConfig(**OPTIONS)
    )
    arb_hf.save_pretrained(model, byte_tokenizer(), home / "packed")
    return model, home / "packed"


def test_a_vision_language_model_comes_back_with_its_processor(vision):
    model, folder = vision
    loaded, processor = arb_hf.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert type(loaded) is type(model)
    inputs = processor(text="a text", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    tokens = [each.generate(**inputs, max_new_tokens=4, do_sample=False) for each in (model, loaded)]
    assert torch.equal(*tokens)
    assert arb_hf.evaluate.perplexity(loaded, processor, ["a text " * 20], 32) > 0


def test_the_card_of_a_vision_language_model_loads_it(vision, capsys):
    folder = vision[1]
    code = snippet(folder)
    assert "from transformers import AutoModelForImageTextToText, AutoProcessor\n" in code
    assert run(code, capsys).startswith("The capital of France is")
    assert "pipeline_tag: image-text-to-text" in (folder / "README.md").read_text()


HEADS = {
    AutoModel: set(),
    AutoModelForSequenceClassification: {"score.weight"},
    AutoModelForTokenClassification: {"score.weight", "score.bias"},
    AutoModelForQuestionAnswering: {"qa_outputs.weight", "qa_outputs.bias"},  # its prefix is another, too
}


@pytest.mark.parametrize("auto", HEADS)
def test_another_head_on_a_packed_model_is_new_and_the_rest_is_loaded(packed, tmp_path, auto, capsys):
    if auto is AutoModelForQuestionAnswering:
        pytest.importorskip("transformers", minversion="5.8")  # older ones find no backbone of another prefix
    causal = AutoModelForCausalLM.from_pretrained(packed)
    model, info = auto.from_pretrained(packed, output_loading_info=True)
    with torch.no_grad():
        assert torch.equal(model.base_model(IDS)[0], causal.model(IDS)[0])
    assert info["missing_keys"] == HEADS[auto]
    assert all(model.get_parameter(name).requires_grad for name in HEADS[auto])
    arb_hf.save_pretrained(model, byte_tokenizer(), tmp_path / "again")
    again = arb_hf.from_pretrained(tmp_path / "again")
    assert type(again) is type(model)
    with torch.no_grad():
        assert torch.equal(again(IDS)[0], model(IDS)[0])
    assert "tensor(" in run(snippet(tmp_path / "again"), capsys)


@pytest.mark.parametrize("auto", HEADS)
def test_a_backbone_that_lacks_a_tensor_is_refused_under_any_head(packed, tmp_path, auto):
    shutil.copytree(packed, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArbFormatError, match=r"tensor .*norm\.weight is missing"):
        auto.from_pretrained(tmp_path / "m")


def test_a_causal_model_that_lacks_its_own_head_is_refused(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArbFormatError, match=r"tensor lm_head\.weight is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_the_text_part_of_a_vision_language_model_loads_alone(tmp_path):
    if "qwen3_5" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no model whose text part AutoModelForCausalLM loads")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "layer_types": ["full_attention"] * 2}
    text = heads | {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "dense")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense", quantization_config=ArbConfig(**OPTIONS))
    whole.save_pretrained(tmp_path / "packed")
    part = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    part.save_pretrained(tmp_path / "part")
    again = arb_hf.from_pretrained(tmp_path / "part")
    assert type(arb_hf.from_pretrained(tmp_path / "packed")) is type(whole)
    assert type(again) is type(part) is not type(whole)
    with torch.no_grad():
        expected = whole(input_ids=IDS).logits
        assert torch.equal(part(IDS).logits, expected) and torch.equal(again(IDS).logits, expected)


def test_a_class_without_the_layers_is_told_of_the_one_that_has_them(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "m")
    config = json.loads((packed / "config.json").read_text())
    config["architectures"] = ["WiderForCausalLM"]
    config["quantization_config"]["modules"]["model.layers.0.mlp.wide_proj"] = {"salient_columns": 0}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    told = r"saved from WiderForCausalLM, and LlamaForCausalLM has no linear layer model\.layers\.0\.mlp\.wide_proj"
    with pytest.raises(ArbFormatError, match=told):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("quantization_config", ArbConfig()),
        ("state_dict", {}),
        ("ignore_mismatched_sizes", True),
        ("key_mapping", {"a": "b"}),
        ("gguf_file", "model.gguf"),
        ("use_safetensors", False),
        ("load_in_4bit", True),
    ],
)
def test_arguments_that_a_packed_model_cannot_obey_are_refused_by_name(packed, argument, value):
    with pytest.raises(ValueError, match=f"cannot take {argument}"):
        arb_hf.from_pretrained(packed, **{argument: value})


def test_arguments_that_a_packed_model_obeys(packed, tmp_path):
    model, info = arb_hf.from_pretrained(packed, output_loading_info=True, dtype=torch.bfloat16, device_map="cpu")
    assert not info["missing_keys"] and model.dtype == torch.bfloat16
    assert arb_hf.from_pretrained(packed, attn_implementation="eager").config._attn_implementation == "eager"
    shutil.copytree(packed, tmp_path / "outer" / "inner")
    inner = arb_hf.from_pretrained(tmp_path / "outer", subfolder="inner", local_files_only=True, force_download=False)
    assert inner.arb_report.matrices
    config = AutoConfig.from_pretrained(packed)
    config.rms_norm_eps = 0.5
    assert arb_hf.from_pretrained(packed, config=config).model.norm.variance_epsilon == 0.5
    assert arb_hf.from_pretrained(packed, config=str(packed)).model.norm.variance_epsilon != 0.5
    with pytest.raises(ArbFormatError, match="quant_method None"):
        arb_hf.from_pretrained(packed, config=LlamaConfig())


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "40KB"}], ids=["one", "sharded"])
def test_a_variant_is_checked_and_loaded(packed, tmp_path, shards):
    model = arb_hf.from_pretrained(packed)
    model.save_pretrained(tmp_path, variant="v", **shards)
    with torch.no_grad():
        assert torch.equal(arb_hf.from_pretrained(tmp_path, variant="v")(IDS).logits, model(IDS).logits)
    with pytest.raises(ArbFormatError, match=r"model\.safetensors is missing"):
        arb_hf.from_pretrained(tmp_path)
    with pytest.raises(ArbFormatError, match=r"model\.w\.safetensors is missing"):
        arb_hf.from_pretrained(tmp_path, variant="w")


def test_code_of_a_models_own_runs_only_if_it_is_trusted(own, tmp_path):
    model, folder = own
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for name in ("configuration_own.py", "modeling_own.py"):
        with (copy / name).open("a") as file:
            file.write(f"\nopen({str(tmp_path / name)!r}, 'w').close()\n")
    with pytest.raises(ValueError, match=r"comes with code of its own.*trust_remote_code=True, or --trust-remote-code"):
        arb_hf.from_pretrained(copy)
    assert not list(tmp_path.glob("*.py"))
    loaded = arb_hf.from_pretrained(copy, trust_remote_code=True)
    assert len(list(tmp_path.glob("*.py"))) == 2
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_the_card_of_a_model_with_code_of_its_own(own, capsys):
    card = (own[1] / "README.md").read_text()
    assert "runs code from this repository" in card
    assert run(snippet(own[1]), capsys).startswith("The capital of France is")


@pytest.mark.parametrize(
    ("model_type", "architecture", "auto"),
    [
        ("llama", "LlamaForCausalLM", "AutoModelForCausalLM"),
        ("llama", None, "AutoModelForCausalLM"),
        ("llama", "SomebodysOwnLlama", "AutoModelForCausalLM"),
        ("llama", "LlamaModel", "AutoModel"),
        ("llama", "LlamaForSequenceClassification", "AutoModelForSequenceClassification"),
        ("gemma3", "Gemma3ForConditionalGeneration", "AutoModelForImageTextToText"),
        ("gemma3_text", "Gemma3ForCausalLM", "AutoModelForCausalLM"),
        ("voxtral", "VoxtralForConditionalGeneration", "AutoModelForMultimodalLM"),
        ("t5", "T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
    ],
)
def test_the_auto_class_is_that_of_the_architecture(model_type, architecture, auto):
    config = {"model_type": model_type, "architectures": architecture and [architecture]}
    assert auto_class(config) == auto
    assert not needs_trust(config)


def test_the_auto_class_of_code_of_its_own_is_in_the_auto_map():
    own = {"AutoConfig": "a.C", "AutoModel": "b.Backbone", "AutoModelForCausalLM": "owner/name--b.Head"}
    config = {"model_type": "nobody knows", "auto_map": own}
    assert auto_class(config | {"architectures": ["Backbone"]}) == "AutoModel"
    assert auto_class(config) == "AutoModelForCausalLM"
    assert needs_trust(config)
    assert not needs_trust(config | {"model_type": "llama"})  # transformers' own class is taken


@pytest.mark.parametrize("config", [{}, {"model_type": "nobody knows"}, {"model_type": ["llama"], "auto_map": [1]}])
def test_a_config_of_no_model_is_refused(config):
    with pytest.raises(ArbFormatError, match=r"transformers .* has no language model of type"):
        auto_class(config)


def test_a_card_of_a_class_that_transformers_does_not_know_names_it(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "m")
    config = json.loads((packed / "config.json").read_text())
    config |= {"model_type": "nobody knows", "architectures": ["TheirForCausalLM"]}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    code = str(arb_hf.hub.card.model_card(tmp_path / "m")).partition("```python\n")[2].partition("```")[0]
    assert "# TheirForCausalLM is a class of the authors' own: import it from their code" in code
    assert "model = TheirForCausalLM.from_pretrained(" in code
