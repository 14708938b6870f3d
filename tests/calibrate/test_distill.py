"""Distilling the predictions: scales and norms of all layers, codes as they were, kept only if held-out text says so."""

import dataclasses

import pytest
import torch
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from arb_hf.calibrate import distill as distill_module
from arb_hf.calibrate import model as model_module
from arb_hf.calibrate.resume import LayerStore
from arb_hf.nn import binary_modules
from helpers import tiny
from helpers.models import llama, token_samples

FULL = {"refinement": "full", "tune_steps": 0, "distill_steps": 8, "embedding_dtype": "model"}
SAMPLES = 64
SCALES = ("row_parameters", "row_absmax", "column_scales", "salient_column_scales")


@pytest.fixture(scope="module", autouse=True)
def strides():
    """A rate by which few steps get somewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill_module, "RATE", 3e-3)
        yield


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny model whose layers change the hidden states a lot, so that there is something to learn."""
    folder = tmp_path_factory.mktemp("distill") / "dense"
    model = llama(2)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.dim() == 2:
                parameter *= 10
        model.model.norm.weight *= 3  # and predictions that say something
    model.save_pretrained(folder)
    return folder


def distilled(dense, **options):
    return tiny.binarize(
        dense, {"dtype": torch.float32}, dataset=token_samples(SAMPLES), num_samples=SAMPLES, **FULL | options
    )


@pytest.fixture(scope="module")
def plain(dense):
    return distilled(dense, distill_steps=0)


@pytest.fixture(scope="module")
def model(dense):
    return distilled(dense)


@torch.no_grad()
def divergence(dense, model):
    """On the held-out samples, computed with transformers alone."""
    held = torch.stack(token_samples(SAMPLES)[SAMPLES * 7 // 8 :])
    original = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    wanted, found = (each(held).logits.log_softmax(-1) for each in (original, model))
    return functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1).mean().item()


def test_it_lowers_the_divergence_of_held_out_predictions(dense, plain, model):
    record = model.arb_report.distilled
    assert record.steps == 8
    assert record.after < 0.99 * record.before
    assert divergence(dense, plain) == pytest.approx(record.before, rel=0.02)  # the record's is computed in bfloat16
    assert divergence(dense, model) == pytest.approx(record.after, rel=0.02)
    assert f"{record.before:.4f} -> {record.after:.4f}" in model.arb_report.table()


def test_codes_stay_and_scales_move(plain, model):
    before, after = binary_modules(plain), binary_modules(model)
    for name, layer in after.items():
        for part, tensor in layer.packed.items():
            same = torch.equal(tensor, before[name].packed[part])
            assert not same if part == "row_parameters" else same or part in SCALES, f"{name}.{part}"


def test_matrices_of_the_published_algorithm_stay_as_they_are(dense):
    override = {"overrides": {"*.q_proj": {"refinement": "paper"}}}
    first, second = distilled(dense, distill_steps=0, **override), distilled(dense, **override)
    assert second.arb_report.distilled.after < second.arb_report.distilled.before
    for name, layer in binary_modules(second).items():
        unchanged = all(
            torch.equal(each, binary_modules(first)[name].packed[part]) for part, each in layer.packed.items()
        )
        assert unchanged == name.endswith("q_proj"), name


def test_what_does_not_help_is_discarded(dense, plain, monkeypatch):
    monkeypatch.setattr(distill_module, "RATE", 10.0)
    model = distilled(dense)
    assert model.arb_report.distilled.after == model.arb_report.distilled.before
    tiny.assert_equal(model.state_dict(), plain.state_dict())


def test_the_same_run_gives_the_same_bits_and_leaves_the_random_state(dense, model):
    state = torch.random.get_rng_state()
    tiny.assert_equal(distilled(dense).state_dict(), model.state_dict())
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_interrupted_run_goes_on_where_it_was(dense, model, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    save = LayerStore.save_distilled

    def then_stop(store, tensors, document):
        save(store, tensors, document)
        if document["done"] == 4:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(LayerStore, "save_distilled", then_stop)
        with pytest.raises(Stop):
            distilled(dense, checkpoint_dir=tmp_path)
    steps = []
    backward = distill_module._Student.backward
    monkeypatch.setattr(distill_module._Student, "backward", lambda self, b: (steps.append(1), backward(self, b)))
    resumed = distilled(dense, checkpoint_dir=tmp_path)
    assert len(steps) == 4
    tiny.assert_equal(resumed.state_dict(), model.state_dict())
    assert dataclasses.replace(resumed.arb_report.distilled, seconds=0) == dataclasses.replace(
        model.arb_report.distilled, seconds=0
    )


def test_padding_takes_no_part(dense):
    rows = [{"input_ids": ids.tolist(), "attention_mask": [1] * 40 + [0] * 8} for ids in token_samples(SAMPLES)]
    other = [{**row, "input_ids": row["input_ids"][:40] + [5] * 8} for row in rows]
    first, second = (
        tiny.binarize(dense, {"dtype": torch.float32}, dataset=data, num_samples=SAMPLES, **FULL)
        for data in (rows, other)
    )
    assert first.arb_report.distilled.after == pytest.approx(second.arb_report.distilled.after, rel=1e-6)


def test_models_with_experts_are_left_as_they_are_with_a_word(tmp_path, caplog):
    config = MixtralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    model = tiny.binarize(tmp_path, dataset=token_samples(4), num_samples=4, **FULL)
    assert model.arb_report.distilled is None
    assert "not distilled: routing tokens to experts has no gradient" in caplog.text


def test_one_batch_cannot_be_held_out(dense, caplog):
    model = tiny.binarize(dense, dataset=token_samples(1), num_samples=1, **FULL)
    assert model.arb_report.distilled is None
    assert "not distilled: a process has a single batch" in caplog.text


def test_predictions_are_made_in_pieces_of_any_length(dense, model, monkeypatch):
    monkeypatch.setattr(distill_module, "LENGTH", 13)
    again = distilled(dense)
    assert again.arb_report.distilled.after == pytest.approx(model.arb_report.distilled.after, rel=1e-3)


def test_the_stage_is_named_in_the_report(model):
    assert model.arb_report.stages["distill"] > 0
    assert model_module.distill is distill_module.distill


def test_a_model_without_predictions_is_left_as_it_is_with_a_word(dense, caplog):
    model = AutoModel.from_pretrained(dense, quantization_config=tiny.config(dataset=token_samples(4), **FULL))
    assert binary_modules(model)
    assert model.arb_report.distilled is None
    assert "not distilled: LlamaModel gives no logits" in caplog.text
