"""The examples run, in their quick mode, on a tiny model."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import arb_hf
from helpers.byte_model import save_byte_model
from helpers.models import words
from helpers.process import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's
EXAMPLES = ROOT / "examples"


@pytest.fixture
def example(monkeypatch, capsys, tmp_path):
    """Run an example with arguments, in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    save_byte_model(folder / "dense", max_position_embeddings=512)
    (folder / "calibration.txt").write_text(words(200))
    (folder / "held_out.txt").write_text(words(400)[600:])
    return folder


def test_quantize_then_load_then_recover(example, here):
    texts = ("--calibration", here / "calibration.txt", "--text", here / "held_out.txt")
    printed = example("quantize_and_push", here / "dense", "--out", here / "packed", "--length", 32, "--quick", *texts)
    assert "bits per weight" in printed
    assert "held_out.txt" in (here / "packed" / "README.md").read_text()

    printed = example("load_and_generate", here / "packed", "--prompt", "w1 w2", "--tokens", 3)
    assert "w1 w2" in printed

    pytest.importorskip("peft")
    options = ("--train", here / "calibration.txt", "--text", here / "held_out.txt", "--eval-length", 32)
    options += ("--length", 32, "--rank", 2, "--eval-windows", 2, "--quick")
    assert "perplexity after" in example("lora_recovery", here / "packed", *options, "--out", here / "adapter")
    assert (here / "adapter" / "adapter_config.json").exists()
    options += ("--teacher", here / "dense", "--scales", "--rate", 0.03, "--out", here / "tuned")  # beyond int8 steps
    assert "perplexity of the teacher" in example("lora_recovery", here / "packed", *options)
    assert (here / "tuned" / "model.safetensors").stat().st_size == (
        here / "packed" / "model.safetensors"
    ).stat().st_size
    before, after = (arb_hf.from_pretrained(here / name).state_dict() for name in ("packed", "tuned"))
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"row_parameters", "column_scales", "salient_column_scales", "row_absmax"}


def test_compare_methods(example, here):
    texts = ("--calibration", here / "calibration.txt", "--text", here / "held_out.txt", "--length", 32, "--quick")
    printed = example("compare_methods", here / "dense", *texts, "--forms", "billm", "arb-rc + CGB", "--plot", "m.png")
    assert [line.split()[0] for line in printed.splitlines()[1:]] == ["full", "billm", "arb-rc"]
    assert Path("m.png").stat().st_size > 1000


@pytest.fixture
def benchmark(example, here, monkeypatch):
    """Run a benchmark that takes ``--model`` and ``--data`` in its quick mode; returns what it printed."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    data = here / "texts"
    data.mkdir(exist_ok=True)
    for name, seed in (("wiki.valid.raw", 3000), ("wiki.test.raw", 2000)):
        (data / name).write_text(words(seed))

    def run(name, *arguments):
        return example(name, "--model", here / "dense", "--data", data, *arguments)

    return run


def test_pareto(benchmark, capsys):
    pytest.importorskip("matplotlib")
    leave_out = ("--skip", "hqq", "billm", "arb-x", "arb-rc", "full, one", "full + CGB", "tuned, one", "tuned + CGB")
    leave_out += ("bits=1", "bits=2.0", "bits=2.6", "bits=3")  # the tiny model takes 1.47 bits at least
    printed = benchmark("pareto", "--quick", *leave_out)
    rows = [line.split(",")[1] for line in Path("pareto.csv").read_text().splitlines()[1:] if '"' not in line]
    assert {"full", "tuned", "bits=2.3", "RTN 2 bits", "GPTQ-style 3 bits"} <= set(rows)
    assert "full precision" in printed
    assert Path("pareto.png").stat().st_size > 1000
    assert "RTN" not in benchmark("pareto", "--quick", *leave_out), "points in the CSV are not run again"
    with pytest.raises(SystemExit):
        benchmark("pareto", "--quick", "--seed", 1, *leave_out)
    assert "holds points of another run (dense wiki seed 0 quick)" in capsys.readouterr().err


def test_protocol(benchmark):
    printed = benchmark("benchmarks/protocol", "--quick", "--refinement", "full", "--option", "tune_steps=2")
    assert [line.split()[0] for line in printed.splitlines()] == ["full", "method=arb-rc"]


def test_time_of_a_whole_model(benchmark):
    printed = benchmark("benchmarks/model", "--quick", "--threads", 1, "--json", "model.json")
    assert "search + update" in printed
    seconds = json.loads(Path("model.json").read_text())["seconds"]
    assert {"capture", "H", "factor", "search", "update", "forward, inputs", "forward, binary"} <= seconds.keys()


def test_reading_of_text(tmp_path):
    program = EXAMPLES / "benchmarks" / "text.py"
    done = subprocess.run(
        [sys.executable, program, "--quick"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines()[4:]]
    memory = {name.strip(): int(megabytes) for name, _, megabytes, _ in rows}
    assert max(memory[name] for name in memory if name.startswith("calibration")) < memory["one string"] / 2


def test_plan_against_run(tmp_path):
    program = EXAMPLES / "benchmarks" / "planning.py"
    done = subprocess.run(
        [sys.executable, program, "--quick"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[4:]]
    ratios = {row[0]: row[-1] for row in rows}
    assert ratios["bytes"] == ratios["bits"] == "1.00"


def test_ablation(benchmark):
    assert "column feedback" in benchmark("benchmarks/ablation", "--layers", 0, "--windows", 1)
    two = ("--variants", "published", "only column feedback")
    printed = benchmark("benchmarks/ablation", "--quick", "--perplexity", *two)
    assert [line.split()[0] for line in printed.splitlines()] == ["published", "only"]
    perplexities = [line.partition("perplexity")[2].split()[0] for line in printed.splitlines()]
    assert perplexities[0] != perplexities[1]
