"""What `arb_hf.plan` says before a run, against what the run then writes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import arb_hf
from arb_hf import ArbCalibrationError, ArbConfig
from arb_hf.binarize.counts import salient_columns
from arb_hf.binarize.options import BinarizeOptions
from arb_hf.calibrate.batches import load_batches
from arb_hf.cli.parser import main
from helpers.byte_model import save_byte_model, save_packed
from helpers.families import families
from helpers.loopback_hub import LoopbackHub, Repository
from helpers.models import llama, token_samples, words

# With these the number of salient columns is known: sizes are exact.
FULL = {"refinement": "full", "tune_steps": 0, "block_size": 32, "num_samples": 4, "sequence_length": 24}


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


def run(folder: Path, out: Path, family: str = "llama", dtype: str = "auto", shards: str = "50GB", **options):
    """Binarize the model of a folder and save it; the loaded model."""
    config = ArbConfig(**(FULL | {"dataset": families.tokens(4, 24)} | options))
    model = families.auto_class(family).from_pretrained(folder, quantization_config=config, dtype=dtype)
    model.save_pretrained(out, max_shard_size=shards)
    return model


def config_only(folder: Path, copy: Path) -> Path:
    """A folder with nothing but the config of a model."""
    copy.mkdir()
    shutil.copy(folder / "config.json", copy)
    return copy


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2", {"scale_dtype": "int8"}),  # biases
        ("gpt_neox", {"scale_dtype": "float16", "column_group_bitmap": False}),  # untied, buffers
        ("gpt2", {"group_bitmap": False}),  # Conv1D, tied
        ("qwen3_moe", {"overrides": {"*.0.self_attn": {"block_size": 64, "method": "billm"}, "*.1.mlp": None}}),
        ("mixtral", {"modules_to_not_convert": ["q_proj"], "minimum_coverage": 0.5, "scale_dtype": "int8"}),
        ("gpt_oss", {"max_salient_columns": 2}),  # experts with biases, transposed
        ("deepseek_v3", {"scale_dtype": "int8"}),  # buffers in float32
        ("mamba", {"scale_dtype": "float32"}),
        ("llava", {}),
    ],
)
def test_files_have_the_planned_size_to_the_byte(family, options, tmp_path):
    families.tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    planned = arb_hf.plan(config_only(tmp_path / "dense", tmp_path / "config"), ArbConfig(**(FULL | options)))
    model = run(tmp_path / "dense", tmp_path / "packed", family, **options)
    assert planned.files == sizes(tmp_path / "packed")
    assert planned.exact and planned.bits_per_weight == pytest.approx(arb_hf.bits_per_weight(model), rel=1e-12)
    assert planned.coverage == model.arb_report.coverage
    assert sum(planned.parts.values()) == planned.bytes


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_shards_are_planned_as_they_are_written(dtype, tmp_path):
    families.tiny_model("qwen3_moe").save_pretrained(tmp_path / "dense")
    run(tmp_path / "dense", tmp_path / "packed", dtype=dtype, shards="30KB")
    planned = arb_hf.plan(tmp_path / "dense", ArbConfig(**FULL), dtype=dtype, max_shard_size="30KB")
    assert len(planned.files) > 3
    assert planned.files == sizes(tmp_path / "packed")


def test_a_loaded_model_is_planned_with_the_types_that_it_has(tmp_path):
    model = llama(tie_word_embeddings=True).to(torch.float16)
    model.model.norm.to(torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    planned = arb_hf.plan(model, ArbConfig(**FULL))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert planned.original == sum(tensor.nbytes for name, tensor in before.items() if name != "lm_head.weight")
    assert planned.parts["embeddings and head"] == model.lm_head.weight.nbytes // 2 + 2 * 128  # int8, and a scale a row
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.get_slice("model.norm.weight").get_dtype() == "F32"
    in_float16 = arb_hf.plan(tmp_path, ArbConfig(**FULL))
    assert planned.parts["norms and the rest"] == in_float16.parts["norms and the rest"] + 2 * 96


def test_the_planned_config_is_left_alone():
    config = ArbConfig(**FULL)
    arb_hf.plan(llama(), config)
    assert config.modules is None


def test_the_published_algorithm_stays_within_the_planned_bounds(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    options = {"refinement": "paper", "iterations": 2, "max_salient_columns": 6}
    planned = arb_hf.plan(tmp_path / "dense", ArbConfig(**(FULL | options)))
    model = run(tmp_path / "dense", tmp_path / "packed", **options)
    low, high = planned.bounds
    assert not planned.exact
    assert low <= arb_hf.bits_per_weight(model) <= high
    assert low <= planned.bits_per_weight <= high
    assert "as the weights decide" in str(planned)


@pytest.mark.parametrize("group_bitmap", [True, False])
@pytest.mark.parametrize("scale_dtype", ["int8", "float16", "float32"])
def test_the_count_of_salient_columns_is_the_largest_that_fits(group_bitmap, scale_dtype):
    options = BinarizeOptions(
        refinement="full",
        scale_dtype=scale_dtype,
        group_bitmap=group_bitmap,
        column_group_bitmap=group_bitmap,
        max_salient_columns=128,
    )
    for n, m in ((8, 32), (192, 576), (576, 1536), (100, 1000)):
        published = options.form(n, m, round(0.045 * m), scale_dtype="float16").bits()
        count = salient_columns(n, m, options)
        assert count.fewest == count.most
        assert count.likely == sum(options.form(n, m, each).bits() <= published for each in range(1, m + 1))


@pytest.mark.parametrize("how", ["tensors", "file"])
def test_token_ids_are_not_held_to_the_length_of_windows_of_text(how, tmp_path):
    """The model takes 256 positions, and windows of text would have 2048; ids are taken as they are."""
    llama().save_pretrained(tmp_path / "dense")
    samples = token_samples(4, 32)
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"input_ids": each.tolist()}) + "\n" for each in samples))
    dataset = samples if how == "tensors" else str(tmp_path / "ids.jsonl")
    options = FULL | {"sequence_length": 2048}
    config = ArbConfig(**options, dataset=dataset)
    assert arb_hf.plan(tmp_path / "dense", config).bits_per_weight > 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    with pytest.raises(ArbCalibrationError, match="sequence_length=2048 is longer than the model takes"):
        arb_hf.plan(tmp_path / "dense", ArbConfig(**options, dataset="c4"))


def test_nothing_but_the_config_is_fetched_from_the_hub(tmp_path):
    save_byte_model(tmp_path / "dense")
    with LoopbackHub() as hub:
        made = Repository(private=False)
        files = {path.name: path.read_bytes() for path in (tmp_path / "dense").iterdir()}
        made.commit("main", files, "a model")
        hub.repositories["me/model"] = made

        def planned(name: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "arb_hf", "plan", name, "--sequence-length", "32", "--json"]
            environment = hub.environment(tmp_path / "home")
            return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)

        found, absent = planned("me/model"), planned("me/none")
        asked = " ".join(hub.requests)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["class_name"] == "LlamaForCausalLM"
    assert "config.json" in asked and "safetensors" not in asked
    assert absent.returncode == 1
    assert "me/none does not load" in absent.stderr


class TestErrors:
    """The words of a run."""

    def test_a_packed_model_is_refused(self, tmp_path):
        packed = save_packed(tmp_path)
        with pytest.raises(ValueError, match=r"is quantized already \(quant_method 'arb_hf'\)"):
            arb_hf.plan(packed)
        with pytest.raises(ValueError, match="is quantized already"):
            arb_hf.plan(arb_hf.from_pretrained(packed))

    def test_no_model_is_none(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"there is no folder \./nowhere"):
            arb_hf.plan("./nowhere")
        with pytest.raises(OSError, match=r"has no config\.json|does not load"):
            arb_hf.plan(tmp_path)

    def test_an_encoder_is_refused(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
        with pytest.raises(ArbCalibrationError, match="decoder-only"):
            arb_hf.plan(tmp_path)

    def test_names_that_match_nothing_are_refused(self):
        with pytest.raises(ArbCalibrationError, match="no module has this name"):
            arb_hf.plan(llama(), ArbConfig(**FULL, modules_to_not_convert=["x_proj"]))

    def test_windows_that_are_too_long_are_refused_in_the_words_of_a_run(self):
        config = ArbConfig(**(FULL | {"sequence_length": 4096}))
        with pytest.raises(ArbCalibrationError) as planned:
            arb_hf.plan(llama(), config)
        with pytest.raises(ArbCalibrationError) as running:
            load_batches(config, lambda: None, 128, 256)
        assert str(planned.value) == str(running.value)

    def test_too_little_coverage_is_refused(self):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))
        with pytest.raises(ArbCalibrationError, match="can be binarized"):
            arb_hf.plan(model, ArbConfig(**(FULL | {"sequence_length": 8})))


def test_tuning_and_tokens_cost_time_and_memory():
    short = arb_hf.plan(llama(), ArbConfig(**FULL))
    tuned = arb_hf.plan(llama(), ArbConfig(**(FULL | {"tune_steps": 8})))
    long = arb_hf.plan(llama(), ArbConfig(**(FULL | {"num_samples": 8})))
    assert set(short.seconds) == {"hessian", "binarize", "recompute"}
    assert sum(tuned.seconds.values()) > sum(short.seconds.values())
    assert long.needs.activations == 2 * short.needs.activations
    published = arb_hf.plan(llama(), ArbConfig(**(FULL | {"refinement": "paper"})))
    assert (
        short.needs.activations == 2 * published.needs.activations
    )  # the original model's hidden states beside its own


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a dense model and a text."""
    folder = tmp_path_factory.mktemp("plan")
    save_byte_model(folder / "dense")
    (folder / "text.txt").write_text(words(400))
    return folder


