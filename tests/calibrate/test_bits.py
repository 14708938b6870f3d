"""`ArbConfig(bits=...)`: the average is met, impossible ones are refused, every way to run makes the same choice."""

import json
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import arb_hf
from arb_hf import ArbCalibrationError, ArbConfig
from arb_hf.calibrate import model as model_module
from arb_hf.calibrate import sensitivity
from arb_hf.format.headers import inspect_folder, table
from helpers import tiny
from helpers.models import VOCABULARY, token_samples

FULL = {"refinement": "full", "scale_dtype": "int8", "tune_steps": 0, "max_salient_columns": 50}


def binarized(path, **options):
    return tiny.binarize(path, **(FULL | options))


def forms(model):
    return {
        each.name: (each.groups, each.salient_groups, each.solve.salient_columns) for each in model.arb_report.matrices
    }


@pytest.fixture(scope="module")
def chosen(dense):
    return binarized(dense, bits=2.6)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = Qwen3MoeConfig(vocab_size=VOCABULARY, num_experts=6, num_experts_per_tok=2, **sizes, **heads)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", [2.0, 2.6, 3.4])
def test_the_average_is_met(dense, bits):
    assert arb_hf.bits_per_weight(binarized(dense, bits=bits)) == pytest.approx(bits, rel=0.005)


