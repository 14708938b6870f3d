"""Tiny models of many families: binarized, saved, loaded in a fresh process, run; and what is refused."""

import importlib.util
import json
import sys

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    Gemma3TextConfig,
    GPT2Config,
    T5Config,
)
from transformers.models.falcon.modeling_falcon import FalconLinear

import arb_hf
from arb_hf import ArbCalibrationError, ArbConfig
from arb_hf.calibrate.decoder import find_decoder_layers, is_plain_linear, survey
from arb_hf.calibrate.model import binarize_model
from arb_hf.nn import BinaryExperts, BinaryLinear
from helpers.byte_model import byte_tokenizer, byte_tokens, save_byte_model
from helpers.classes import save_own_model
from helpers.models import VOCABULARY, llama, token_samples
from helpers.process import ROOT, fresh_process

SCRIPT = ROOT / "examples" / "benchmarks" / "families.py"
_spec = importlib.util.spec_from_file_location("families", SCRIPT)
families = importlib.util.module_from_spec(_spec)
sys.modules["families"] = families
_spec.loader.exec_module(families)

# Tiny state-space models keep a larger share than real ones (their state does not shrink with them).
LOW = {"mamba": 0.92, "falcon_mamba": 0.92, "jamba": 0.94, "recurrent_gemma": 0.90}
LOAD = """
import importlib.util, json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
script, folder = map(Path, {arguments!r})
spec = importlib.util.spec_from_file_location("families", script)
families = sys.modules["families"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(families)
verdicts = {{}}
for saved in sorted(folder.glob("*/packed")):
    family = saved.parent.name
    try:
        model, info = families.auto_class(family).from_pretrained(saved, output_loading_info=True)
        logits, generated = families.outputs(model)
        expected = torch.load(saved.parent / "expected.pt", weights_only=True)
        wrong = [kind for kind, names in info.items() if names]
        wrong += [] if torch.equal(logits, expected["logits"]) else ["logits"]
        wrong += [] if torch.equal(generated, expected["generated"]) else ["generated"]
        verdicts[family] = "ok" if not wrong else f"differs: {{wrong}}"
    except Exception as error:
        verdicts[family] = f"{{type(error).__name__}}: {{error}}"
print(json.dumps(verdicts))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By family: coverage, matrices and logits of the run, or its exception; and what a fresh process made of it."""
    folder = tmp_path_factory.mktemp("families")
    found = {}
    for family in families.FAMILIES:
        home = folder / family
        try:
            model = families.binarize(family, home / "dense", home / "packed")
            logits, generated = families.outputs(model)
            torch.save({"logits": logits, "generated": generated}, home / "expected.pt")
            found[family] = model.arb_report.coverage, len(model.arb_report.matrices), logits
        except Exception as error:
            found[family] = error
    done = fresh_process(LOAD.format(arguments=[str(SCRIPT), str(folder)]))
    assert done.returncode == 0, done.stderr
    return found, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", families.FAMILIES)
def test_family(results, family):
    found, loaded = results
    if isinstance(found[family], Exception):
        raise found[family]
    coverage, matrices, logits = found[family]
    assert matrices == sum(each.kept is None for each in coverage.matrices)
    assert coverage.share >= LOW.get(family, 0.95), coverage.table()
    assert torch.isfinite(logits).all()
    assert loaded[family] == "ok"


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "jamba", "qwen3_next"]
)
def test_experts_of_mixtures_are_binary(results, family):
    coverage = results[0][family][0]
    experts = [each for each in coverage.matrices if ".experts." in each.name]
    assert len(experts) >= 8
    assert all(each.kept is None for each in experts)
    routers = [each for each in coverage.matrices if each.kept and each.kept.startswith("router")]
    assert routers


def test_at_least_thirty_families_and_no_vision_tower_is_touched(results):
    assert len(families.FAMILIES) >= 30
    for family in families.VISION_LANGUAGE:
        coverage = results[0][family][0]
        assert not any("vision" in each.name or "visual" in each.name for each in coverage.matrices)
        assert all("language_model" in each.name for each in coverage.matrices)


