"""Models and records as Python objects: copied, pickled, sent to other processes, cast, imported again."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GptOssConfig, MixtralConfig, PreTrainedModel

import arb_hf
from arb_hf.nn.scaled import ScaledLinear
from helpers.byte_model import VOCABULARY, byte_tokens, logits, save_byte_model
from helpers.process import fresh_process

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_local_experts": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "num_experts_per_tok": 2}
SIZES |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 128}
FAMILIES = {"llama": None, "mixtral": MixtralConfig(**SIZES), "gpt_oss": GptOssConfig(**SIZES, head_dim=16)}


def config() -> arb_hf.ArbConfig:
    return arb_hf.ArbConfig(dataset=byte_tokens(), num_samples=4, block_size=32, refinement="paper", iterations=2)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model, saved."""
    place, chosen = tmp_path_factory.mktemp(request.param), FAMILIES[request.param]
    if chosen is None:
        save_byte_model(place / "dense", num_hidden_layers=1)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(chosen).eval().save_pretrained(place / "dense")
    model = AutoModelForCausalLM.from_pretrained(place / "dense", quantization_config=config(), dtype=torch.float32)
    arb_hf.save_pretrained(model, None, place / "packed")
    return place / "packed"


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    loaded = arb_hf.from_pretrained(folder)
    logits(loaded)  # a model that was used knows more than one that was not
    return loaded


def through_torch(value: object) -> object:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "torch.save": through_torch}
COPIES |= {f"pickle {each}": lambda x, each=each: pickle.loads(pickle.dumps(x, each)) for each in (2, 4, 5)}
experts_only = pytest.mark.parametrize("folder", ["mixtral"], indirect=True)
copies = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())


@copies
def test_a_copy_computes_the_same(model: PreTrainedModel, copied: Callable) -> None:
    expected, other = logits(model), copied(model)
    assert torch.equal(logits(other), expected)
    assert other.state_dict().keys() == model.state_dict().keys()


def test_a_copy_is_another_model(model: PreTrainedModel, tmp_path: Path) -> None:
    """What happens to one does not happen to the other."""
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for module in arb_hf.nn.binary_modules(other).values():
            module.row_parameters.zero_()
        assert not torch.equal(logits(other), expected) and torch.equal(logits(model), expected)
    other = copy.deepcopy(model)
    other.save_pretrained(tmp_path)
    assert torch.equal(logits(arb_hf.from_pretrained(tmp_path)), expected)
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(logits(arb_hf.dequantize(other)), expected, **close)
    assert torch.equal(logits(model), expected)


@copies
def test_scales_in_training(model: PreTrainedModel, copied: Callable) -> None:
    trained = copy.deepcopy(model).requires_grad_(False)
    arb_hf.scales.unfreeze(trained)
    with torch.no_grad():
        for module in trained.modules():
            if isinstance(module, ScaledLinear):
                module.steps["row_parameters"].fill_(0.1)
    assert torch.equal(logits(copied(trained)), logits(trained))


def test_state_dicts_need_no_pickle(model: PreTrainedModel, folder: Path) -> None:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = arb_hf.from_pretrained(folder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_casts_and_moves_keep_the_scales(model: PreTrainedModel, dtype: torch.dtype) -> None:
    expected, other = logits(model), copy.deepcopy(model).to(dtype)
    assert (logits(other).float() - expected).norm() < 2e-2 * expected.norm()
    assert torch.equal(logits(other.to(torch.float32)), expected) or dtype == torch.bfloat16
    for name, module in arb_hf.nn.binary_modules(other).items():
        kept = model.get_submodule(name).packed
        assert all(torch.equal(tensor, kept[each]) for each, tensor in module.packed.items())
    assert {each.device.type for each in other.to("meta").parameters()} == {"meta"}


def compute(model: PreTrainedModel) -> torch.Tensor:
    torch.set_num_threads(1)
    return logits(model)


@experts_only  # a process of its own
def test_a_spawned_process_gets_the_model(model: PreTrainedModel) -> None:
    shared = copy.deepcopy(model).share_memory()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(compute, (shared,))
    assert torch.equal(found, compute(model))


@copies
def test_records(folder: Path, copied: Callable) -> None:
    report = arb_hf.load_report(folder)
    assert copied(report) == report and copied(report).to_dict() == report.to_dict()
    assert copied(config()).to_dict() == config().to_dict()
    loaded = AutoConfig.from_pretrained(folder)
    assert copied(loaded).to_dict() == loaded.to_dict()
    for error in (arb_hf.ArbFormatError("x"), arb_hf.ArbCalibrationError("x"), arb_hf.ArbUploadError("x")):
        assert str(copied(error)) == "x"


@copies
def test_binary_weights(copied: Callable) -> None:
    weight = arb_hf.binarize_weight(torch.randn(8, 64), None, config())
    other = copied(weight)
    assert torch.equal(other.dequantize(), weight.dequantize()) and other.form == weight.form
    assert weight == weight and weight != other and len({weight, other}) == 2 and weight in [other, weight]


IMPORTED_AGAIN = """
import gc, importlib, sys
import torch
import arb_hf
from helpers.byte_model import logits

folder = sys.argv[1]
old = arb_hf.from_pretrained(folder)
expected = logits(old)
importlib.reload(arb_hf)
for name in ("kernels.cpu", "kernels.ops", "kernels.rules", "kernels", "nn.linear"):
    importlib.reload(sys.modules[f"arb_hf.{name}"])
assert torch.equal(logits(old), expected)
for _ in range(2):
    for name in [each for each in sys.modules if each == "arb_hf" or each.startswith("arb_hf.")]:
        del sys.modules[name]
    gc.collect()
    import arb_hf as again
    assert again is not arb_hf
    new = again.from_pretrained(folder)
    assert type(new.hf_quantizer) is again.ArbHfQuantizer and again.bits_per_weight(new) > 1
    for model in (old, new):
        assert torch.equal(logits(model), expected)
        model(inputs_embeds=torch.zeros(1, 3, 64, requires_grad=True)).logits.sum().backward()
print("fine")
"""


@experts_only  # a process of its own
def test_imported_again(folder: Path) -> None:
    done = fresh_process(f"import sys; sys.argv = ['', {str(folder)!r}]\n{IMPORTED_AGAIN}")
    assert done.stdout.strip() == "fine", done.stderr