def test_matrices_differ_and_the_important_ones_get_more(chosen):
    matrices = chosen.arb_report.matrices
    assert len(set(forms(chosen).values())) > 2
    ordered = sorted(matrices, key=lambda each: each.importance / each.weights)
    few, many = ordered[: len(ordered) // 3], ordered[-len(ordered) // 3 :]
    assert sum(each.bits / each.weights for each in many) > sum(each.bits / each.weights for each in few)


def test_importance_is_what_the_model_loses_by_noise_in_that_matrix(dense):
    """Against a model of which one linear at a time gives noisy outputs."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    found = {each.name: each.importance for each in binarized(dense, bits=2.6).arb_report.matrices}
    tokens = torch.stack(token_samples(6, 24))
    with torch.no_grad():
        wanted = model(tokens).logits.log_softmax(-1)
    losses = {}
    for name in found:
        total = 0.0
        for draw in range(4):
            generator = torch.Generator().manual_seed(draw)

            def noisy(module, args, out, generator=generator):
                size = out.square().mean().sqrt() * 0.05**0.5
                return out + size * torch.randn(out.shape, generator=generator)

            handle = model.get_submodule(name).register_forward_hook(noisy)
            with torch.no_grad():
                given = model(tokens).logits.log_softmax(-1)
            handle.remove()
            total += (wanted.exp() * (wanted - given)).sum(-1).mean().item() / 0.05 / 4
        losses[name] = total
    pairs = torch.tensor([[found[name], losses[name]] for name in found]).log()
    assert torch.corrcoef(pairs.T)[0, 1] > 0.8


def test_report_inspect_card_and_table_show_what_each_got(chosen, tmp_path):
    arb_hf.hub.save.save_pretrained(chosen, None, tmp_path)
    record = json.loads((tmp_path / "arb_report.json").read_text())["matrices"][0]
    assert {"groups", "salient_groups", "importance", "salient_columns", "bits"} <= record.keys()
    for text in (chosen.arb_report.table(), table(inspect_folder(tmp_path)), arb_hf.summary(chosen)):
        assert any(" to " in line for line in text.splitlines() if "_proj" in line)
    assert "Bits are spread over the layers" in (tmp_path / "README.md").read_text()
    again = arb_hf.from_pretrained(tmp_path)
    assert arb_hf.bits_per_weight(again) == arb_hf.bits_per_weight(chosen)
    tokens = torch.stack(token_samples(2, 16))
    assert torch.equal(again(tokens).logits, chosen(tokens).logits)


def test_the_same_bits_of_every_run(dense, chosen, tmp_path):
    tiny.assert_equal(tiny.saved(chosen, tmp_path / "a"), tiny.saved(binarized(dense, bits=2.6), tmp_path / "b"))


def test_a_resumed_run_remembers_its_choice(dense, chosen, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"

    def stop(this, index, original=model_module.binarize_layer):
        if index == 1:
            raise KeyboardInterrupt
        return original(this, index)

    with monkeypatch.context() as patch:
        patch.setattr(model_module, "binarize_layer", stop)
        with pytest.raises(KeyboardInterrupt):
            binarized(dense, bits=2.6, checkpoint_dir=folder)
    with monkeypatch.context() as patch:
        patch.setattr(model_module, "choose_forms", None)  # would not be called
        resumed = binarized(dense, bits=2.6, checkpoint_dir=folder)
    tiny.assert_equal(tiny.saved(resumed, tmp_path / "a"), tiny.saved(chosen, tmp_path / "b"))
    (folder / "forms.json").write_text("{")
    again = binarized(dense, bits=2.6, checkpoint_dir=folder)  # measured again
    assert forms(again) == forms(chosen)


def test_experts_get_forms_and_the_average_is_met(experts):
    model = binarized(experts, bits=2.8)
    assert arb_hf.bits_per_weight(model) == pytest.approx(2.8, rel=0.005)
    assert all(each.importance > 0 for each in model.arb_report.matrices)


def test_overrides_stay_and_count(dense):
    overrides = {"*.q_proj": {"group_bitmap": False, "max_salient_columns": 4}, "*.layers.1.*.up_proj": None}
    model = binarized(dense, bits=2.6, overrides=overrides)
    assert arb_hf.bits_per_weight(model) == pytest.approx(2.6, rel=0.005)
    of_q = {form for name, form in forms(model).items() if name.endswith("q_proj")}
    assert len(of_q) == 1
    assert of_q.pop()[:2] == (1, 1)
    assert "model.layers.1.mlp.up_proj" not in forms(model)


@pytest.mark.parametrize("bits", [0.9, 9])
def test_what_is_not_possible_is_refused_before_calibration_with_the_range_that_is(dense, bits, monkeypatch):
    monkeypatch.setattr(model_module, "_load_data", None)  # would not be called
    with pytest.raises(ArbCalibrationError, match=rf"bits={bits} is not possible .* take 1\.\d+ to \d\.\d+ bits"):
        binarized(dense, bits=bits)


def test_padding_has_no_say(dense):
    tokens = token_samples(6, 24)
    padded = [
        {"input_ids": torch.cat([each, torch.zeros(8, dtype=torch.int64)]), "attention_mask": [1] * 24 + [0] * 8}
        for each in tokens
    ]
    one, other = (binarized(dense, bits=2.6, dataset=each) for each in (tokens, padded))
    importances = [[each.importance for each in model.arb_report.matrices] for model in (one, other)]
    assert torch.corrcoef(torch.tensor(importances).log())[0, 1] > 0.95


def test_a_model_without_gradients_falls_back_with_a_word(dense, monkeypatch, caplog):
    def backward(*_):
        raise NotImplementedError("no derivative")

    monkeypatch.setattr(sensitivity, "_backward", backward)
    model = binarized(dense, bits=2.6)
    assert "no gradients (no derivative): for the choice of forms every weight counts alike" in caplog.text
    assert arb_hf.bits_per_weight(model) == pytest.approx(2.6, rel=0.005)


def weight_bytes(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("size", [70_000, "0.075MB"])
def test_the_weight_files_keep_within_the_size_and_fill_it(dense, tmp_path, size):
    model = binarized(dense, max_size=size)
    model.save_pretrained(tmp_path)
    limit = size if isinstance(size, int) else 75_000
    assert 0.96 * limit < weight_bytes(tmp_path) <= limit
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["max_size"] == size
    assert stored["bits"] == pytest.approx(arb_hf.bits_per_weight(model), rel=0.005)
    assert arb_hf.bits_per_weight(arb_hf.from_pretrained(tmp_path)) == arb_hf.bits_per_weight(model)
    planned = arb_hf.plan(dense, tiny.config(**FULL, max_size=size, sequence_length=24))
    assert planned.bytes == pytest.approx(weight_bytes(tmp_path), rel=0.01)
    assert planned.bits_per_weight == pytest.approx(arb_hf.bits_per_weight(model), rel=0.005)


def test_a_size_that_is_not_possible_is_refused_with_the_range_that_is(dense):
    with pytest.raises(ArbCalibrationError, match=r"max_size='10KB' is not possible: .* take 0\.\d\d to 0\.\d\d MB"):
        binarized(dense, max_size="10KB")


def test_a_size_beyond_the_largest_form_takes_the_largest(dense):
    largest = binarized(dense, max_size="1GB")
    assert all(
        each.groups == 2 and each.solve.salient_columns == each.in_features for each in largest.arb_report.matrices
    )


@pytest.mark.parametrize("size", ["large", "600", 0, -1, 1.5, True])
def test_a_size_is_a_number_of_bytes_or_has_a_unit(size):
    with pytest.raises(ValueError, match=r"max_size=.* is not allowed; allowed: a number of bytes"):
        ArbConfig(max_size=size)


def test_bits_and_a_size_exclude_each_other():
    with pytest.raises(ValueError, match=r"max_size='1GB' is not allowed; allowed: None beside bits"):
        ArbConfig(bits=2.5, max_size="1GB")


def test_the_published_algorithm_refuses_bits():
    with pytest.raises(ValueError, match=r'bits=2\.5 is not allowed; allowed: None: refinement="paper"'):
        ArbConfig(refinement="paper", bits=2.5)


def test_options_that_bits_decides_are_told_of():
    with pytest.warns(UserWarning, match="group_bitmap has no effect with bits"):
        ArbConfig(refinement="full", bits=2.5, group_bitmap=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ArbConfig(refinement="full", bits=2.5, overrides={"*.q_proj": {"group_bitmap": False}})
