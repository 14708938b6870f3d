"""Packed models as dense checkpoints and as GGUF: what is written reads back equal, what cannot be said is refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import arb_hf
from arb_hf.export import export_dense, export_gguf
from arb_hf.export.gguf import decode_q1_0, encode_q1_0, why_not_q1_0
from arb_hf.export.vocabulary import LLAMA3, splitting
from arb_hf.format.form import BinaryForm
from arb_hf.nn import BinaryLinear, binary_modules
from helpers.byte_model import byte_tokenizer, byte_tokens, save_byte_model
from helpers.models import word_tokenizer

pytestmark = pytest.mark.usefixtures("exact_kernel")
SIZES = {"hidden_size": 128, "intermediate_size": 256}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = save_byte_model(tmp_path_factory.mktemp("export") / "dense", **SIZES)
    config = arb_hf.ArbConfig(dataset=byte_tokens(), block_size=32, refinement="paper", iterations=2)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    arb_hf.save_pretrained(model, byte_tokenizer(), folder.parent / "packed")
    return folder.parent / "packed"


@pytest.fixture
def model(packed):
    return arb_hf.from_pretrained(packed)


def one_plane(out_features, in_features, seed):
    """A binary weight of the form Q1_0: one plane, one row scale per 128 columns, nothing else."""
    generator = torch.Generator().manual_seed(seed)
    form = BinaryForm(out_features, in_features, 0, 128, 1, 1, True, "float16")
    rows = torch.zeros(form.blocks, form.slots, out_features)
    rows[:, 0] = torch.rand(form.blocks, out_features, generator=generator).half().float() / 16 + 0.03125
    signs = torch.randint(0, 2, (out_features, in_features), generator=generator, dtype=torch.int8) * 2 - 1
    nothing = torch.zeros(out_features, 0, dtype=torch.int8)
    salient, extra = torch.zeros(in_features, dtype=torch.bool), torch.zeros(1, 0)
    return arb_hf.BinaryWeight(form, signs, nothing, None, salient, rows, torch.ones(1, in_features), extra)


@pytest.fixture
def one_bit(model):
    """The model with every binary layer replaced by one of the form Q1_0."""
    for seed, (name, module) in enumerate(binary_modules(model).items()):
        parent, _, child = name.rpartition(".")
        weight = one_plane(module.out_features, module.in_features, seed)
        setattr(model.get_submodule(parent), child, BinaryLinear.from_binary_weight(weight))
    return model


def read(path):
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    tensors = {}
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        q1_0 = tensor.tensor_type == gguf.GGMLQuantizationType.Q1_0
        tensors[tensor.name] = (tensor.tensor_type.name, decode_q1_0(data) if q1_0 else data)
    return reader, tensors


def logits(model):
    with torch.no_grad():
        return model(byte_tokens(1, 16)).logits


def test_dense_checkpoint_gives_the_same_logits(model, tmp_path):
    before = logits(model)
    result = export_dense(model, byte_tokenizer(), tmp_path, torch.float32)
    assert result.rounding == 0
    assert "exact" in str(result)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    dense = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not binary_modules(dense)
    torch.testing.assert_close(logits(dense), before, rtol=1e-4, atol=1e-5)


def test_dense_checkpoint_says_what_rounding_lost(model, tmp_path):
    weights = {name: module.binary_weight().dequantize() for name, module in binary_modules(model).items()}
    lost = sum((w - w.bfloat16().float()).square().sum() for w in weights.values())
    total = sum(w.square().sum() for w in weights.values())
    result = export_dense(model, None, tmp_path, torch.bfloat16)
    assert result.rounding == pytest.approx((lost / total).sqrt().item(), rel=1e-3)
    assert "relative rounding error" in str(result)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_gguf_of_the_usual_form_is_dense_and_reads_back_equal(model, tmp_path):
    path = tmp_path / "model.gguf"
    result = export_gguf(model, byte_tokenizer(), path)
    assert result.matrices == {"f16": 14}
    assert 0 < result.rounding < 1e-3
    reader, tensors = read(path)
    weight = model.model.layers[0].mlp.down_proj.binary_weight().dequantize()
    assert tensors["blk.0.ffn_down.weight"][0] == "F16"
    np.testing.assert_array_equal(tensors["blk.0.ffn_down.weight"][1], weight.half().numpy())
    assert tensors["output_norm.weight"][0] == "F32"
    assert (
        len(tensors)
        == len([name for name, _ in model.named_parameters() if "norm" in name or "_proj" not in name]) + 14
    )
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.block_count"] == 2
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.rope.dimension_count"] == 32
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert len(fields["tokenizer.ggml.tokens"]) == 257
    assert fields["tokenizer.ggml.eos_token_id"] == 0


def test_gguf_that_breaks_off_leaves_what_was_there(model, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"an earlier file")
    monkeypatch.setattr("arb_hf.export.gguf._add_tensor", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        export_gguf(model, byte_tokenizer(), path)
    assert path.read_bytes() == b"an earlier file"
    assert [each.name for each in tmp_path.iterdir()] == ["model.gguf"]


def test_gguf_refuses_a_folder_before_it_writes(model, tmp_path):
    with pytest.raises(ValueError, match="is a folder: a GGUF model is one file"):
        export_gguf(model, byte_tokenizer(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_gguf_interleaves_the_rows_of_q_and_k(model, tmp_path):
    """llama.cpp rotates neighbouring rows of a head, transformers row i and i + half."""
    export_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", "f32")
    _, tensors = read(tmp_path / "m.gguf")
    weight = model.model.layers[1].self_attn.k_proj.binary_weight().dequantize().numpy()
    _, stored = tensors["blk.1.attn_k.weight"]
    head = 32
    for row in range(weight.shape[0]):
        start, inside = row // head * head, row % head
        np.testing.assert_array_equal(stored[row], weight[start + inside // 2 + inside % 2 * (head // 2)])


@pytest.mark.parametrize("kind", ["auto", "q1_0"])
def test_gguf_of_one_plane_is_q1_0_and_exact(one_bit, tmp_path, kind):
    path = tmp_path / "model.gguf"
    result = export_gguf(one_bit, byte_tokenizer(), path, kind)
    assert result.matrices == {"q1_0": 14}
    assert result.rounding == 0
    _, tensors = read(path)
    weight = one_bit.model.layers[1].mlp.down_proj.binary_weight().dequantize()
    stored = tensors["blk.1.ffn_down.weight"]
    assert stored[0] == "Q1_0"
    np.testing.assert_array_equal(stored[1], weight.numpy())


def rounded_activations(module, args):
    """What llama.cpp multiplies Q1_0 with: blocks of 32 activations as int8 and a float16 scale (its Q8_0)."""
    blocks = args[0].float().reshape(-1, 32)
    scales = blocks.abs().amax(1, keepdim=True) / 127
    return ((blocks / scales.clamp(min=1e-30)).round() * scales.half().float()).reshape(args[0].shape)


@pytest.mark.parametrize("kind", ["f32", "q1_0"])
def test_llama_cpp_gives_the_same_logits(one_bit, tmp_path, kind):
    llama_cpp = pytest.importorskip("llama_cpp")
    export_gguf(one_bit, byte_tokenizer(), tmp_path / "model.gguf", kind)
    reader = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    tokens = byte_tokens(1, 16)
    reader.eval(tokens[0].tolist())
    found = torch.from_numpy(np.array(reader.scores[:16]))
    exact = logits(one_bit)[0].float()
    for module in binary_modules(one_bit).values():
        module.register_forward_pre_hook(rounded_activations)
    rounding = (logits(one_bit)[0].float() - exact).norm()  # about 2 % here; a weight out of place makes it 100
    assert rounding < 0.05 * exact.norm()
    assert (found - exact).norm() < (1.5 * rounding if kind == "q1_0" else 0.002 * exact.norm())
    text = "a quick fox"
    assert reader.tokenize(text.encode(), add_bos=False) == byte_tokenizer()(text)["input_ids"]


def test_q1_0_bytes():
    """The layout of one block, by hand: a float16 scale, then bits from the least significant."""
    weight = torch.full((1, 128), -0.5)
    weight[0, 0] = weight[0, 9] = 0.5
    data = encode_q1_0(weight)
    assert data.shape == (1, 18)
    assert data[0, :2].view("<f2") == np.float16(0.5)
    assert data[0, 2:5].tolist() == [1, 2, 0]
    np.testing.assert_array_equal(decode_q1_0(data), weight.numpy())


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.ones(2, 64), "no multiple of 128"),
        (torch.cat([torch.ones(2, 127), torch.zeros(2, 1)], 1), "more than one magnitude"),
        (torch.full((2, 128), 1 + 2**-20), "not representable in float16"),
        (torch.ones(2, 256), None),
    ],
)
def test_why_not_q1_0(weight, reason):
    found = why_not_q1_0(weight)
    assert found is None if reason is None else reason in found


def test_gguf_q1_0_of_another_form_is_refused_with_the_reason(model, tmp_path):
    with pytest.raises(ValueError, match=r"q_proj does not have the form Q1_0: .* more than one magnitude"):
        export_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", "q1_0")
    assert not list(tmp_path.iterdir())


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES_ONLY = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def digits(individual: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=individual), BYTES])


def split(pattern: str, behavior: str = "isolated") -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior), BYTES_ONLY])


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (BYTES, "gpt-2"),
        (digits(True), "smollm"),
        (split(LLAMA3), "llama-bpe"),
        (split(LLAMA3.replace("{1,3}", "")), "qwen2"),
        (digits(False), None),
        (split(r"\s"), None),
        (split(LLAMA3, "removed"), None),
        (BYTES_ONLY, None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (pre_tokenizers.Whitespace(), None),
    ],
)
def test_gguf_names_the_rule_that_splits_text(rule, name):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = rule
    assert splitting(tokenizer) == name
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert splitting(tokenizer) is None


def experts(kind):
    common = {"vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    common |= {"num_key_value_heads": 2, "num_experts_per_tok": 2, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt_oss":  # transposed stacks, with biases
        model = GptOssForCausalLM(GptOssConfig(**common, pad_token_id=0, intermediate_size=64, num_local_experts=3))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(0, 0.02)
        return model
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, intermediate_size=64, moe_intermediate_size=32, num_experts=3))


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_experts_are_exported(tmp_path, kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        experts(kind).eval().save_pretrained(tmp_path / "original")
    config = arb_hf.ArbConfig(dataset=byte_tokens(), block_size=32, refinement="paper", iterations=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original", quantization_config=config)
    assert any(".experts." in name for name in binary_modules(model))
    before = logits(model)
    result = export_dense(model, None, tmp_path / "dense", "float32")
    assert result.rounding == 0 and result.matrices["float32"] == 2 * (4 + 3 * 2)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(dense), before, rtol=1e-4, atol=1e-5)
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    assert [name for name, _ in dense.named_parameters()] == [name for name, _ in original.named_parameters()]


def test_layers_on_disk_are_exported_as_those_in_memory(model, packed, tmp_path):
    places = {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "model.layers": "disk"}
    options = {"device_map": places | {"lm_head": "cpu"}, "offload_folder": tmp_path / "offload"}
    on_disk = arb_hf.from_pretrained(packed, **options)
    for name, each in {"memory": model, "disk": on_disk}.items():
        export_gguf(each, byte_tokenizer(), tmp_path / f"{name}.gguf")
        export_dense(each, None, tmp_path / name)
    assert (tmp_path / "disk.gguf").read_bytes() == (tmp_path / "memory.gguf").read_bytes()
    for file in (tmp_path / "memory").iterdir():
        assert (tmp_path / "disk" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("dtype", ["fp16", "int8", torch.int8, torch.float64, None])
def test_types_that_no_checkpoint_has_are_refused(model, tmp_path, dtype):
    with pytest.raises(ValueError, match="is not one of auto, float32, bfloat16, float16"):
        export_dense(model, None, tmp_path / "x", dtype)
    assert binary_modules(model) and not list(tmp_path.iterdir())


def test_the_name_of_a_type_is_that_type(model, tmp_path):
    assert export_dense(model, None, tmp_path, "float16").matrices == {"float16": 14}
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.float16


def test_a_packed_model_is_not_overwritten_by_its_export(packed):
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    with pytest.raises(ValueError, match="holds a packed model: name another folder"):
        export_dense(arb_hf.from_pretrained(packed), None, packed)
    assert {path.name: path.read_bytes() for path in packed.iterdir()} == before


def test_scales_in_training_are_not_exported(model, tmp_path):
    arb_hf.scales.unfreeze(model)
    for export in (export_dense, export_gguf):
        with pytest.raises(ValueError, match=r"arb_hf\.scales\.freeze"):
            export(model, byte_tokenizer(), tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "gelu"}, "the activation gelu"),
        ({"sliding_window": 64}, "a sliding window .64 of 256 positions"),
        ({"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]}, "a sliding window"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "scaled rotary embeddings"),
        ({"model_type": "gemma"}, "this is gemma"),
    ],
)
def test_gguf_refuses_a_config_that_it_cannot_express(model, tmp_path, options, message):
    vars(model.config).update(options)
    with pytest.raises(ValueError, match=message):
        export_gguf(model, byte_tokenizer(), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_gguf_expresses_a_window_that_is_never_reached(model, tmp_path):
    model.config.sliding_window = model.config.max_position_embeddings
    export_gguf(model, byte_tokenizer(), tmp_path / "m.gguf")
    model.config.sliding_window, model.config.layer_types = 64, ["full_attention"] * 2
    export_gguf(model, byte_tokenizer(), tmp_path / "n.gguf")


@pytest.mark.parametrize(("model_type", "lost"), [("llama", None), ("mistral", "q_proj"), ("qwen2", "o_proj")])
def test_gguf_refuses_biases_that_llama_cpp_does_not_add(model, tmp_path, model_type, lost):
    for module in (model.model.layers[0].self_attn, model.model.layers[1].self_attn):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            layer = getattr(module, name)
            layer.bias = torch.nn.Parameter(torch.ones(layer.out_features), requires_grad=False)
    model.config.model_type = model_type
    if lost is None:
        export_gguf(model, byte_tokenizer(), tmp_path / "m.gguf")
        assert read(tmp_path / "m.gguf")[1]["blk.0.attn_q.bias"][1].tolist() == [1.0] * 128
        return
    with pytest.raises(ValueError, match=rf"has no place for model\.layers\.0\.self_attn\.{lost}\.bias"):
        export_gguf(model, byte_tokenizer(), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_gguf_refuses_arguments_that_make_no_sense(model, tmp_path):
    with pytest.raises(ValueError, match="type='q4_0' is not one of auto, q1_0, f16, f32"):
        export_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", "q4_0")
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere for .*: make it first"):
        export_gguf(model, byte_tokenizer(), tmp_path / "nowhere" / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_gguf_says_whether_texts_start_with_a_token(model, tmp_path):
    tokenizer = byte_tokenizer()
    for name, starts in (("plain", False), ("started", True)):
        export_gguf(model, tokenizer, tmp_path / name)
        fields = {key: field.contents() for key, field in read(tmp_path / name)[0].fields.items()}
        assert fields["tokenizer.ggml.add_bos_token"] is starts
        assert fields["tokenizer.ggml.add_eos_token"] is False
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])


def test_gguf_says_when_it_does_not_know_the_rule(model, tmp_path, caplog):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = BYTES
    export_gguf(model, tokenizer, tmp_path / "known.gguf")
    assert not caplog.records
    tokenizer.backend_tokenizer.pre_tokenizer = BYTES_ONLY
    export_gguf(model, tokenizer, tmp_path / "unknown.gguf")
    assert "splitting rule is not known" in caplog.text


def test_gguf_refuses_what_it_cannot_say(model, tmp_path):
    with pytest.raises(ValueError, match="byte-level BPE"):
        export_gguf(model, word_tokenizer(), tmp_path / "m.gguf")
    bare = byte_tokenizer()
    bare.backend_tokenizer.model = models.BPE(bare.get_vocab(), [])
    with pytest.raises(ValueError, match="no merges"):
        export_gguf(model, bare, tmp_path / "m.gguf")
    model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4}
    with pytest.raises(ValueError, match="yarn"):
        export_gguf(model, byte_tokenizer(), tmp_path / "m.gguf")
    model.config.model_type = "gpt2"
    with pytest.raises(ValueError, match="this is gpt2"):
        export_gguf(model, byte_tokenizer(), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_gguf_refuses_scales_outside_float16(one_bit, tmp_path):
    one_bit.model.embed_tokens.weight.data.mul_(1e8)
    with pytest.raises(ValueError, match=r"token_embd\.weight does not fit float16"):
        export_gguf(one_bit, byte_tokenizer(), tmp_path / "m.gguf")


def test_dense_models_are_refused(tmp_path):
    dense = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16))
    for export in (export_dense, export_gguf):
        with pytest.raises(ValueError, match="no binary layers"):
            export(dense, byte_tokenizer(), tmp_path / "x")


def test_missing_gguf_says_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'arb_hf\[gguf\]'"):
        export_gguf(model, byte_tokenizer(), tmp_path / "x")


def test_results_are_plain_data(model, tmp_path):
    assert json.dumps(dataclasses.asdict(export_dense(model, None, tmp_path)))