@pytest.mark.parametrize(
    ("family", "share"),
    [("gpt2", 1.0), ("mixtral", 0.99), ("mamba", 0.95), ("mamba2", 0.95), ("recurrent_gemma", 0.95), ("gpt_oss", 0.98)],
)
def test_coverage_at_published_sizes_needs_no_weights(family, share):
    assert families.published_coverage(family).share >= share


def refusal(model, folder, auto=AutoModelForCausalLM):
    model.save_pretrained(folder)
    with pytest.raises(ArbCalibrationError) as caught:
        auto.from_pretrained(folder, quantization_config=ArbConfig(dataset=token_samples(1)))
    return str(caught.value)


def test_models_that_are_no_decoders_are_refused_with_one_sentence(tmp_path):
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    t5 = AutoModelForSeq2SeqLM.from_config(T5Config(**sizes))
    assert "encoder-decoder" in refusal(t5, tmp_path / "t5", AutoModelForSeq2SeqLM)
    bert = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    masked = AutoModelForMaskedLM.from_config(BertConfig(**bert, num_attention_heads=2))
    assert "does not generate text" in refusal(masked, tmp_path / "bert", AutoModelForMaskedLM)
    causal = BertLMHeadModel(BertConfig(**bert, num_attention_heads=2))
    assert "is an encoder" in refusal(causal, tmp_path / "causal", BertLMHeadModel)
    classifier = BertForSequenceClassification(BertConfig(**bert, num_attention_heads=2))
    assert "its backbone is no decoder's" in refusal(classifier, tmp_path / "seq", AutoModelForSequenceClassification)
    both_ways = Gemma3TextConfig(**bert, num_attention_heads=2, num_key_value_heads=1, use_bidirectional_attention=True)
    assert "its backbone is no decoder's" in refusal(AutoModel.from_config(both_ways), tmp_path / "both", AutoModel)
    crossed = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, add_cross_attention=True)
    crossed.bos_token_id = crossed.eos_token_id = 1
    assert "attends to an encoder" in refusal(AutoModelForCausalLM.from_config(crossed), tmp_path / "crossed")


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_a_decoder_under_another_head_is_binarized_as_under_a_language_models(auto, tmp_path):
    llama().save_pretrained(tmp_path)
    config = {"dataset": token_samples(4), "refinement": "paper", "iterations": 2, "block_size": 32}
    causal = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=ArbConfig(**config))
    model = auto.from_pretrained(tmp_path, quantization_config=ArbConfig(**config))
    expected, found = causal.model.state_dict(), model.base_model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert isinstance(model.base_model.layers[0].mlp.up_proj, BinaryLinear)


def test_a_class_under_which_transformers_finds_no_backbone_is_refused(tmp_path):
    message = refusal(llama(), tmp_path, AutoModelForQuestionAnswering)
    assert "which expects transformer.* where the files have model.*" in message
    assert "binarize the checkpoint with AutoModelForCausalLM" in message


# Code of a model's own may lack what transformers' models have; config.json has nothing but its type.
OWN = {
    "plain": {},
    "embeddings": {"embeddings": "other = None"},
    "arguments": {"arguments": "input_ids"},
    "generation": {"bases": "PreTrainedModel"},
    "output": {"output": "(self.lm_head(hidden),)"},
}


