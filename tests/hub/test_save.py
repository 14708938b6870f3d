"""Saving never lies: what is reported as written loads again, and what would not is refused before anything is written."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, modeling_utils

import arb_hf
from arb_hf import folders
from arb_hf.format.headers import INDEX, SINGLE
from helpers.byte_model import byte_tokenizer, byte_tokens, logits, save_byte_model, save_packed

SHARDS, OTHER_SHARDS = {"max_shard_size": "40KB"}, {"max_shard_size": "60KB"}


@pytest.fixture
def changed(packed):
    """Another model of the same forms: a mixture of its files with the first model's would load."""
    model = arb_hf.from_pretrained(packed)
    for layer in model.model.layers:
        layer.input_layernorm.weight.data.mul_(1.5)
        rows = layer.mlp.up_proj.row_parameters.data
        rows.copy_(rows.flip(-1))
    model.model.embed_tokens.weight.data.mul_(0.5)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# One folder, two saves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"), [({}, SHARDS), (SHARDS, {}), (SHARDS, OTHER_SHARDS), (OTHER_SHARDS, SHARDS)]
)
@pytest.mark.parametrize("own", [True, False], ids=["model.save_pretrained", "arb_hf.save_pretrained"])
def test_the_second_save_into_a_folder_is_what_loads(model, changed, tmp_path, own, first, second):
    for each, options in ((model, first), (changed, second)):
        if own:
            each.save_pretrained(tmp_path, **options)
        else:
            arb_hf.save_pretrained(each, None, tmp_path, **options)
    assert torch.equal(logits(arb_hf.from_pretrained(tmp_path)), logits(changed))
    if own and not first:  # transformers leaves model.safetensors there and would load it
        with pytest.raises(arb_hf.ArbFormatError, match=r"holds two models: .* delete model\.safetensors"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        (tmp_path / SINGLE).unlink()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(changed))


