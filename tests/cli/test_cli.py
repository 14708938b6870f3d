"""arb-hf: every command as a user runs it, its errors and exit codes, and that it starts without torch."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import struct
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import arb_hf
from arb_hf import native
from arb_hf.cli.parser import COMMANDS, NOT_OPTIONS, argument_docs, build_parser, main
from arb_hf.format import headers
from arb_hf.report import ArbReport, TuneRecord
from helpers.byte_model import save_byte_model
from helpers.classes import save_own_model, save_vision_model
from helpers.models import words
from helpers.process import fresh_process

ENTRY_POINTS = Path(arb_hf.__file__).parent / "entry_points"
ITEM = {"query": "Water is", "choices": ["wet", "a stone"], "gold": 0}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a dense model, a text, items, and the model quantized by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    save_byte_model(folder / "dense")
    (folder / "text.txt").write_text(words(400))
    (folder / "items.jsonl").write_text(json.dumps(ITEM))
    return folder


def quantize(here, out, *options, of="dense"):
    return main(
        ["quantize", str(here / of), str(here / out), "--dataset", str(here / "text.txt"), "--num-samples", "4",
         "--sequence-length", "32", "--block-size", "32", "--refinement", "paper", "--iterations", "2", "--dtype", "float32", *options]
    )  # fmt: skip


@pytest.fixture(scope="module")
def packed(here):
    options = ("--evaluate", str(here / "text.txt"), "--eval-length", "32", "--eval-windows", "3")
    assert quantize(here, "packed", *options, "--base-model", "me/dense") == 0
    return here / "packed"


@pytest.fixture(scope="module")
def other(here):
    assert quantize(here, "other", "--method", "billm", "--iterations", "15", "--no-column-group-bitmap") == 0
    return here / "other"


def said(capsys, *argv):
    """The JSON object that a command printed."""
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_quantize_writes_a_whole_model(packed):
    model = arb_hf.from_pretrained(packed)
    config = model.config.quantization_config
    assert (config.block_size, config.iterations, config.num_samples) == (32, 2, 4)
    (measurement,) = model.arb_report.measurements
    assert measurement.protocol == "3 windows of 32 tokens, float32"
    assert measurement.baseline != measurement.value
    card = (packed / "README.md").read_text()
    assert "base_model: me/dense" in card
    assert "3 windows of 32 tokens" in card
    assert (packed / "tokenizer.json").exists()


def test_quantize_speaks_json_and_flags(other, here, capsys):
    report = ArbReport.from_json(other / "arb_report.json")
    assert report.config["method"] == "billm"
    assert report.config["column_group_bitmap"] is False
    assert quantize(here, "json", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["folder"] == str(here / "json")
    assert 0 < result["output_error"] < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "arb-z"], "method='arb-z' is not allowed; allowed: 'arb-rc'"),
        (["--block-size", "100"], "block_size=100 is not allowed"),
        (["--block-size", "many"], "invalid int value"),
        (["--dtype", "float8"], "--dtype float8 is not one of"),
        (["--overrides", "{bad"], "argument --overrides: not JSON (Expecting property name"),
        (["--max-shard-size", "5GiBB"], "max_shard_size='5GiBB' is no size"),
        (["--base-model", "/home/me/model"], "base_model='/home/me/model' is no name on the Hub"),
    ],
)
def test_wrong_options_end_with_2_before_anything_is_loaded(here, options, message, capsys, monkeypatch):
    monkeypatch.setattr("arb_hf.cli.commands.load", None)
    with pytest.raises(SystemExit) as caught:
        quantize(here, "never", *options)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (here / "never").exists()


@pytest.mark.parametrize(
    ("option", "meant"), [("--refinment", "--refinement"), ("--evalute=x", "--evaluate"), ("--zzz", None)]
)
def test_a_mistyped_option_is_told_what_may_have_been_meant(here, option, meant, capsys):
    with pytest.raises(SystemExit) as caught:
        quantize(here, "never", option)
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    assert "usage: arb-hf quantize" in errors and f"unrecognized arguments: {option}" in errors
    assert (f"did you mean {meant}?" in errors) if meant else ("did you mean" not in errors)


def test_a_log_file_holds_the_command_what_was_logged_and_the_end(here, tmp_path, capsys):
    log = tmp_path / "run.log"
    assert quantize(here, "with-log", "--log-file", str(log), "--dataset", str(here / "nothing.txt")) == 1
    capsys.readouterr()
    assert quantize(here, "with-log", "--log-file", str(log)) == 0
    text = log.read_text()
    assert "INFO arb-hf" in text.splitlines()[0]
    assert "ERROR " in text and "nothing.txt does not exist" in text, "the log of both runs"
    assert "the plan of this run" in text
    assert text.rstrip().endswith(capsys.readouterr().out.strip())


def test_a_log_file_that_cannot_be_written_is_an_error_at_once(packed, tmp_path, capsys):
    log = tmp_path / "missing" / "run.log"
    assert main(["evaluate", str(packed), "--text", "x.txt", "--log-file", str(log)]) == 1
    assert f"--log-file {log} cannot be written: No such file or directory" in capsys.readouterr().err


def test_a_failed_run_leaves_no_empty_folder(here, capsys):
    assert quantize(here, "failed", "--num-samples", "4", "--dataset", str(here / "nothing.txt")) == 1
    assert "nothing.txt does not exist" in capsys.readouterr().err
    assert not (here / "failed").exists()
    (here / "made-before").mkdir()
    assert quantize(here, "made-before", "--dataset", str(here / "nothing.txt")) == 1
    assert (here / "made-before").exists()


def test_a_full_disk_leaves_nothing(here, monkeypatch, capsys):
    usage = shutil.disk_usage(here)
    monkeypatch.setattr("arb_hf.cli.commands.shutil.disk_usage", lambda _: usage._replace(free=10))
    assert quantize(here, "deep/er") == 1
    assert "too little for what becomes of" in capsys.readouterr().err
    assert not (here / "deep").exists()


def test_a_mistyped_option_before_the_harness_is_refused_too(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--foo", "lm-eval"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --foo" in capsys.readouterr().err


def test_a_terminal_shows_what_will_be_binarized(here, capfd, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert quantize(here, "terminal") == 0
    errors = capfd.readouterr().err
    assert "INFO what will be binarized in LlamaForCausalLM" in errors
    assert "Binarizing: " in errors


def test_quantize_does_not_overwrite_a_model(packed, here, capsys):
    with pytest.raises(SystemExit) as caught:
        quantize(here, "packed")
    assert caught.value.code == 2
    assert "holds a model already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect", "nowhere"], "nowhere is not a folder with a model"),
        (["push", "nowhere", "me/x"], "nowhere"),
        (["evaluate", "nowhere", "--text", "text.txt"], "nowhere"),
        (["compare", "nowhere", "nowhere"], "nowhere"),
        (["export", "nowhere", "out", "--to", "dense"], "nor is there a folder nowhere here"),
        (["quantize", "./nowhere", "out"], "there is no folder ./nowhere"),
        (["evaluate", "./nowhere", "--text", "text.txt"], "there is no folder ./nowhere"),
        (["export", "/no/where", "out", "--to", "dense"], "there is no folder /no/where"),
        (["push", "nowhere", "a/b/c"], "Repo id must be"),
    ],
)
def test_failures_end_with_1_and_one_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_debug_shows_where_an_error_came_from():
    with pytest.raises(ValueError, match="not a folder"):
        main(["inspect", "nowhere", "--debug"])


def test_evaluate_measures_and_keeps(packed, here, capsys):
    measure = ["evaluate", packed, "--text", here / "text.txt", "--eval-length", "32", "--eval-windows", "3"]
    result = said(capsys, *measure, "--items", here / "items.jsonl", "--baseline", here / "dense", "--save")
    kept = ArbReport.from_json(packed / "arb_report.json").measurements
    assert [each["metric"] for each in result["measurements"]] == ["perplexity", "acc", "acc_norm"]
    assert [vars(each) for each in kept] == result["measurements"]
    perplexity = result["measurements"][0]
    assert perplexity["value"] != perplexity["baseline"]
    assert "zero-shot, 1 items" in (packed / "README.md").read_text()


def test_the_baseline_is_measured_in_the_same_type(here, capsys):
    assert quantize(here, "in-bfloat16", "--dtype", "bfloat16") == 0
    capsys.readouterr()
    measure = ["evaluate", here / "in-bfloat16", "--text", here / "text.txt", "--eval-length", "32"]
    (measured,) = said(capsys, *measure, "--baseline", here / "dense")["measurements"]
    (dense,) = said(capsys, "evaluate", here / "dense", *measure[2:], "--dtype", "bfloat16")["measurements"]
    assert measured["protocol"].endswith("bfloat16") and measured["baseline"] == dense["value"]


def test_evaluate_refuses_to_measure_nothing_or_to_keep_nowhere(packed, here, capsys):
    for argv, message in (
        (["evaluate", str(packed)], "nothing to measure"),
        (["evaluate", str(here / "dense"), "--text", "x.txt", "--save"], "has none"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_inspect_agrees_with_the_loaded_model(packed, capsys):
    result = said(capsys, "inspect", packed)
    model = arb_hf.from_pretrained(packed)
    assert result["bits_per_weight"] == pytest.approx(arb_hf.bits_per_weight(model))
    assert result["missing"] == []
    assert result["options"]["method"] == "arb-rc"
    assert "tensors" not in result
    assert "model.layers.0.mlp.down_proj.weight" in said(capsys, "inspect", packed, "--tensors")["tensors"]
    assert main(["inspect", str(packed)]) == 0
    text = capsys.readouterr().out
    assert f"{result['bits_per_weight']:.3f}" in text
    assert "mlp.down_proj" in text


def test_inspect_of_methods_without_column_scales(other, capsys):
    model = arb_hf.from_pretrained(other)
    assert said(capsys, "inspect", other)["bits_per_weight"] == pytest.approx(arb_hf.bits_per_weight(model))


def test_every_command_works_on_a_model_that_takes_pictures_too(here, capsys):
    save_vision_model(here / "vision")
    assert quantize(here, "vision-arb", of="vision") == 0
    capsys.readouterr()
    assert (here / "vision-arb" / "processor_config.json").exists()
    assert "AutoModelForImageTextToText" in (here / "vision-arb" / "README.md").read_text()
    measured = said(capsys, "evaluate", here / "vision-arb", "--text", here / "text.txt", "--eval-length", "32")
    assert measured["measurements"][0]["value"] > 0
    assert said(capsys, "inspect", here / "vision-arb")["missing"] == []
    said(capsys, "export", here / "vision-arb", here / "vision-dense", "--to", "dense")
    AutoModelForImageTextToText.from_pretrained(here / "vision-dense")
    assert (here / "vision-dense" / "processor_config.json").exists()


def test_code_of_a_models_own_runs_where_the_command_line_trusts_it(here, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    save_own_model(here / "coded")
    trust = "--trust-remote-code"
    commands = [
        ["evaluate", str(here / "coded-arb"), "--text", str(here / "text.txt"), "--eval-length", "32"],
        ["export", str(here / "coded-arb"), str(here / "coded-dense"), "--to", "dense"],
    ]
    assert quantize(here, "coded-arb", of="coded") == 1
    assert "--trust-remote-code on the command line" in capsys.readouterr().err
    assert quantize(here, "coded-arb", trust, of="coded") == 0
    for command in commands:
        assert main(command) == 1
        assert "comes with code of its own" in capsys.readouterr().err
        assert main([*command, trust]) == 0
    assert main(["inspect", str(here / "coded-arb")]) == 0  # needs no code


def test_inspect_of_a_dense_model(here, capsys):
    result = said(capsys, "inspect", here / "dense")
    assert result["options"] is None
    assert result["bits_per_weight"] is None
    assert main(["inspect", str(here / "dense")]) == 0
    assert "not packed by arb_hf" in capsys.readouterr().out


def sparse_model(folder, size):
    """A packed model with one more tensor of ``size`` bytes that take no place on disk."""
    folder.mkdir()
    modules = {"model.layers.0.q_proj": {"salient_columns": 0}}
    (folder / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "arb_hf", "modules": modules}})
    )
    header = json.dumps(
        {
            "model.layers.0.q_proj.weight": {"dtype": "I32", "shape": [4, 64], "data_offsets": [0, 1024]},
            "model.embed_tokens.weight": {"dtype": "U8", "shape": [size], "data_offsets": [1024, 1024 + size]},
        }
    ).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 1024 + size)


def test_inspect_reads_headers_only(tmp_path, capsys):
    sparse_model(tmp_path / "big", 5 * 10**9)
    start = time.process_time()
    result = said(capsys, "inspect", tmp_path / "big")
    assert time.process_time() - start < 0.5  # reading 5 GB takes seconds
    assert result["bytes"] > 5 * 10**9
    assert result["binary"]["weights"] == 128 * 64
    assert os.stat(tmp_path / "big" / "model.safetensors").st_blocks * 512 < 10**6


def test_inspect_finds_damage(packed, tmp_path, capsys):
    sparse_model(tmp_path / "model", 100)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"]["modules"]["model.layers.1.q_proj"] = {"salient_columns": 0}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(tmp_path / "model")]) == 0
    assert "DAMAGED: no tensors for 1 modules, first model.layers.1.q_proj" in capsys.readouterr().out
    whole = (packed / "model.safetensors").read_bytes()
    file = tmp_path / "model" / "model.safetensors"
    for data, message in [
        (whole[:-1], "cut off"),
        (b"", "not a safetensors file"),
        (struct.pack("<Q", 2**40) + whole, "not a safetensors file"),
        (struct.pack("<Q", 4) + b"nope", "not a safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "not a safetensors file"),
        (struct.pack("<Q", 14) + b'{"a": {"b":1}}', "not a safetensors file"),
    ]:
        file.write_bytes(data)
        assert main(["inspect", str(tmp_path / "model")]) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "model" / headers.INDEX).write_text('{"weight_map": {"x": "../model.safetensors"}}')
    assert main(["inspect", str(tmp_path / "model")]) == 1


def test_inspect_counts_shards(packed, tmp_path):
    model = arb_hf.from_pretrained(packed)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    summary = headers.inspect_folder(tmp_path)
    assert len(summary["files"]) > 2
    assert summary["bits_per_weight"] == pytest.approx(arb_hf.bits_per_weight(model))


def test_compare_lays_two_runs_side_by_side(packed, other, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    result = said(capsys, "compare", packed, other, "--plot", tmp_path / "errors.png")
    rows = {label: values for label, *values in result["rows"]}
    assert rows["method"] == ["arb-rc", "billm"]
    assert rows["output error"][0] < rows["output error"][1]
    assert (tmp_path / "errors.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["compare", str(packed), str(other)]) == 0
    assert "bits per weight" in capsys.readouterr().out


def test_compare_shows_what_only_one_run_has(packed, other, tmp_path, capsys):
    shutil.copytree(other, tmp_path / "other")
    (tmp_path / "other" / "arb_report.json").unlink()
    rows = {label: values for label, *values in said(capsys, "compare", packed, tmp_path / "other")["rows"]}
    assert rows["output error"][0] > 0
    assert rows["output error"][1] is None
    assert main(["compare", str(packed), str(tmp_path / "other")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("output error")]
    assert line.endswith(" -")
    assert main(["compare", str(packed), str(tmp_path / "other"), "--plot", str(tmp_path / "x.png")]) == 1
    assert f"{tmp_path / 'other'} has no arb_report.json to draw" in capsys.readouterr().err


def test_compare_refuses_a_dense_model(packed, here, capsys):
    assert main(["compare", str(packed), str(here / "dense")]) == 1
    assert "holds no model packed by arb_hf" in capsys.readouterr().err


def test_compare_refuses_a_plot_that_cannot_be_drawn(packed, other, here, capsys):
    for plot, message in (("x.nonsense", "end the name with one of"), ("nowhere/x.png", "there is no such folder")):
        with pytest.raises(SystemExit) as caught:
            main(["compare", str(packed), str(other), "--plot", str(here / plot)])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "dense", "--type", "f16"], "--type has no effect with --to dense: it is for gguf"),
        (["--to", "dense", "--pre-tokenizer", "qwen2"], "--pre-tokenizer has no effect with --to dense"),
        (["--to", "gguf", "--dtype", "float16"], "--dtype has no effect with --to gguf: it is for dense"),
        (["--to", "dense", "--dtype", "fp16"], "--dtype fp16 is not one of"),
    ],
)
def test_export_refuses_options_without_effect_before_it_loads(packed, here, options, message, capsys, monkeypatch):
    monkeypatch.setattr("arb_hf.cli.commands.from_pretrained", None)
    with pytest.raises(SystemExit) as caught:
        main(["export", str(packed), str(here / "never"), *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (here / "never").exists()


def test_quantize_refuses_the_folder_of_an_adapter(here, capsys):
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit) as caught:
        quantize(here, "adapter")
    assert caught.value.code == 2
    assert "adapter holds an adapter (adapter_config.json)" in capsys.readouterr().err


def test_export_says_what_was_lost(packed, here, capsys):
    result = said(capsys, "export", packed, here / "exported", "--to", "dense", "--dtype", "bfloat16")
    assert result["matrices"] == {"bfloat16": 14}
    assert 0 < result["rounding"] < 0.01
    AutoModelForCausalLM.from_pretrained(here / "exported")
    for out in (packed, here / "exported"):
        with pytest.raises(SystemExit) as caught:
            main(["export", str(packed), str(out), "--to", "dense"])
        assert caught.value.code == 2
        assert f"{out} holds a model already" in capsys.readouterr().err
    (here / "file.gguf").write_bytes(b"mine")
    with pytest.raises(SystemExit) as caught:
        main(["export", str(packed), str(here / "file.gguf"), "--to", "gguf"])
    assert caught.value.code == 2
    assert "file.gguf is a file already" in capsys.readouterr().err
    assert (here / "file.gguf").read_bytes() == b"mine"


def test_compare_shows_what_tuning_gave(packed, other, tmp_path, capsys):
    shutil.copytree(packed, tmp_path / "tuned")
    report = ArbReport.from_json(packed / "arb_report.json")
    report.tuned = [TuneRecord(0, 0.5, 0.3, 4, 1.0), TuneRecord(1, 0.7, 0.4, 4, 1.0)]
    report.to_json(tmp_path / "tuned" / "arb_report.json")
    rows = {label: values for label, *values in said(capsys, "compare", tmp_path / "tuned", other)["rows"]}
    assert rows["tuning: held-out loss before"] == [pytest.approx(0.6), None]
    assert rows["tuning: held-out loss after"] == [pytest.approx(0.35), None]


def test_measuring_again_keeps_the_name_of_the_original(packed, here):
    measure = ["evaluate", str(packed), "--text", str(here / "text.txt"), "--eval-length", "32", "--save"]
    assert main(measure) == 0
    assert "base_model: me/dense" in (packed / "README.md").read_text()


def test_progress_in_a_log_file_is_dated_lines(here, capfd):
    assert quantize(here, "logged") == 0
    errors = capfd.readouterr().err
    assert "\r" not in errors
    assert "INFO decoder layer 1 of 2: mean output error" in errors


def test_every_option_of_the_config_is_an_option_with_words():
    parameters = inspect.signature(arb_hf.ArbConfig).parameters
    docs = argument_docs(arb_hf.ArbConfig.__doc__)
    command = build_parser(["quantize"])._subparsers._group_actions[0].choices["quantize"]
    destinations = {action.dest for action in command._actions}
    for name in parameters:
        if name not in NOT_OPTIONS:
            assert f"config.{name}" in destinations
            assert docs[name], name


def test_several_processes_write_and_speak_once(here, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert quantize(here, "second-process") == 0
    assert capsys.readouterr().out == ""
    assert not list((here / "second-process").glob("*"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_examples(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"  arb-hf {command} " in text
    assert "exit codes" in text


STARTED = """
import sys
sys.path.insert(0, {entry_points!r})
import arb_hf_start
try:
    code = arb_hf_start.main() or 0
