"""Embeddings and heads as int8 tables: made by a run, saved, loaded, moved, copied, trained through, and made dense."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, GemmaConfig, GemmaForCausalLM, MambaConfig, MambaForCausalLM

import arb_hf
from arb_hf.format.table import TableForm
from arb_hf.nn import Int8Embedding, Int8Head, int8_tables
from helpers import tiny
from helpers.models import VOCABULARY, llama
from helpers.process import fresh_process

BOTH = {"model.embed_tokens", "lm_head"}
OPTIONS = {"refinement": "full", "scale_dtype": "int8", "tune_steps": 0}
IDS = torch.arange(12)[None]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory) -> Path:
    """A packed model with int8 tables, saved."""
    place = tmp_path_factory.mktemp("int8")
    tiny.save_model(place / "dense", layers=1, tie_word_embeddings=request.param)
    arb_hf.save_pretrained(tiny.binarize(place / "dense", **OPTIONS), None, place / "packed")
    return place / "packed"


@pytest.fixture
def model(folder):
    return arb_hf.from_pretrained(folder)


def is_tied(model) -> bool:
    head, embedding = model.lm_head, model.model.embed_tokens
    return head.weight is embedding.weight and head.row_absmax is embedding.row_absmax


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def test_the_default_goes_by_the_refinement(dense):
    assert int8_tables(tiny.binarize(dense, refinement="paper")) == {}
    assert int8_tables(tiny.binarize(dense, embedding_dtype="model", **OPTIONS)) == {}


def test_both_tables_are_stored_once_if_tied(folder, model):
    tensors = load_file(folder / "model.safetensors")
    tied = model.config.tie_word_embeddings
    assert ("lm_head.weight" in tensors) is ("lm_head.row_absmax" in tensors) is not tied
    assert tensors["model.embed_tokens.weight"].dtype == torch.int8
    assert tensors["model.embed_tokens.row_absmax"].dtype == torch.float16
    assert int8_tables(model).keys() == BOTH and is_tied(model) is tied
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert set(config["embeddings"]) == BOTH and config["format_version"] == 2


def test_a_fresh_process_computes_the_same_and_vanilla_transformers_nothing(folder, model):
    code = f"""
import torch
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({str(folder)!r})
    print("loaded")
except RuntimeError:
    print("refused")
