"""Every method against the published implementation's recorded results (tests/data/oracle)."""

import json

import numpy as np
import pytest
import torch

from arb_hf.binarize import BinarizeOptions, binarize_weight
from arb_hf.binarize.hessian import output_error
from helpers.process import DATA

METHODS = {"braq": "billm"}
RECORDED = json.loads((DATA / "oracle" / "results.json").read_text())
FILES = {path.stem: np.load(path) for path in sorted((DATA / "oracle").glob("*.npz"))}
CASES = [(name, key) for name, file in FILES.items() for key in file.files if "__" in key]

# Real weights in bf16 tie exactly in the alternating updates of these methods; errors and agreement judge them.
TIED = [("L5_q_proj_576x576", key) for key in ("arb__hessian", "arb+g__hessian", "arb-x__hessian", "arb-x+g__hessian")]
# One weight of the second block lies 2e-8 from its group's mean, less than what float32 rounding of the Cholesky factor
# moves it by (its distance changes sign with the number of BLAS threads): its sign, and all after it, is a coin's toss.
TIED += [("gauss_256x384", "braq__magnitude")]


def binarized(name: str, key: str):
    file = FILES[name]
    method, metric = key.split("__")
    options = BinarizeOptions(
        method=METHODS.get(method.removesuffix("+g"), method.removesuffix("+g")),
        column_group_bitmap=method.endswith("+g"),
        salient_metric=metric,
        refinement="paper",
    )
    weight, hessian = torch.from_numpy(file["W"]), torch.from_numpy(file["H_raw"])
    return weight, hessian, binarize_weight(weight, hessian, options)


def relative_squared_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).square().sum() / expected.square().sum()).item()


@pytest.mark.parametrize(("name", "key"), [case for case in CASES if case not in TIED])
def test_equals_the_published_result(name, key):
    _, _, binary = binarized(name, key)
    expected = torch.from_numpy(FILES[name][key])
    assert relative_squared_error(binary.dequantize(), expected) <= 1e-10


@pytest.mark.parametrize(("name", "key"), TIED)
def test_equals_the_published_result_up_to_ties(name, key):
    weight, hessian, binary = binarized(name, key)
    dense, expected = binary.dequantize(), torch.from_numpy(FILES[name][key])
    assert (dense - expected).abs().lt(1e-5).float().mean() >= 0.99
    recorded = RECORDED[f"{name}__{key}"]
    assert relative_squared_error(dense, weight) == pytest.approx(recorded["weight_error"], rel=1e-3)
    assert output_error(weight - dense, weight, hessian) == pytest.approx(recorded["output_error"], rel=1e-3)


def test_first_block_of_a_tied_case_is_exact():
    _, _, binary = binarized("gauss_256x384", "braq__magnitude")
    expected = torch.from_numpy(FILES["gauss_256x384"]["braq__magnitude"])
    assert relative_squared_error(binary.dequantize()[:, :128], expected[:, :128]) <= 1e-10


@pytest.mark.parametrize(("name", "key"), [("gauss_256x384", "arb-rc+g__hessian"), ("gauss_256x384", "arb-x__hessian")])
def test_storing_costs_little(name, key):
    weight, _, binary = binarized(name, key)
    assert relative_squared_error(binary.rounded().dequantize(), binary.dequantize()) < 1e-6
    del weight