@pytest.mark.parametrize("options", [{}, SHARDS])
def test_a_packed_model_takes_the_place_of_a_dense_one(model, tmp_path, options):
    dense = AutoModelForCausalLM.from_pretrained(save_byte_model(tmp_path / "model"))
    dense.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    arb_hf.save_pretrained(model, None, tmp_path / "model", **options)
    for load in (arb_hf.from_pretrained, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(logits(load(tmp_path / "model")), logits(model))


def test_a_model_is_saved_over_itself_in_other_shards(model, tmp_path):
    before = logits(model)
    arb_hf.save_pretrained(model, None, tmp_path)
    loaded = arb_hf.from_pretrained(tmp_path)  # its weights are mapped from the file that is replaced
    for options in (SHARDS, OTHER_SHARDS, {}):
        arb_hf.save_pretrained(loaded, None, tmp_path, **options)
        assert torch.equal(logits(loaded), before)
        assert torch.equal(logits(arb_hf.from_pretrained(tmp_path)), before)


def test_other_files_and_other_variants_stay(model, changed, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    arb_hf.save_pretrained(model, None, tmp_path, **SHARDS)
    arb_hf.save_pretrained(changed, None, tmp_path, variant="half")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert torch.equal(logits(arb_hf.from_pretrained(tmp_path)), logits(model))
    assert torch.equal(logits(arb_hf.from_pretrained(tmp_path, variant="half")), logits(changed))


def test_the_record_of_another_model_does_not_stay(model, packed, tmp_path):
    shutil.copytree(packed, tmp_path / "out")
    assert (tmp_path / "out" / "arb_report.json").is_file()
    del model.arb_report
    model.name_or_path = ""
    arb_hf.save_pretrained(model, None, tmp_path / "out")
    assert not list((tmp_path / "out").glob("arb_report*"))
    assert arb_hf.load_report(tmp_path / "out") is None


# A save that breaks off ----------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def failing(call, number, error):
    """``call``, but for the call of that number, counted from 0."""
    count = iter(range(1000))

    def instead(*args, **kwargs):
        if next(count) == number:
            raise error
        return call(*args, **kwargs)

    return instead


@pytest.mark.parametrize("number", range(3))
def test_a_full_disk_leaves_the_old_model(model, changed, tmp_path, monkeypatch, number):
    arb_hf.save_pretrained(model, None, tmp_path, **SHARDS)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        save_file = failing(modeling_utils.safe_save_file, number, OSError(28, "No space left on device"))
        patch.setattr(modeling_utils, "safe_save_file", save_file)
        with pytest.raises(OSError, match="No space left"):
            arb_hf.save_pretrained(changed, None, tmp_path, **OTHER_SHARDS)
    assert contents(tmp_path) == before
    arb_hf.save_pretrained(changed, None, tmp_path, **OTHER_SHARDS)
    assert torch.equal(logits(arb_hf.from_pretrained(tmp_path)), logits(changed))


@pytest.mark.parametrize(("call", "options"), [("replace", SHARDS), ("unlink", {})])
def test_no_kill_between_two_files_leaves_a_mixture(model, changed, tmp_path, monkeypatch, call, options):
    """At whatever file a save is killed: the old model, the new one, or none; and the next save puts it right."""
    old, new = logits(model), logits(changed)
    arb_hf.save_pretrained(model, None, tmp_path, **OTHER_SHARDS)
    found = []
    for number in range(50):
        arb_hf.save_pretrained(model, None, tmp_path, **OTHER_SHARDS)
        with monkeypatch.context() as patch:
            owner = os if call == "replace" else Path
            patch.setattr(owner, call, failing(getattr(owner, call), number, Killed()))
            try:
                arb_hf.save_pretrained(changed, None, tmp_path, **options)
                break  # fewer files than that
            except Killed:
                pass
        try:
            loaded = logits(arb_hf.from_pretrained(tmp_path))
        except (ValueError, OSError):
            found.append("none")
        else:
            assert torch.equal(loaded, old) or torch.equal(loaded, new)
            found.append("old" if torch.equal(loaded, old) else "new")
        for left in tmp_path.glob(f"{folders.UNFINISHED}*"):
            shutil.rmtree(left)
    assert "none" in found and set(found) <= {"old", "none", "new"}
    assert torch.equal(logits(arb_hf.from_pretrained(tmp_path)), new)


def test_what_a_killed_save_left_is_named_and_not_loaded(model, changed, tmp_path, caplog):
    arb_hf.save_pretrained(model, None, tmp_path)
    left = tmp_path / f"{folders.UNFINISHED}x"
    left.mkdir()
    arb_hf.save_pretrained(changed, None, tmp_path)
    assert f"{left} was left by a save that did not finish" in caplog.text
    assert torch.equal(logits(arb_hf.from_pretrained(tmp_path)), logits(changed))


def test_files_that_could_not_be_moved_are_not_thrown_away(model, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", failing(os.replace, 1, PermissionError(13, "Permission denied")))
    with pytest.raises(OSError, match="holds no whole model; the rest is in") as caught:
        arb_hf.save_pretrained(model, None, tmp_path)
    (left,) = tmp_path.glob(f"{folders.UNFINISHED}*")
    assert str(left) in str(caught.value)
    assert (left / "config.json").is_file() and not (tmp_path / "config.json").exists()


def test_a_disk_that_is_full_for_the_tokenizer_is_an_error_of_the_system(model, tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()

    def full(path):
        raise Exception("No space left on device (os error 28)")  # as tokenizers says it

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(OSError, match=r"cannot be written: No space left on device"):
        arb_hf.save_pretrained(model, tokenizer, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


# What is more, or less, than a packed model --------------------------------------------------------------------------


def adapted(model, how):
    lora = pytest.importorskip("arb_hf.lora", exc_type=ImportError)
    if how == "add_adapter":
        try:
            model.add_adapter(lora.lora_config(model, r=2))
        except ValueError as error:  # transformers 5.24 asks for a PEFT that is not out yet
            if "version of PEFT" not in str(error):
                raise
            pytest.skip(str(error))
        return model
    peft_model = lora.add_lora(model, r=2)
    return peft_model.get_base_model() if how == "base model" else peft_model


@pytest.mark.parametrize("how", ["PeftModel", "base model", "add_adapter"])
def test_adapters_are_refused_with_the_cure_before_anything_is_written(model, tmp_path, how):
    wrapped = adapted(model, how)
    for save in (
        lambda: arb_hf.save_pretrained(wrapped, None, tmp_path / "out"),
        lambda: arb_hf.push_to_hub(wrapped, None, "me/model"),
        lambda: arb_hf.export.export_dense(wrapped, None, tmp_path / "out"),
        lambda: arb_hf.dequantize(wrapped),
    ):
        with pytest.raises(ValueError, match=r"has adapters.*peft_model\.unload\(\)"):
            save()
    assert not list(tmp_path.iterdir())


def test_the_packed_model_comes_back_from_under_its_adapters(model, tmp_path):
    before = logits(model)
    wrapped = adapted(model, "PeftModel")
    with pytest.raises(ValueError, match="has adapters"):
        wrapped.get_base_model().save_pretrained(tmp_path / "base")
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds an adapter"):
        arb_hf.save_pretrained(wrapped.unload(), None, tmp_path / "adapter")
    arb_hf.save_pretrained(wrapped.unload(), None, tmp_path / "packed")
    assert torch.equal(logits(arb_hf.from_pretrained(tmp_path / "packed")), before)


def test_an_adapter_of_transformers_is_saved_alone_and_loads(model, packed, tmp_path):
    wrapped = adapted(model, "add_adapter")
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.01)
    wrapped.save_pretrained(tmp_path)
    loaded = arb_hf.lora.load_lora(arb_hf.from_pretrained(packed), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(wrapped))


def lacking_its_config(model):
    del model.config.quantization_config


def with_another_head(model):
    model.lm_head = torch.nn.Linear(64, 99)


def with_a_layer_less(model):
    model.model.layers = model.model.layers[:1]


def with_a_module_more(model):
    model.model.extra = torch.nn.Linear(3, 3)


def with_damaged_scales(model):
    model.model.layers[1].mlp.up_proj.row_parameters.data.fill_(float("nan"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lacking_its_config, r"config\.quantization_config does not name model\.layers"),
        (with_another_head, r"tensor lm_head\.weight is F32 \[99, 64\], expected a floating type \[257, 64\]"),
        (with_a_layer_less, r"names model\.layers\.1\.mlp\.down_proj as binary, and the model does not"),
        (with_a_module_more, r"surplus tensor model\.extra\.weight"),
        (with_damaged_scales, r"model\.layers\.1\.mlp\.up_proj\.row_parameters holds NaN"),
    ],
)
def test_what_would_not_load_again_is_not_written(tmp_path, change, message):
    model = arb_hf.from_pretrained(save_packed(tmp_path / "made", scale_dtype="float16"))
    change(model)
    for save in (
        lambda: model.save_pretrained(tmp_path / "own"),
        lambda: arb_hf.save_pretrained(model, None, tmp_path / "ours"),
    ):
        with pytest.raises(ValueError, match=f"cannot be saved, for it would not load again: .*{message}"):
            save()
    assert not [path for name in ("own", "ours") for path in (tmp_path / name).glob("*")]


def test_a_part_of_a_model_is_not_saved_as_one(model, tmp_path):
    with pytest.raises(ValueError, match="this LlamaModel cannot be saved"):
        model.model.save_pretrained(tmp_path / "part")
    assert not list((tmp_path / "part").iterdir())
    arb_hf.dequantize(model)
    model.model.save_pretrained(tmp_path / "part")  # dense, it is a model


def test_what_users_do_to_models_is_saved(model, tmp_path):
    before = logits(model)
    for name, each in {"copy": copy.deepcopy(model), "compiled": torch.compile(model)}.items():
        arb_hf.save_pretrained(each, None, tmp_path / name)
        assert torch.equal(logits(arb_hf.from_pretrained(tmp_path / name)), before)
    model.resize_token_embeddings(300)
    arb_hf.save_pretrained(model, None, tmp_path / "resized")
    assert torch.equal(logits(arb_hf.from_pretrained(tmp_path / "resized")), logits(model))


# Arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_shard_size": "5GiBB"}, "max_shard_size='5GiBB' is no size"),
        ({"max_shard_size": "0GB"}, "max_shard_size='0GB' is no size"),
        ({"max_shard_size": -1}, "max_shard_size=-1 is no size"),
        ({"max_shard_size": None}, "max_shard_size=None is no size"),
        ({"variant": "../x"}, r"variant='\.\./x' cannot be a part of a file's name"),
        ({"state_dict": {}}, "state_dict={} is not possible"),
        ({"safe_serialization": False}, "packed models are safetensors files"),
        ({"push_to_hub": True}, r"call arb_hf\.push_to_hub"),
        ({"base_model": "/home/me/the model"}, "base_model='/home/me/the model' is no name on the Hub"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(model, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(type(model), "state_dict", None)  # no work
    with pytest.raises(ValueError, match=message):
        arb_hf.save_pretrained(model, None, tmp_path / "out", **options)
    with pytest.raises(ValueError, match=message):
        arb_hf.push_to_hub(model, None, "me/model", **options)
    assert not list(tmp_path.iterdir())


def test_other_wrong_arguments(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file: name a folder"):
        arb_hf.save_pretrained(model, None, tmp_path / "file")
    with pytest.raises(TypeError, match="no argument 'max_shard'"):
        arb_hf.save_pretrained(model, None, tmp_path / "out", max_shard="1GB")
    with pytest.raises(ValueError, match="tokenizer is a str"):
        arb_hf.save_pretrained(model, "me/tokenizer", tmp_path / "out")
    with pytest.raises(ValueError, match="repo_id='a/b/c' is no name on the Hub"):
        arb_hf.push_to_hub(model, None, "a/b/c")
    arb_hf.save_pretrained(model, None, tmp_path / "out", is_main_process=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    arb_hf.save_pretrained(model, None, tmp_path / "out", safe_serialization=True, push_to_hub=False, state_dict=None)
    assert (tmp_path / "out" / SINGLE).is_file() and not (tmp_path / "out" / INDEX).exists()


# While scales are trained --------------------------------------------------------------------------------------------


def scale_trainer(packed, folder):
    from transformers import Trainer, TrainingArguments  # imports much else

    model = arb_hf.from_pretrained(packed).requires_grad_(False)
    arb_hf.scales.unfreeze(model)
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "seed": 1}
    arguments = TrainingArguments(str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **options)
    rows = [{"input_ids": row, "labels": row} for row in byte_tokens(8, 16)]
    return model, Trainer(model, arguments, train_dataset=rows)


@pytest.mark.filterwarnings("ignore")  # of torch's data loader and of transformers' trainer
def test_trainer_trains_scales_and_its_checkpoints_are_packed_models(packed, tmp_path):
    model, trainer = scale_trainer(packed, tmp_path)
    before = logits(model)
    trainer.train()
    checkpoint = arb_hf.from_pretrained(tmp_path / "checkpoint-4")
    arb_hf.scales.freeze(model.eval())
    assert torch.equal(logits(checkpoint), logits(model))
    moved = (logits(model) - before).norm()
    assert moved > 0.01 * before.norm()
    resumed, trainer = scale_trainer(packed, tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    arb_hf.scales.freeze(resumed.eval())
    assert (logits(resumed) - logits(model)).norm() < 0.1 * moved  # the checkpoint's scales are rounded