import arb_hf
m = arb_hf.from_pretrained({str(folder)!r})
print(m(torch.arange(12)[None]).logits.double().sum().item(), m.dtype)
"""
    done = fresh_process(code, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    vanilla, value, dtype = done.stdout.split()[-3:]
    assert (vanilla, dtype) == ("refused", "torch.bfloat16")
    assert float(value) == pytest.approx(logits(model).double().sum().item(), rel=1e-3)


def test_generation_is_that_of_the_dense_model(model):
    expected = model.generate(IDS, max_new_tokens=8, do_sample=False)
    before = logits(model.to(torch.float32))
    dense = arb_hf.dequantize(model)
    assert type(dense.lm_head) is torch.nn.Linear and type(dense.model.embed_tokens) is torch.nn.Embedding
    assert (dense.lm_head.weight is dense.model.embed_tokens.weight) is dense.config.tie_word_embeddings
    assert (logits(dense) - before).norm() < 1e-2 * before.norm()
    assert dense.generate(IDS, max_new_tokens=8, do_sample=False).shape == expected.shape
    dense.resize_token_embeddings(VOCABULARY + 8)
    assert logits(dense).shape[-1] == VOCABULARY + 8


def test_the_models_type_is_its_own_and_not_the_scales(model):
    assert model.dtype == torch.bfloat16 and model.model.embed_tokens(IDS).dtype == torch.bfloat16
    model.to(torch.float32)
    assert model.dtype == torch.float32 and model.model.embed_tokens(IDS).dtype == torch.float32
    assert logits(model.to(torch.float16)).dtype == torch.float16


def test_casts_leave_the_scales_and_the_tie(model):
    tied, before = is_tied(model), {name: each.packed for name, each in int8_tables(model).items()}
    before = {name: {part: tensor.clone() for part, tensor in each.items()} for name, each in before.items()}
    for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
        model.to(dtype)
    for name, table in int8_tables(model).items():
        for part, tensor in table.packed.items():
            assert tensor.dtype == before[name][part].dtype and torch.equal(tensor, before[name][part])
    assert is_tied(model) is tied


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_tied_in_itself(model, copied):
    expected, other = logits(model), copied(model)
    assert is_tied(other) is is_tied(model) and torch.equal(logits(other), expected)
    other.model.embed_tokens.weight.zero_()
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="cannot be resized"):
        other.resize_token_embeddings(7)


def test_resizing_is_refused_with_the_cure_and_no_change_is_none(model):
    for each in (model, model.model):
        with pytest.raises(ValueError, match=r"cannot be resized from 128 to 200 rows: .* arb_hf\.dequantize"):
            each.resize_token_embeddings(200)
    assert model.resize_token_embeddings(VOCABULARY) is model.model.embed_tokens
    assert model.resize_token_embeddings() is model.model.embed_tokens


@pytest.mark.parametrize("where", [("disk", "cpu"), ("disk", "disk")], ids=["tables", "all"])
@pytest.mark.filterwarnings("ignore")
def test_on_disk_it_computes_and_saves_the_same(folder, model, where, tmp_path):
    pytest.importorskip("accelerate", minversion="1.15")  # older ones are refused for tied tables
    pytest.importorskip("transformers", minversion="5.18")
    tables, layers = where
    places = {"model.embed_tokens": tables, "lm_head": tables, "model.layers": layers}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu"}
    placed = arb_hf.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert placed.model.embed_tokens.weight.is_meta and placed.dtype == torch.bfloat16
    assert torch.equal(logits(placed), logits(model))
    tiny.assert_equal(tiny.saved(placed, tmp_path / "again"), load_file(folder / "model.safetensors"))
    before = logits(model)
    assert (logits(arb_hf.dequantize(placed)) - before).norm() < 2e-2 * before.norm()


def test_a_run_whose_original_is_on_disk_makes_the_same(folder, model, tmp_path):
    pytest.importorskip("accelerate", minversion="1.15")  # older ones are refused for tied embeddings
    dense = folder.parent / "dense"
    places = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
    again = tiny.binarize(dense, {"device_map": places, "offload_folder": tmp_path / "offload"}, **OPTIONS)
    assert torch.equal(logits(again), logits(model))


def test_gradients_go_through_the_head(model):
    model.to(torch.float32).train()
    embedded = model.model.embed_tokens(IDS).requires_grad_()
    found = model(inputs_embeds=embedded, labels=IDS)
    found.loss.backward()
    assert embedded.grad.isfinite().all() and embedded.grad.norm() > 0
    dense = arb_hf.dequantize(copy.deepcopy(model))
    again = embedded.detach().clone().requires_grad_()
    dense(inputs_embeds=again, labels=IDS).loss.backward()
    assert (again.grad - embedded.grad).norm() < 2e-2 * again.grad.norm()


def test_compiled_as_one_graph(model):
    head = torch.compile(model.lm_head, fullgraph=True, backend="aot_eager")
    table = torch.compile(model.model.embed_tokens, fullgraph=True, backend="aot_eager")
    hidden = table(IDS)
    assert torch.equal(hidden, model.model.embed_tokens(IDS))
    assert torch.equal(head(hidden), model.lm_head(hidden))


def test_what_the_user_keeps_is_kept(dense):
    for options in ({"modules_to_not_convert": ["embed_tokens"]}, {"overrides": {"lm_head": None}}):
        made = tiny.binarize(dense, **OPTIONS, **options)
        kept = {each.name: each.kept for each in made.arb_report.coverage.tables}
        if made.config.tie_word_embeddings:
            assert int8_tables(made) == {} and all(kept.values())
        else:
            assert len(int8_tables(made)) == 1


def test_a_table_of_outliers_is_kept_with_the_reason(tmp_path, caplog):
    original = llama(1, hidden_size=64, tie_word_embeddings=False)
    original.model.embed_tokens.weight.data[:, 0] = 1e3
    original.lm_head.weight.data[3, 3] = 1e6
    original.save_pretrained(tmp_path)
    made = tiny.binarize(tmp_path, **OPTIONS)
    reasons = {each.name: each.kept for each in made.arb_report.coverage.tables}
    assert "lm_head" in caplog.text and "int8 would have a relative error of" in reasons["lm_head"]
    assert "lm_head" not in (made.config.quantization_config.embeddings or [])
    assert "lm_head" in made.arb_report.coverage.table()


def test_a_head_whose_type_the_model_asks_for_is_kept(tmp_path):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 1, "state_size": 8}
    MambaForCausalLM(MambaConfig(**sizes, tie_word_embeddings=False)).save_pretrained(tmp_path)
    made = tiny.binarize(tmp_path, **OPTIONS, minimum_coverage=0)
    kept = {each.name: each.kept for each in made.arb_report.coverage.tables}
    assert kept["lm_head"] == "MambaForCausalLM reads its weight itself"
    assert int8_tables(made).keys() == {"backbone.embeddings"}


def test_an_embedding_that_multiplies_by_a_constant(tmp_path):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
    original = GemmaForCausalLM(GemmaConfig(**sizes)).eval()
    original.save_pretrained(tmp_path / "dense")
    made = tiny.binarize(tmp_path / "dense", **OPTIONS)
    tables = int8_tables(made)
    if "model.embed_tokens" in tables:  # since Gemma's embedding does it itself
        expected = original.model.embed_tokens(IDS)
        assert (made.model.embed_tokens(IDS) - expected).norm() < 2e-2 * expected.norm()
    made.save_pretrained(tmp_path / "packed")
    loaded = arb_hf.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(made))
    before = logits(loaded)
    assert (logits(arb_hf.dequantize(loaded)) - before).norm() < 1e-2 * before.norm()


def test_a_backbone_alone_has_the_embedding_only(folder):
    backbone = AutoModel.from_pretrained(folder)
    assert int8_tables(backbone).keys() == {"embed_tokens"}
    assert backbone(IDS).last_hidden_state.isfinite().all()


def test_the_modules_stand_alone():
    weight, bias = torch.randn(20, 16), torch.randn(20)
    embedding = Int8Embedding(form := TableForm(20, 16), dtype=torch.float32, padding_idx=3)
    embedding.fill(weight)
    head = Int8Head(form, bias=True, dtype=torch.float32)
    head.fill(weight)
    head.bias.data = bias
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (20, 16, 3)
    assert (head.in_features, head.out_features) == (16, 20)
    ids = torch.tensor([[0, 19], [3, 3]])
    assert torch.equal(embedding(ids), embedding.dequantized()[ids])
    x = torch.randn(5, 16)
    assert torch.allclose(head(x), x @ head.dequantized().T + bias, atol=1e-5)
    with pytest.raises(IndexError):
        embedding(torch.tensor([20]))
    other = Int8Embedding(form, dtype=torch.float32)
    other.load_state_dict(embedding.state_dict(), strict=True)
    assert torch.equal(other(ids), embedding(ids))
