"""Options of single modules: what a pattern covers, what is refused, and that a packed model remembers."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import arb_hf
from arb_hf import ArbCalibrationError, ArbConfig
from arb_hf.overrides import covers, select
from helpers.models import token_samples
from helpers.process import fresh_process

FAST = {"dataset": token_samples(4, 32), "refinement": "paper", "iterations": 2, "block_size": 64}


def binarize(folder, **options):
    config = ArbConfig(**(FAST | options))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj", True),
        ("model.layers.0", "model.layers.0.mlp.up_proj", True),
        ("model.layers.1", "model.layers.10.mlp.up_proj", False),
        ("layers.0", "model.layers.0.mlp.up_proj", False),
        ("*.layers.0", "model.layers.0.mlp.up_proj", True),
        ("*.up_proj", "model.layers.0.mlp.up_proj", True),
        ("*.up_proj", "model.layers.0.mlp.experts.3.gate_up_proj", False),
        ("*.layers.[01].*", "model.layers.1.mlp.up_proj", True),
        ("*.layers.[01].*", "model.layers.2.mlp.up_proj", False),
        ("*.experts.*.down_proj", "model.layers.2.mlp.experts.11.down_proj", True),
        ("*.EXPERTS", "model.layers.2.mlp.experts.11.down_proj", False),
    ],
)
def test_a_pattern_covers_what_it_matches_and_what_lies_inside(pattern, name, expected):
    assert covers(pattern, name) is expected


def test_the_most_literal_pattern_counts_whatever_the_order():
    patterns = {"*": {"iterations": 1}, "*.down_proj": {"iterations": 2}, "model.layers.0": {"iterations": 3}}
    for given in (patterns, dict(reversed(patterns.items()))):
        assert select(given, "model.layers.0.mlp.down_proj") == "model.layers.0"
        assert select(given, "model.layers.1.mlp.down_proj") == "*.down_proj"
        assert select(given, "model.layers.1.mlp.up_proj") == "*"
    assert select({"a": None}, "b") is None


def test_a_tie_between_different_options_is_refused():
    tie = {"*.layers.1": None, "*.mlp.up_p*": None}
    assert select(tie, "model.layers.1.mlp.up_proj") in tie
    with pytest.raises(ArbCalibrationError, match=r"equally specific"):
        select({"*.layers.1": None, "*.mlp.up_p*": {}}, "model.layers.1.mlp.up_proj")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["*"], "mapping from pattern"),
        ({"": None}, "no pattern"),
        ({3: None}, "no pattern"),
        ({"*": "arb"}, "mapping of options"),
        ({"*": {"metod": "arb"}}, r"overrides\['\*'\] has metod; allowed: method"),
        ({"*": {"dataset": "c4"}}, "has dataset"),
        ({"*": {"block_size": 100}}, r"block_size=100 is not allowed.*\(in overrides\['\*'\]\)"),
        ({"*": {"method": None}}, "method=None"),
        ({"*": {"scale_dtype": None}}, "scale_dtype=None"),
    ],
)
def test_wrong_overrides_are_refused_when_the_config_is_made(overrides, message):
    with pytest.raises(ValueError, match=message):
        ArbConfig(overrides=overrides)


@pytest.mark.parametrize(
    "entry",
    [
        {"salient_columns": 1, "iterations": 3},
        {"salient_columns": 1, "block_size": -1},
        {"salient_columns": 1, "scale_dtype": None},
        {"block_size": 64},
    ],
)
def test_hostile_module_entries_are_refused(entry):
    with pytest.raises(ValueError, match="modules"):
        ArbConfig(modules={"a": entry})


def test_options_of_a_module():
    config = ArbConfig(overrides={"*.up_proj": {"group_bitmap": False, "damping": 0.5}, "a": None})
    assert config.options("x.up_proj").damping == 0.5
    assert config.options("x.up_proj").column_group_bitmap is False
    assert config.options("x.down_proj") == config.options()
    assert (config.keeps("a.b"), config.keeps("x.up_proj"), config.keeps("b")) == ("a", None, None)
    one_group = {"group_bitmap": False, "column_group_bitmap": False}
    assert config.module_entry(config.options("x.up_proj"), 5) == {"salient_columns": 5} | one_group
    assert config.module_entry(config.options("x.down_proj"), 5) == {"salient_columns": 5}


def test_a_refinement_of_a_modules_own_brings_its_scale_type_along():
    own = {
        "a": {"refinement": "paper"},
        "b": {"refinement": "paper", "scale_dtype": "float32"},
        "c": {"block_size": 64},
    }
    config = ArbConfig(scale_dtype="bfloat16", overrides=own)
    assert [config.options(name).scale_dtype for name in "abcd"] == ["float16", "float32", "bfloat16", "bfloat16"]
    assert config.module_entry(config.options("a"), 5) == {"salient_columns": 5, "scale_dtype": "float16"}


OVERRIDES = {
    "model.layers.0.self_attn": None,
    "*.down_proj": {"method": "arb-x", "block_size": 32, "scale_dtype": "bfloat16"},
    "*.up_proj": {"group_bitmap": False, "damping": 0.1},
}


@pytest.fixture(scope="module")
def mixed(tiny_model, tmp_path_factory):
    model = binarize(tiny_model, overrides=OVERRIDES)
    folder = tmp_path_factory.mktemp("mixed")
    model.save_pretrained(folder)
    return model, folder


def test_every_module_has_the_form_it_was_given(mixed):
    model, folder = mixed
    for each in (model, arb_hf.from_pretrained(folder)):
        assert type(each.get_submodule("model.layers.0.self_attn.q_proj")) is torch.nn.Linear
        for layer in each.model.layers:
            down, up, gate = (getattr(layer.mlp, name).form for name in ("down_proj", "up_proj", "gate_proj"))
            assert (down.has_column_scales, down.block_size, down.scale_dtype) == (False, 32, "bfloat16")
            assert (up.groups, up.salient_groups, up.block_size, up.scale_dtype) == (1, 1, 64, "float16")
            assert (gate.groups, gate.salient_groups, gate.has_column_scales) == (2, 2, True)
        assert hasattr(each.model.layers[1].self_attn.q_proj, "form")


def test_the_report_says_what_was_used(mixed):
    model, _ = mixed
    damping = {each.kind: each.solve.damping for each in model.arb_report.matrices}
    assert damping["mlp.up_proj"] == 0.1
    assert damping["mlp.gate_proj"] == 0.01
    coverage = model.arb_report.coverage
    kept = {kind: why for kind, why, _, _ in coverage.groups() if why}
    assert set(kept) == {f"self_attn.{name}_proj" for name in "qkvo"}
    assert all("model.layers.0.self_attn" in why for why in kept.values())
    assert f"{coverage.share:.1%}" in coverage.table()


def test_overrides_are_stored_and_a_fresh_process_gives_identical_logits(mixed):
    model, folder = mixed
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert stored["overrides"] == OVERRIDES
    assert stored["modules"]["model.layers.1.mlp.gate_proj"].keys() == {"salient_columns"}
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.save(model(ids).logits, folder / "logits.pt")
    code = f"""
