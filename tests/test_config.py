"""`ArbConfig`: refusals that name option, value and what is allowed; round trips; copies."""

import copy
import json
import re

import pytest
from datasets import Dataset

from arb_hf import ArbConfig, ArbFormatError
from arb_hf.binarize import BinarizeOptions
from helpers.models import word_tokenizer

WRONG = {
    "method": ["arb-rcc", None, 3],
    "block_size": [0, -128, 100, 2**40, "128", True, 128.0],
    "column_group_bitmap": ["yes", 1],
    "group_bitmap": [None, 0],
    "iterations": [0, 1.5],
    "salient_metric": ["hessians"],
    "max_salient_columns": [0, -1],
    "damping": [-0.1, float("nan"), float("inf"), "0.01", True],
    "refinement": ["fuller", ["full"]],
    "tune_steps": [-1, 0.5, "8"],
    "num_samples": [0],
    "sequence_length": [0, 2.0],
    "batch_size": [0],
    "seed": [-1, 0.5, 2**63],
    "scale_dtype": ["float8", 8],
    "embedding_dtype": ["int4", 8],
    "embeddings": ["lm_head", [3], ["a", "a"], [""]],
    "tokenizer": [3, [], {}],
    "modules_to_not_convert": ["lm_head", [1]],
    "format_version": [0, "1"],
    "modules": [[], {"a": None}, {"a": {}}, {"a": {"salient_columns": -1}}],
    "quant_method": ["gptq"],
}


@pytest.mark.parametrize(("option", "value"), [(option, value) for option, values in WRONG.items() for value in values])
def test_wrong_values_are_refused_with_a_full_message(option, value):
    with pytest.raises(ValueError, match="ArbConfig") as caught:
        ArbConfig(**{option: value})
    message = str(caught.value)
    assert option in message
    assert "allowed" in message
    assert repr(value) in message or option == "modules"


def test_defaults_are_the_contract():
    config = ArbConfig()
    assert (config.method, config.block_size, config.iterations, config.damping) == ("arb-rc", 128, 15, 0.01)
    assert (config.num_samples, config.sequence_length, config.batch_size, config.seed) == (128, 2048, 1, 0)
    assert (config.dataset, config.refinement, config.scale_dtype, config.tune_steps) == ("c4", "full", "int8", 32)
    assert config.quant_method == "arb_hf"


def test_what_belongs_to_a_refinement_comes_with_it():
    paper = ArbConfig(refinement="paper")
    assert (paper.scale_dtype, paper.tune_steps, paper.options().scale_dtype) == ("float16", 0, "float16")
    assert ArbConfig().options() == BinarizeOptions() == BinarizeOptions(refinement="full", scale_dtype="int8")
    assert (
        ArbConfig(scale_dtype="float32", tune_steps=3).to_dict().items()
        >= {"scale_dtype": "float32", "tune_steps": 3}.items()
    )


# Defaults of version 0.1, which a stored config without these options was written under.
STORED = {"modules": {"a": {"salient_columns": 3}}, "format_version": 1}


@pytest.mark.parametrize("stored", [STORED, {"modules": STORED["modules"]}, {"format_version": 1}])
def test_a_stored_config_without_the_options_means_the_former_defaults(stored):
    config = ArbConfig.from_dict(stored)
    assert (config.refinement, config.scale_dtype, config.tune_steps) == ("paper", "float16", 0)
    full = ArbConfig.from_dict(stored | {"refinement": "full"})
    assert (full.scale_dtype, full.tune_steps) == ("float16", 32)
    assert ArbConfig.from_dict(stored | {"scale_dtype": "int8"}).refinement == "paper"
    with pytest.raises(ArbFormatError, match="scale_dtype"):
        ArbConfig.from_dict(stored | {"scale_dtype": None})


def test_options_that_were_never_stored_have_todays_defaults():
    assert (
        ArbConfig.from_dict({"quant_method": "arb_hf", "block_size": 64}).to_dict()
        == ArbConfig(block_size=64).to_dict()
    )


