"""What users do wrong, and the first line of what each is told.

``python tests/test_bad_input.py`` prints the table.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import arb_hf
from arb_hf import ArbCalibrationError, ArbConfig
from arb_hf.calibrate.model import binarize_model
from arb_hf.cli.parser import main
from helpers.models import llama, token_samples, word_tokenizer, words
from helpers.process import DATA

PACKED = str(DATA / "golden" / "arb-rc-two-float16")


class Place:
    """A folder with a dense model, its tokenizer and a text; ``patch`` is pytest's monkeypatch."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        self.model = str(folder / "dense")
        if not Path(self.model).exists():
            llama(1).save_pretrained(self.model)
            word_tokenizer().save_pretrained(self.model)
            (folder / "text.txt").write_text(words(400))
        patch.chdir(folder)

    def binarize(self, dtype: torch.dtype = torch.float32, model: str | None = None, **options: object) -> None:
        """A run that must be over before the first forward pass, if it ends with an error."""
        chosen = {
            "dataset": token_samples(length=32),
            "refinement": "paper",
            "iterations": 1,
            "num_samples": 4,
            "sequence_length": 32,
        } | options
        AutoModelForCausalLM.from_pretrained(model or self.model, quantization_config=ArbConfig(**chosen), dtype=dtype)

    def without_pass(self, **options: object) -> None:
        self.patch.setattr("arb_hf.calibrate.model.capture", lambda *_: pytest.fail("a forward pass was spent"))
        self.binarize(**options)

    def command(self, *argv: str) -> None:
        """``arb-hf``; what it prints as its error becomes one."""
        self.patch.setattr("arb_hf.cli.commands.load", lambda *_, **__: pytest.fail("the model was loaded"))
        assert main([*argv, "--debug"]) == 0

    def without(self, package: str) -> None:
        for name in list(sys.modules):
            if name.partition(".")[0] == package:
                self.patch.delitem(sys.modules, name)
        self.patch.setitem(sys.modules, package, None)
        self.patch.delitem(sys.modules, "arb_hf.lora", raising=False)  # the module that imports it at once

    def quantized(self, method: str) -> str:
        """A copy of the dense model that says it was quantized by another method."""
        folder = self.folder / method
        shutil.copytree(self.model, folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": method, "bits": 4}
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    def offline(self, error: Exception) -> None:
        def fail(*_: object, **__: object) -> None:
            raise error

        self.patch.setattr(datasets, "load_dataset", fail)

    def full_disk(self, free: int = 1000) -> None:
        self.patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - free, free))

    def of_another_vocabulary(self) -> PreTrainedTokenizerFast:
        tokenizer = word_tokenizer()
        tokenizer.add_tokens([f"x{i}" for i in range(20)])
        return tokenizer

    def training(self) -> None:
        binarize_model(llama(1).train(), ArbConfig(dataset=token_samples()), [])

    def interrupted(self) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        self.patch.setattr("arb_hf.calibrate.model.binarize_layer", interrupt)
        self.binarize(checkpoint_dir="interrupted")


