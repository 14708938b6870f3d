"""vLLM's engine serves packed models: ``make vllm`` runs these tests in an environment of their own."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import arb_hf
from arb_hf import ArbConfig
from helpers.byte_model import VOCABULARY, byte_tokenizer, byte_tokens, save_byte_model
from helpers.engine import EXACT, engine, run
from helpers.process import ROOT, environment

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here: make vllm"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own
]
TOLERANCE = 3e-4  # of log probabilities, between two implementations of attention in float32
PROMPTS = [tokens.tolist() for tokens in byte_tokens(3, 40, seed=5)]
INT8 = {"embedding_dtype": "int8", "scale_dtype": "int8"}


def pack(dense: Path, folder: Path, **options) -> Path:
    defaults = {"dataset": byte_tokens(), "num_samples": 4, "block_size": 32, "refinement": "paper", "iterations": 2}
    config = ArbConfig(**(defaults | options))
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    arb_hf.save_pretrained(model, byte_tokenizer(), folder)
    return folder


def phi3(folder: Path) -> Path:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Phi3Config(**sizes, **heads, bos_token_id=0, eos_token_id=0, pad_token_id=0)
        Phi3ForCausalLM(config).eval().save_pretrained(folder)
    return folder


def gpt2(folder: Path) -> Path:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_head=2, n_layer=1, n_positions=256, eos_token_id=0)
    GPT2LMHeadModel(config).eval().save_pretrained(folder)
    return folder


def mixtral(folder: Path) -> Path:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2, "max_position_embeddings": 256}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folders of tiny packed models, each with something that vLLM treats in a way of its own."""
    base = tmp_path_factory.mktemp("served")
    llama = save_byte_model(base / "llama", head_dim=32, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    one_key = save_byte_model(base / "one-key", head_dim=32, num_key_value_heads=1, tie_word_embeddings=True)
    fused = phi3(base / "fused")
    dense_part = {"overrides": {"*.v_proj": None}, "minimum_coverage": 0}
    return {
        "biases and a dense part": pack(llama, base / "1", **INT8, **dense_part),
        "replicated heads, one group, tied": pack(one_key, base / "2", method="arb-x", group_bitmap=False, **INT8),
        "fused on disk": pack(fused, base / "3"),
    }


MODELS = ("biases and a dense part", "replicated heads, one group, tied", "fused on disk")


def assert_agreement(folder: Path, results: list[dict], tokens: int) -> None:
    """vLLM's log probabilities are those of transformers, and what it chose is as likely as what transformers would."""
    model = arb_hf.from_pretrained(folder, dtype=torch.float32)
    for result, prompt in zip(results, PROMPTS, strict=True):
        ids = torch.tensor([result["ids"]])
        assert result["ids"][: len(prompt)] == prompt and len(result["ids"]) == len(prompt) + tokens
        with torch.no_grad():
            logs = model(ids).logits[0, :-1].log_softmax(-1)
        chosen = logs.gather(1, ids[0, 1:, None])[:, 0]
        assert (chosen - torch.tensor(result["logs"])).abs().max() < TOLERANCE
        assert (logs.amax(-1) - chosen)[-tokens:].max() < TOLERANCE


@pytest.fixture(autouse=True)
def reference_kernel(exact_kernel, monkeypatch):
    for name, value in EXACT.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", MODELS)
def test_one_process_agrees_with_transformers(models, name):
    with engine(models[name]) as llm:
        assert_agreement(models[name], run(llm, PROMPTS, 24), 24)


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_agree_with_transformers(models, name):
    changes = EXACT | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    done = subprocess.run(
        [sys.executable, "-m", "helpers.engine", str(models[name]), "2"],
        input=json.dumps({"prompts": PROMPTS, "tokens": 24}),
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=900,
    )
    answer = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert answer, done.stderr[-3000:]
    assert_agreement(models[name], json.loads(answer[0].removeprefix("ANSWER ")), 24)


def test_a_compiled_graph_agrees_too(models):
    name = MODELS[0]
    with engine(models[name], enforce_eager=False) as llm:
        assert_agreement(models[name], run(llm, PROMPTS, 8), 8)


# Damaged checkpoints. Each change is of a copy of the first model.

Q, EMBEDDING = "model.layers.0.self_attn.q_proj", "model.embed_tokens"
NAN, INF = float("nan"), float("inf")


def in_tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def in_config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tree = json.loads((folder / "config.json").read_text())
        change(tree["quantization_config"])
        (folder / "config.json").write_text(json.dumps(tree))

    return damage


def cut_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def link_out(folder: Path) -> None:
    outside = folder.parent / f"{folder.name}.safetensors"
    shutil.move(folder / "model.safetensors", outside)
    (folder / "model.safetensors").symlink_to(outside)


DAMAGES = {
    "NaN": (in_tensors(lambda t: t[f"{Q}.row_absmax"].fill_(NAN)), f"{Q}.row_absmax holds NaN or infinite values"),
    "infinite": (in_tensors(lambda t: t[f"{Q}.row_absmax"][0, :1].fill_(INF)), "row_absmax holds NaN or infinite"),
    "negative magnitude": (in_tensors(lambda t: t[f"{Q}.row_absmax"][0, :1].fill_(-1)), "holds negative values"),
    "negative zero": (in_tensors(lambda t: t[f"{Q}.row_absmax"][0, :1].fill_(-0.0)), "holds -0.0"),
    "code of a row": (in_tensors(lambda t: t[f"{Q}.row_parameters"][0, 0, :1].fill_(-128)), "holds the code -128"),
    "code of a column": (in_tensors(lambda t: t[f"{Q}.column_scales"][0, :1].fill_(-128)), "holds the code -128"),
    "salient columns": (
        in_tensors(lambda t: t[f"{Q}.salient_columns"].fill_(255)),
        "marks 64 columns, the config says",
    ),
    "stray bits": (in_tensors(lambda t: t[f"{Q}.salient_groups"][-1].fill_(-1)), "salient_groups has bits set past"),
    "code of a table": (in_tensors(lambda t: t[f"{EMBEDDING}.weight"][3, :1].fill_(-128)), "embed_tokens.weight holds"),
    "NaN in a table": (in_tensors(lambda t: t["lm_head.row_absmax"][:1].fill_(NAN)), "lm_head.row_absmax holds NaN"),
    "missing part": (in_tensors(lambda t: t.pop(f"{Q}.second_plane")), f"{Q}.second_plane is missing"),
    "missing table": (in_tensors(lambda t: t.pop(f"{EMBEDDING}.row_absmax")), "embed_tokens.row_absmax is missing"),
    "missing norm": (in_tensors(lambda t: t.pop("model.norm.weight")), "model.norm.weight is missing"),
    "surplus": (in_tensors(lambda t: t.update({"extra.weight": torch.zeros(2)})), "surplus tensor extra.weight"),
    "surplus bias": (in_tensors(lambda t: t.update({"lm_head.bias": torch.zeros(2)})), "surplus tensor lm_head.bias"),
    "shape": (in_tensors(lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:, 1:].clone()})), f"{Q}.weight is I32"),
    "type": (in_tensors(lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].long()})), f"{Q}.weight is I64"),
    "unknown module": (in_config(lambda c: c["modules"].update(x={"salient_columns": 1})), "modules names 'x'"),
    "too many salient": (in_config(lambda c: c["modules"][Q].update(salient_columns=999)), f"{Q} cannot have 999"),
    "no modules": (in_config(lambda c: c.update(modules={})), "modules is missing or empty"),
    "newer version": (in_config(lambda c: c.update(format_version=99)), "format_version 99 is newer"),
    "option": (in_config(lambda c: c.update(block_size=33)), "block_size=33 is not allowed"),
    "cut file": (cut_file, "model.safetensors: not a readable safetensors file"),
    "link out of the folder": (link_out, "outside the model's folder"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused(models, tmp_path, name):
    damage, message = DAMAGES[name]
    folder = Path(shutil.copytree(models[MODELS[0]], tmp_path / "damaged"))
    damage(folder)
    with pytest.raises(ValueError, match=message), engine(folder):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_format": "dummy"}, "load_format='dummy' cannot load a packed model"),
        ({"enable_lora": True}, "vLLM puts no LoRA adapters on packed layers"),
    ],
)
def test_what_would_treat_packed_weights_as_dense_is_refused(models, options, message):
    with pytest.raises(ValueError, match=message), engine(models[MODELS[0]], **options):
        pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (gpt2, "vLLM transposes this model's weights"),
        (mixtral, "all experts of a layer|has no layer there that takes it"),
    ],
)
def test_what_vllm_computes_otherwise_is_refused(tmp_path, make, message):
    packed = pack(make(tmp_path / "dense"), tmp_path / "packed")
    with pytest.raises(ValueError, match=message), engine(packed):
        pass


def test_the_benchmark_runs(models):
    program = ROOT / "examples" / "benchmarks" / "serving.py"
    command = [sys.executable, str(program), "--quick", "--packed", str(models[MODELS[0]]), "--threads", "1"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("| ")] == ["batch", "1", "4"], done


def test_cuts_inside_a_word_of_columns_are_refused(tmp_path):
    dense = save_byte_model(tmp_path / "dense", head_dim=32, intermediate_size=160)
    packed = pack(dense, tmp_path / "packed", block_size=64)
    done = subprocess.run(
        [sys.executable, "-m", "helpers.engine", str(packed), "2"],
        input=json.dumps({"prompts": PROMPTS, "tokens": 1}),
        env=environment(**EXACT, OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="0|1"),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode != 0
    assert "down_proj: columns 0 to 80 of 160 cut a block of 64 inside a word of 32" in done.stdout + done.stderr


def test_the_plugin_is_found_by_its_entry_point_and_may_be_called_twice():
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.plugins import load_plugins_by_group

    register = load_plugins_by_group("vllm.general_plugins")["arb_hf"]
    register()
    register()
    assert get_quantization_config("arb_hf").__name__ == "ArbVllmConfig"