class TestCommand:
    OPTIONS = ("--refinement", "full", "--tune-steps", "0", "--num-samples", "4", "--sequence-length", "32")

    def test_text_and_json(self, here, capsys):
        assert main(["plan", str(here / "dense"), *self.OPTIONS]) == 0
        text = capsys.readouterr().out
        for part in ("what becomes of it", "bits per weight", "embeddings and head", "memory:", "time: about"):
            assert part in text
        assert main(["plan", str(here / "dense"), *self.OPTIONS, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["exact"] is True
        assert told["bytes"] == sum(told["files"].values()) == sum(told["parts"].values())
        assert told["coverage"]["share"] == 1

    def test_quantize_says_the_same_first(self, here, capsys):
        assert main(["plan", str(here / "dense"), *self.OPTIONS]) == 0
        *before, _ = capsys.readouterr().out.strip().split("\n")  # all but the time
        argv = ["quantize", str(here / "dense"), str(here / "packed"), "--dataset", str(here / "text.txt")]
        assert main([*argv, *self.OPTIONS]) == 0
        said = capsys.readouterr().err
        assert "\n".join(before) in said
        assert said.index("\n".join(before)) < said.index("decoder layer 1 of 2")

    def test_what_the_plan_refuses_is_never_loaded(self, here, capsys, monkeypatch):
        monkeypatch.setattr("arb_hf.cli.commands.load", None)
        argv = ["quantize", str(here / "dense"), str(here / "never"), "--sequence-length", "4096"]
        assert main(argv) == 1
        assert "is longer than the model takes" in capsys.readouterr().err
        assert not (here / "never").exists()

    def test_wrong_options_end_with_2(self, here, capsys):
        with pytest.raises(SystemExit) as caught:
            main(["plan", str(here / "dense"), "--method", "arb-z"])
        assert caught.value.code == 2
        assert "method='arb-z' is not allowed" in capsys.readouterr().err