TEXT = {"dataset": "text.txt"}
Row = tuple[Callable[[Place], object], type[BaseException] | None, str]
# What was done: how, the type of the error (None: it works, or a warning), the first line of the message.
TABLE: dict[str, Row] = {
    "tokenizer that does not exist": (
        lambda p: p.without_pass(**TEXT, tokenizer="nowhere"), ArbCalibrationError,
        "no tokenizer could be loaded from 'nowhere' (OSError); pass tokenizer= or token tensors",
    ),
    "tokenizer of another model": (
        lambda p: p.without_pass(dataset=["x1 x2 x3 " * 100], tokenizer=p.of_another_vocabulary()), ArbCalibrationError,
        "calibration sample 0 has token 131, the model's vocabulary has 128: use the model's own tokenizer",
    ),
    "tokenizer that is none": (
        lambda p: p.without_pass(**TEXT, tokenizer=3), ValueError,
        "ArbConfig: tokenizer=3 is not allowed; allowed: a name, a folder, a tokenizer, or None",
    ),
    "empty text": (lambda p: p.without_pass(dataset=["", " \n"]), ArbCalibrationError, "the text is empty"),
    "no data": (
        lambda p: p.without_pass(dataset=None), ArbCalibrationError,
        "there is no text: pass a name, a path, a list or a datasets.Dataset",
    ),
    "text shorter than one sequence": (
        lambda p: p.without_pass(dataset=[words(20)]), ArbCalibrationError,
        "the calibration text has 20 tokens, fewer than one sequence of sequence_length=32; pass more text or lower "
        "sequence_length",
    ),
    "huge num_samples": (
        lambda p: p.without_pass(**TEXT, num_samples=10**12), ArbCalibrationError,
        "the calibration text has 400 tokens, but num_samples=1000000000000 x sequence_length=32 asks for "
        "32000000000000; pass more text or lower one of them (num_samples=12 would fit)",
    ),
    "sequence_length beyond the model's": (
        lambda p: p.without_pass(**TEXT, sequence_length=4096), ArbCalibrationError,
        "sequence_length=4096 is longer than the model takes (256 positions)",
    ),
    "tokens outside the vocabulary": (
        lambda p: p.without_pass(dataset=[torch.arange(200)]), ArbCalibrationError,
        "calibration sample 0 has token 199, the model's vocabulary has 128: use the model's own tokenizer",
    ),
    "a file that does not exist": (
        lambda p: p.without_pass(dataset="texts.txt"), ArbCalibrationError, "the text file texts.txt does not exist",
    ),
    "a data set nobody knows": (
        lambda p: p.without_pass(dataset="imagenet"), ArbCalibrationError,
        "the text 'imagenet' is not known; pass 'c4', 'wikitext2', 'ptb', a path ending in .txt, a path ending in "
        ".raw, a path ending in .jsonl, a path ending in .parquet, a list or a datasets.Dataset",
    ),
    "a name while offline": (
        lambda p: (p.offline(ConnectionError("Couldn't reach 'allenai/c4' on the Hub")), p.without_pass(dataset="c4")),
        ArbCalibrationError,
        "the data set 'c4' (allenai/c4) could not be loaded (ConnectionError: Couldn't reach 'allenai/c4' on the Hub). "
        "Offline, pass a file instead (dataset=, --dataset or --text: .txt, .raw, .jsonl, .parquet), or in Python a "
        "list of strings or token tensors",
    ),
    "a cache that cannot be written": (
        lambda p: (p.offline(PermissionError(13, "Permission denied", "/cache")), p.without_pass(dataset="wikitext2")),
        ArbCalibrationError,
        "the data set 'wikitext2' (Salesforce/wikitext) could not be loaded (PermissionError: [Errno 13] Permission "
        "denied: '/cache'). Offline, pass a file instead (dataset=, --dataset or --text: .txt, .raw, .jsonl, "
        ".parquet), or in Python a list of strings or token tensors",
    ),
    "binarizing a packed model again": (
        lambda p: p.binarize(model=PACKED), UserWarning,
        "You passed `quantization_config` or equivalent parameters to `from_pretrained` but the model you're loading "
        "already has a `quantization_config` attribute. The `quantization_config` from the model will be used.",
    ),
    "the same by arb-hf quantize": (
        lambda p: p.command("quantize", PACKED, "out"), ValueError,
        f"{PACKED} is quantized already (quant_method 'arb_hf'): quantize its original",
    ),
    "a model quantized by another method": (
        lambda p: p.without_pass(model=p.quantized("gptq")), ValueError,
        "The model is quantized with GPTQConfig but you are passing a ArbConfig config. Please make sure to pass the "
        "same quantization config class to `from_pretrained` with different loading attributes.",
    ),
    "the same by arb-hf quantize (gptq)": (
        lambda p: p.command("quantize", p.quantized("gptq"), "out"), ValueError,
        "FOLDER/gptq is quantized already (quant_method 'gptq'): quantize its original",
    ),
    "loading a dense model as a packed one": (
        lambda p: arb_hf.from_pretrained(p.model), ValueError,
        "FOLDER/dense is not a model packed by arb_hf: its config.json has quant_method None",
    ),
    "dtype float16 on the CPU": (lambda p: p.binarize(dtype=torch.float16), None, ""),
    "a model in training mode": (
        lambda p: p.training(), ArbCalibrationError,
        "the model is in training mode, where dropout would disturb calibration: call model.eval()",
    ),
    "without datasets": (
        lambda p: (p.without("datasets"), p.without_pass(dataset="c4")), ArbCalibrationError,
        "reading this text needs the package datasets: pip install datasets",
    ),
    "without gguf": (
        lambda p: (p.without("gguf"), arb_hf.export.export_gguf(arb_hf.from_pretrained(PACKED), None, "x.gguf")),
        ImportError, "exporting GGUF needs the package gguf: pip install 'arb_hf[gguf]'",
    ),
    "without matplotlib": (
        lambda p: (p.without("matplotlib"), arb_hf.ArbReport({}, "x", 0, 0).plot("x.png")), ImportError,
        "drawing needs matplotlib: pip install 'arb_hf[plot]'",
    ),
    "without peft": (
        lambda p: (p.without("peft"), __import__("arb_hf.lora").lora.lora_config(arb_hf.from_pretrained(PACKED))),
        ImportError, "arb_hf.lora needs PEFT: pip install 'arb_hf[lora]'",
    ),
    "an output folder that cannot be written": (
        lambda p: p.command("quantize", p.model, "/proc/out"), OSError,
        "/proc/out cannot be written: No such file or directory",
    ),
    "a file in the output folder's place": (
        lambda p: p.command("quantize", p.model, "text.txt/out"), OSError,
        "text.txt/out cannot be written: Not a directory",
    ),
    "a full disk": (
        lambda p: (p.full_disk(), p.command("quantize", p.model, "out")), OSError,
        "the disk of out has 0.0 MB free, too little for what becomes of 0.4 MB",
    ),
    "a full disk for checkpoints": (
        lambda p: (p.full_disk(), (p.folder / "kept").mkdir(), p.without_pass(checkpoint_dir="kept")),
        ArbCalibrationError,
        "the disk of FOLDER/kept has 0.00 MB free, the run needs up to 0.04 MB there (checkpoints of packed layers and "
        "calibration activations): free some, set checkpoint_dir to a larger disk, or lower num_samples",
    ),
    "a checkpoint folder that cannot be written": (
        lambda p: p.without_pass(checkpoint_dir="/proc/kept"), ArbCalibrationError,
        "checkpoint_dir /proc/kept: the folder could not be written (No such file or directory). Layers stored before are "
        "whole: repair or free the disk, then run the same command again to continue",
    ),
    "an output folder with a model in it": (
        lambda p: p.command("quantize", p.model, p.model), SystemExit, "2",
    ),
    "a cancelled run": (lambda p: p.interrupted(), KeyboardInterrupt, ""),
}  # fmt: skip


def told(name: str, place: Place) -> tuple[type[BaseException] | None, str]:
    """Type and first line of the error, folders left out."""
    try:
        TABLE[name][0](place)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        return type(error), str(error).partition("\n")[0].replace(str(place.folder), "FOLDER")
    return None, ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bad")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a folder that nobody can write is needed")
@pytest.mark.parametrize("name", TABLE)
def test_what_users_are_told(name, folder, monkeypatch):
    kind, message = told(name, Place(folder, monkeypatch))
    _, expected, line = TABLE[name]
    assert message == line
    assert kind is None if expected is None else kind is not None and issubclass(kind, expected)


def test_a_cancelled_run_says_how_to_go_on(folder, monkeypatch, caplog):
    with caplog.at_level("WARNING"):
        told("a cancelled run", Place(folder, monkeypatch))
    assert (
        "binarizing was interrupted: 0 of 1 decoder layers are kept in interrupted; run the same command again"
        in caplog.text
    )


if __name__ == "__main__":
    print("| what was done | error | its first line |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for name in TABLE:
            with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                kind, line = told(name, Place(Path(temporary), patch))
            print(f"| {name} | {'works' if kind is None else kind.__name__} | {line.replace('|', chr(92) + '|')} |")