except SystemExit as stop:
    code = stop.code
assert "torch" not in sys.modules
sys.exit(code)
"""


@pytest.mark.parametrize("argv", [["--help"], ["inspect", "{packed}"], ["push", "--help"], ["--version"]])
def test_the_script_starts_without_torch(packed, argv):
    argv = ["arb-hf", *(each.format(packed=packed) for each in argv)]
    code = f"import sys; sys.argv = {argv!r}\n" + STARTED.format(entry_points=str(ENTRY_POINTS))
    done = fresh_process(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout


IDENTITY = """
import sys
sys.path.insert(0, {entry_points!r})
import arb_hf_start
parser = arb_hf_start.parser()
try:
    parser.inspect_folder({damaged!r})
except ValueError as caught:
    error = caught
import arb_hf
assert type(error) is arb_hf.ArbFormatError, type(error)
assert arb_hf.ArbConfig and sys.modules["arb_hf.cli.parser"] is parser
files = [each.__file__ for each in list(sys.modules.values()) if "arb_hf" in (getattr(each, "__file__", None) or "")]
assert len(files) == len(set(files)) and len(files) > 10, files
"""


def test_the_script_loads_every_module_once(packed, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"no safetensors")
    done = fresh_process(IDENTITY.format(entry_points=str(ENTRY_POINTS), damaged=str(tmp_path)))
    assert done.returncode == 0, done.stderr


def test_python_m_is_the_same(packed):
    done = fresh_process(f"import runpy, sys; sys.argv = ['arb_hf', 'inspect', {str(packed)!r}, '--json']\n"
                         "runpy.run_module('arb_hf', run_name='__main__', alter_sys=True)")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["options"]["method"] == "arb-rc"


OPTIMUM = """
import sys
try:
    import optimum.commands.register.register_arb_hf