def test_the_type_of_embeddings_goes_by_the_refinement_unless_it_is_read_back():
    assert ArbConfig(refinement="paper").embedding_dtype == "model"
    assert ArbConfig(refinement="full").embedding_dtype == "int8"
    assert ArbConfig(refinement="full", embedding_dtype="model").embedding_dtype == "model"
    assert ArbConfig.from_dict(STORED | {"refinement": "full"}).embedding_dtype == "model"
    with pytest.raises(ValueError, match="format_version 1 has no int8 embeddings"):
        ArbConfig(embeddings=["lm_head"], format_version=1)
    with pytest.raises(ValueError, match="none that is in modules"):
        ArbConfig(embeddings=["lm_head"], modules={"lm_head": {"salient_columns": 0}})


def test_one_group_means_no_column_groups_either():
    assert ArbConfig(group_bitmap=False).column_group_bitmap is False


@pytest.mark.parametrize("method", ["arb-rc", "arb-x", "arb", "billm"])
def test_round_trips(method):
    config = ArbConfig(
        method=method,
        dataset=Dataset.from_dict({"text": ["w1 w2"]}),
        tokenizer=word_tokenizer(),
        modules_to_not_convert=["mlp"],
        modules={"a.b": {"salient_columns": 3}},
    )
    stored = config.to_dict()
    assert ArbConfig.from_dict(stored).to_dict() == stored
    assert ArbConfig.from_dict(json.loads(json.dumps(stored))).to_dict() == stored
    assert json.loads(config.to_json_string()) == stored
    assert dict(config) == stored


def test_names_survive_to_dict():
    config = ArbConfig(dataset="wikitext2", tokenizer="some/tokenizer", checkpoint_dir="/somewhere")
    assert ArbConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert config.to_dict()["dataset"] == "wikitext2"
    assert config.to_dict()["tokenizer"] == "some/tokenizer"


def test_deepcopy_shares_data_and_copies_the_rest():
    config = ArbConfig(dataset=Dataset.from_dict({"text": ["w1"]}), tokenizer=word_tokenizer(), modules={})
    twin = copy.deepcopy(config)
    assert twin.dataset is config.dataset
    assert twin.tokenizer is config.tokenizer
    assert twin.modules is not config.modules
    assert twin.to_dict() == config.to_dict()


@pytest.mark.parametrize(("option", "meant"), [("refinment", " (did you mean refinement?)"), ("zzz", "")])
def test_an_option_that_is_none_is_refused(option, meant):
    with pytest.raises(TypeError, match=re.escape(f"ArbConfig does not know {option}{meant}") + "$"):
        ArbConfig(**{option: "full"})


def test_options_of_a_newer_version_warn():
    with pytest.warns(UserWarning, match="ArbConfig does not know future_option"):
        config = ArbConfig.from_dict({"method": "arb", "future_option": 1})
    assert config.method == "arb"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 3}, 'iterations has no effect with refinement="full"'),
        ({"refinement": "paper", "method": "billm", "iterations": 3}, 'iterations has no effect with method="billm"'),
        (
            {"refinement": "paper", "overrides": {"a": {"method": "billm", "iterations": 3}}},
            r"iterations in overrides\['a'\] has no effect",
        ),
        (
            {"group_bitmap": False, "overrides": {"a": {"column_group_bitmap": True}}},
            r"column_group_bitmap in overrides\['a'\] has no effect with group_bitmap=False",
        ),
    ],
)
def test_options_without_effect_are_told_of_once(options, message):
    with pytest.warns(UserWarning, match=message) as told:
        ArbConfig(**options)
    assert len(told) == 1
    assert told[0].filename == __file__


def test_an_option_that_some_module_needs_is_not_idle():
    ArbConfig(iterations=3, overrides={"*.q_proj": {"refinement": "paper"}})