@pytest.mark.parametrize("lacks", OWN)
def test_a_model_with_code_of_its_own_is_binarized_and_measured(lacks, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    dense = save_own_model(tmp_path / lacks, **OWN[lacks])
    config = ArbConfig(dataset=["some text and more " * 30], num_samples=4, sequence_length=32, block_size=32)
    model = AutoModelForCausalLM.from_pretrained(dense, trust_remote_code=True, quantization_config=config)
    assert isinstance(model.layers[1].up, BinaryLinear)
    model.save_pretrained(tmp_path / "packed")
    loaded = arb_hf.from_pretrained(tmp_path / "packed", trust_remote_code=True)
    windows = byte_tokens(2, 20)
    value = arb_hf.evaluate.perplexity(loaded, windows)
    assert value == arb_hf.evaluate.perplexity(model, windows)
    item = {"query": "Water is", "choices": ["wet", "a stone"], "gold": 0}
    assert arb_hf.evaluate.multiple_choice(loaded, byte_tokenizer(), [item]).items == 1
    assert not hasattr(loaded.config, "use_cache")


def test_tokens_beyond_the_embeddings_are_refused_where_the_config_has_no_vocabulary(tmp_path):
    dense = save_own_model(tmp_path / "vocabulary")
    config = ArbConfig(dataset=[torch.full((20,), 300)])
    with pytest.raises(ArbCalibrationError, match="has token 300, the model's vocabulary has 257"):
        AutoModelForCausalLM.from_pretrained(dense, trust_remote_code=True, quantization_config=config)


def test_a_tokenizer_with_code_of_its_own_is_asked_for_as_an_object(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    folder = save_byte_model(tmp_path / "dense")
    stored = json.loads((folder / "tokenizer_config.json").read_text())
    stored |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(stored))
    (folder / "own.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(
        ArbCalibrationError, match=r"tokenizer=AutoTokenizer\.from_pretrained\(\.\.\., trust_remote_code=True"
    ):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=ArbConfig(dataset=["text"], sequence_length=8))


def test_a_generation_config_that_cannot_be_saved_is_refused_before_calibration():
    model = llama(1)
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.5
    with pytest.raises(ArbCalibrationError, match=r"generation_config\.json could not be saved"):
        binarize_model(model, ArbConfig(dataset=token_samples(1)), [])


def test_models_that_change_states_between_layers_are_refused(monkeypatch, tmp_path):
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.LlamaDecoderLayer.__call__
    monkeypatch.setattr(
        modeling_llama.LlamaDecoderLayer, "__call__", lambda self, hidden, **rest: plain(self, hidden, **rest) / 2
    )
    message = refusal(llama(3), tmp_path)
    assert "changes the hidden states between decoder layers 0 and 1" in message


def test_a_linear_that_is_never_called_is_kept(tmp_path, monkeypatch, caplog):
    from transformers.models.llama import modeling_llama

    def direct(self, x):
        return self.down_proj(self.act_fn(nn.functional.linear(x, self.gate_proj.weight)) * self.up_proj(x))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", direct)
    llama().save_pretrained(tmp_path / "dense")
    config = ArbConfig(dataset=token_samples(2), refinement="paper", iterations=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert type(model.model.layers[0].mlp.gate_proj) is nn.Linear
    assert "never called" in caplog.text
    assert any(each.kept == "its model does not call it" for each in model.arb_report.coverage.matrices)
    model.save_pretrained(tmp_path / "packed")
    loaded = arb_hf.from_pretrained(tmp_path / "packed")
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, loaded(ids).logits)


def test_plain_linears():
    assert is_plain_linear(nn.Linear(2, 2))
    assert is_plain_linear(FalconLinear(2, 2))

    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x).topk(2)

    class Named(nn.Linear):
        pass

    assert is_plain_linear(Named(2, 2))
    assert not is_plain_linear(Router(2, 2))
    assert not is_plain_linear(nn.Embedding(2, 2))


def test_tied_weights_inside_the_decoder_stay_dense():
    model = llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    coverage = survey(model, *find_decoder_layers(model), ArbConfig(), ["lm_head"])
    kept = {each.name: each.kept for each in coverage.matrices if each.kept}
    assert kept == {f"model.layers.{n}.mlp.up_proj": "tied to another module's weight" for n in (0, 1)}


def test_a_conv1d_keeps_its_output_and_comes_back(results, tmp_path):
    dense = families.tiny_model("gpt2")
    model = families.binarize("gpt2", tmp_path / "dense", tmp_path / "packed")
    assert isinstance(model.transformer.h[0].attn.c_attn, BinaryLinear)
    assert model.transformer.h[0].attn.c_attn.out_features == 3 * 64
    assert not any(isinstance(module, BinaryExperts) for module in model.modules())
    logits, dense_logits = families.outputs(model)[0], families.outputs(dense)[0]
    assert (logits - dense_logits).norm() < 0.6 * dense_logits.norm()
