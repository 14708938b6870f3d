"""`ArbConfig`: refusals that name option, value and what is allowed; round trips; copies."""

import copy
import json
import re

import pytest
from datasets import Dataset

from arb_hf import ArbConfig
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
    "tune_steps": [-1, 0.5, "8", 3],  # the last because refinement is "paper"
    "num_samples": [0],
    "sequence_length": [0, 2.0],
    "batch_size": [0],
    "seed": [-1, 0.5, 2**63],
    "scale_dtype": ["float8", None],
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
    assert (config.dataset, config.scale_dtype, config.refinement) == ("c4", "float16", "paper")
    assert config.quant_method == "arb_hf"


def test_the_type_of_embeddings_goes_by_the_refinement_unless_it_is_read_back():
    assert ArbConfig(refinement="paper").embedding_dtype == "model"
    assert ArbConfig(refinement="full").embedding_dtype == "int8"
    assert ArbConfig(refinement="full", embedding_dtype="model").embedding_dtype == "model"
    assert ArbConfig(refinement="full", modules={}, format_version=1).embedding_dtype == "model"
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
        ({"refinement": "full", "iterations": 3}, 'iterations has no effect with refinement="full"'),
        ({"method": "billm", "iterations": 3}, 'iterations has no effect with method="billm"'),
        ({"overrides": {"a": {"method": "billm", "iterations": 3}}}, r"iterations in overrides\['a'\] has no effect"),
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