import torch, arb_hf
model = arb_hf.from_pretrained({str(folder)!r})
expected = torch.load({str(folder / "logits.pt")!r}, weights_only=True)
assert torch.equal(model(torch.arange(12)[None]).logits, expected)
"""
    done = fresh_process(code)
    assert done.returncode == 0, done.stderr


def test_an_override_that_covers_nothing_is_refused(tiny_model):
    with pytest.raises(ArbCalibrationError, match=r"'\*\.up_projj'.*no weight matrix.*model\.layers\.0"):
        binarize(tiny_model, overrides={"*.up_projj": {"block_size": 32}})
    model = binarize(tiny_model, overrides={"lm_head": None, "model.layers.1": None})  # kept anyway: no harm
    assert model.arb_report.coverage.share == 0.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("q_porj", r"has 'q_porj': no module has this name, or one that ends in it; did you mean 'q_proj'\?"),
        ("model.layers.7", "has 'model.layers.7': no module .*; did you mean 'model.layers.[01]'"),
        ("vision_tower", r"has 'vision_tower': no module .*; see model\.named_modules\(\)"),
        ("*.q_proj", "names are no patterns: those go in overrides={pattern: None}"),
    ],
)
def test_a_name_to_keep_that_matches_nothing_is_refused(tiny_model, name, message):
    with pytest.raises(ArbCalibrationError, match=message):
        binarize(tiny_model, modules_to_not_convert=["lm_head", name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": {"*.up_proj": {"damping": 0.1}, "*.mlp.up_proj": None}}, r"'\*\.up_proj'\] .* more specific"),
        (
            {"overrides": {"*.up_proj": {"damping": 0.1}}, "modules_to_not_convert": ["up_proj"]},
            r"'\*\.up_proj'\] has no effect: what it covers is kept .*in modules_to_not_convert",
        ),
    ],
)
def test_an_override_that_decides_nothing_is_told_of(tiny_model, options, message):
    with pytest.warns(UserWarning, match=message):
        binarize(tiny_model, **options)


def test_what_was_asked_to_be_kept_does_not_stop_a_run_and_the_rest_does(tiny_model, monkeypatch):
    model = binarize(tiny_model, modules_to_not_convert=["model.layers.0"])
    assert model.arb_report.coverage.share == 0.5
    monkeypatch.setattr("arb_hf.calibrate.decoder.FEWEST_OUTPUTS", 97)
    with pytest.raises(ArbCalibrationError, match=r"only 42\.4% .*minimum_coverage is 90%(.|\n)*too narrow"):
        binarize(tiny_model)
    assert 0.42 < binarize(tiny_model, minimum_coverage=0.42).arb_report.coverage.share < 0.43
