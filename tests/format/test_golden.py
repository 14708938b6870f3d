"""Checkpoints of every released format load for ever, bit for bit; every option has one (data/golden/make.py)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import runpy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import arb_hf
from arb_hf import ArbConfig
from arb_hf.binarize.methods import METHODS
from arb_hf.binarize.options import REFINEMENTS, SALIENT_METRICS
from arb_hf.config import FORM_OPTIONS, PER_MODULE
from arb_hf.format import FORMAT_VERSION
from arb_hf.format.form import SCALE_DTYPES, BinaryForm
from arb_hf.nn import binary_modules, int8_tables
from helpers.process import DATA

GOLDEN = DATA / "golden"
DIGESTS = json.loads((GOLDEN / "digests.json").read_text())
MAKE = runpy.run_path(str(GOLDEN / "make.py"))
CONFIGS = {name: json.loads((GOLDEN / name / "config.json").read_text())["quantization_config"] for name in DIGESTS}
# Options with a short list of values, and that list.
VALUES = {
    "method": tuple(METHODS),
    "refinement": REFINEMENTS,
    "salient_metric": SALIENT_METRICS,
    "scale_dtype": tuple(SCALE_DTYPES),
    "group_bitmap": (True, False),
    "column_group_bitmap": (True, False),
}


def stored(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for file in (GOLDEN / name).glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", DIGESTS)
def test_golden_files_load_bit_for_bit(name):
    for file, digest in DIGESTS[name]["files"].items():
        assert hashlib.sha256((GOLDEN / name / file).read_bytes()).hexdigest() == digest, f"{file} was changed"
    model = arb_hf.from_pretrained(GOLDEN / name)
    tensors, modules = stored(name), binary_modules(model)
    assert modules.keys() == DIGESTS[name]["dense"].keys()
    for module_name, module in modules.items():
        for part, tensor in module.packed.items():
            assert tensor.dtype == tensors[f"{module_name}.{part}"].dtype
            assert torch.equal(tensor, tensors[f"{module_name}.{part}"]), part
        dense = module.binary_weight().dequantize()
        assert MAKE["digest"](dense) == DIGESTS[name]["dense"][module_name], module_name
        plain = plain_decoder(module.packed, module.form)
        assert np.array_equal(dense.numpy(), plain), module_name
    tables = int8_tables(model)
    assert tables.keys() == set(CONFIGS[name].get("embeddings") or ()) == DIGESTS[name].get("tables", {}).keys()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for table_name, table in tables.items():
        assert MAKE["digest"](table.dequantized()) == DIGESTS[name]["tables"][table_name]
        if f"{table_name}.weight" not in tied:
            codes, absmax = (tensors[f"{table_name}.{part}"] for part in ("weight", "row_absmax"))
            plain = codes.numpy().astype(np.float32) * (absmax.numpy().astype(np.float32) / np.float32(127))[:, None]
            assert np.array_equal(table.dequantized().numpy(), plain)
    assert model(torch.arange(6)[None]).logits.isfinite().all()


def plain_decoder(tensors: dict[str, torch.Tensor], form: BinaryForm) -> np.ndarray:
    """The dense matrix, column by column, from what packing.py's docstring says and nothing else of the package."""
    n, m, size = form.out_features, form.in_features, form.block_size
    raw = {
        name: tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
        for name, tensor in tensors.items()
    }
    one, by_127 = np.float32(1), np.float32(127)
    rows = raw["row_parameters"].astype(np.float32)
    if "row_absmax" in raw:
        rows = rows * (raw["row_absmax"] / by_127)[..., None]
    columns, extra = (
        None if key not in raw else raw[key].astype(np.float32) / (by_127 if raw[key].dtype == np.int8 else one)
        for key in ("column_scales", "salient_column_scales")
    )
    groups, of_salient = (
        (2 if raw["second_plane"].shape[0] == -(-m // 32) and form.groups == 2 else 1),
        form.salient_groups,
    )
    salient = [bool(raw["salient_columns"][j // 8] >> (j % 8) & 1) for j in range(m)]

    def bit(plane: str, position: int) -> np.ndarray:
        return (raw[plane][position // 32].view(np.uint32) >> np.uint32(position % 32)) & 1 == 1

    dense = np.empty((n, m), np.float32)
    for block, start in enumerate(range(0, m, size)):
        stop = min(start + size, m)
        order = [j for j in range(start, stop) if salient[j]] + [j for j in range(start, stop) if not salient[j]]
        r = rows[block]
        for position, j in enumerate(order, start):
            first = np.where(bit("weight", position), one, -one)
            number = sum(salient[:j])
            levels = []
            for g in range(of_salient if salient[j] else groups):
                if salient[j]:
                    second = np.where(bit("second_plane", number if groups == 1 else position), one, -one)
                    terms = [r[groups + 2 * g] * first, r[groups + 2 * g + 1] * second]
                    mean = r[groups + 2 * of_salient + groups + g] if columns is None else None
                    if columns is not None:
                        k = [*columns[:, position], *([] if extra is None else extra[:, number])]
                        terms = [term * k[2 * g + o] for o, term in enumerate(terms)]
                    levels.append((terms[0] if mean is None else terms[0] + mean) + terms[1])
                else:
                    level = r[g] * first
                    mean = r[groups + 2 * of_salient + g] if columns is None else None
                    levels.append(level * columns[g, position] if mean is None else level + mean)
            if len(levels) == 1:
                dense[:, j] = levels[0]
            else:
                large = bit("salient_groups", number) if salient[j] else bit("second_plane", position)
                dense[:, j] = np.where(large, levels[1], levels[0])
    return dense


def test_golden_files_are_small():
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 2_000_000
    assert {path.suffix for path in GOLDEN.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".py", ".pyc"}


def test_every_case_of_the_generator_is_there():
    assert (
        MAKE["cases"]().keys()
        == DIGESTS.keys()
        == {path.name for path in GOLDEN.iterdir() if path.is_dir()} - {"__pycache__"}
    )


def test_every_format_version_has_golden_files():
    assert {config["format_version"] for config in CONFIGS.values()} == set(range(1, FORMAT_VERSION + 1))


def test_the_first_version_loads_as_such():
    """It knows no int8 tables; what is saved again keeps its version."""
    old = [name for name, config in CONFIGS.items() if config["format_version"] == 1]
    assert len(old) == 68 and not any("embeddings" in CONFIGS[name] for name in old)
    model = arb_hf.from_pretrained(GOLDEN / "arb-rc-full")
    config = model.config.quantization_config
    assert (config.format_version, config.embedding_dtype, config.embeddings) == (1, "model", None)
    assert not int8_tables(model)


def test_int8_tables_come_tied_and_not_with_a_bias_and_alone():
    found = {tuple(config["embeddings"]) for config in CONFIGS.values() if config.get("embeddings")}
    assert found == {("model.embed_tokens", "lm_head"), ("lm_head",)}
    assert "lm_head.row_absmax" not in stored("int8-tied") and "lm_head.row_absmax" in stored("int8-untied")
    assert stored("int8-head-bias")["lm_head.bias"].dtype == torch.bfloat16


def test_every_option_of_the_config_is_known_to_some_golden_file():
    """A new option fails here until a golden file was made by a release that has it."""
    known = set().union(*CONFIGS.values())
    assert set(ArbConfig().to_dict()) - known == set()


@pytest.mark.parametrize("option", PER_MODULE)
def test_every_option_of_a_matrix_is_varied(option):
    used = {json.dumps(config[option]) for config in CONFIGS.values()}
    if option in VALUES:
        assert used == {json.dumps(value) for value in VALUES[option]}, f"{option} lacks golden files"
    else:
        assert len(used) > 1, f"{option} has one value in all golden files"


def test_options_that_shape_the_form_come_in_every_combination():
    assert set(FORM_OPTIONS) == {"method", "block_size", "group_bitmap", "column_group_bitmap", "scale_dtype"}
    found = {tuple(config[option] for option in FORM_OPTIONS if option != "block_size") for config in CONFIGS.values()}
    bitmaps = [(True, True), (True, False), (False, False)]
    assert found >= {(method, *pair, dtype) for method in METHODS for pair in bitmaps for dtype in SCALE_DTYPES}
    of_modules = [entry for config in CONFIGS.values() for entry in config["modules"].values()]
    for option in ("method", "block_size", "scale_dtype"):
        assert any(option in entry for entry in of_modules), f"no module has a {option} of its own"


def test_every_field_of_a_form_is_varied():
    """A new field, or a new tensor, fails here until golden files have it."""
    forms = [
        module.form for name in DIGESTS for module in binary_modules(arb_hf.from_pretrained(GOLDEN / name)).values()
    ]
    for field in dataclasses.fields(BinaryForm):
        assert len({getattr(form, field.name) for form in forms}) > 1, f"{field.name} is the same in all golden files"
    assert {form.scale_dtype for form in forms} == set(SCALE_DTYPES)
    tensors = {(part, str(dtype)) for form in forms for part, (_, dtype) in form.tensors().items()}
    possible = {
        (part, str(dtype))
        for groups, of_salient in ((1, 1), (2, 1), (2, 2))
        for by_column in (True, False)
        for scales in SCALE_DTYPES
        for part, (_, dtype) in BinaryForm(5, 40, 3, 32, groups, of_salient, by_column, scales).tensors().items()
    }
    assert tensors == possible
    shares = [form.salient_columns / form.in_features for form in forms]
    assert min(shares) == 0 and max(shares) > 0.4
    assert any(form.blocks > 5 for form in forms)
    assert any(form.in_features % 8 for form in forms) and any(form.out_features % 16 for form in forms)