except ImportError:  # arb_hf runs from its source and is not installed
    sys.path.insert(0, {entry_points!r})
from optimum.commands.optimum_cli import main
main()
"""


def test_optimum_cli_offers_the_commands(packed):
    pytest.importorskip("optimum.commands.optimum_cli")
    for argv, expected in (
        (["--help"], "quantize"),
        (["compare", "--help"], "  optimum-cli arb compare ./smol-arb-rc"),
        (["inspect", str(packed)], "mlp.down_proj"),
    ):
        code = f"import sys; sys.argv = ['optimum-cli', 'arb', *{argv!r}]\n" + OPTIMUM.format(
            entry_points=str(ENTRY_POINTS)
        )
        done = fresh_process(code)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


def test_version_tells_of_the_kernels(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    there = "built" if native.library() is not None else "not built"
    assert re.fullmatch(rf"arb-hf .+, C kernels {there}\n", capsys.readouterr().out)


def test_help_of_quantize_names_the_values(capsys):
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    text = capsys.readouterr().out
    for values in (
        "{arb-rc,arb-x,arb,billm}",
        "{full,paper}",
        "{hessian,magnitude}",
        "int8}",
        '"model.layers.0": null',
    ):
        assert values in text
    assert ":mod:" not in text and "`" not in text


def test_help_of_quantize_shows_what_a_default_depends_on(capsys):
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: full)" in text
    assert "(default: 32 with refinement=full, 0 with refinement=paper)" in text
    assert "(default: int8 with refinement=full, float16 with refinement=paper)" in text


def test_a_figure_names_the_type_it_was_measured_in(packed, here, capsys):
    measure = ["evaluate", packed, "--text", here / "text.txt", "--eval-length", "32", "--dtype", "bfloat16"]
    (measurement,) = said(capsys, *measure)["measurements"]
    assert measurement["protocol"].endswith("tokens, bfloat16")


def test_lm_eval_fails_in_one_line(monkeypatch, capsys):
    pytest.importorskip("lm_eval")

    def offline():
        raise OSError("no connection")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", offline)
    assert main(["lm-eval", "--tasks", "arc_easy"]) == 1
    assert capsys.readouterr().err == "arb-hf: error: lm_eval: OSError: no connection\n"


def test_missing_lm_eval_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["lm-eval", "--help"]) == 1
    assert "pip install 'arb_hf[eval]'" in capsys.readouterr().err


def test_a_model_without_tokenizer_can_be_exported_and_not_evaluated(packed, tmp_path, capsys):
    bare = tmp_path / "bare"
    arb_hf.from_pretrained(packed).save_pretrained(bare)
    assert main(["evaluate", str(bare), "--text", "wikitext2"]) == 1
    assert "has no tokenizer" in capsys.readouterr().err
    assert main(["export", str(bare), str(tmp_path / "dense"), "--to", "dense"]) == 0
