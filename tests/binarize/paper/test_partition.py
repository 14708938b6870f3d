"""Salient columns and group splits: the fast searches make the choices of the plain loops."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arb_hf import native
from arb_hf.binarize.hessian import factorize, saliency
from arb_hf.binarize.paper import compiled, partition, search
from helpers import plain_search as plain
from helpers.process import DATA

HAS_LIBRARY = native.library() is not None
needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="the C library is not built")


@pytest.fixture(params=["torch", pytest.param("C", marks=needs_library)])
def version(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "usable", lambda values: False)
    return request.param


def metric_of(kind: str, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * (0.2 + torch.rand(columns, generator=generator))
    if kind == "squares":
        return values.square()
    if kind == "bfloat16":
        return (values * 0.02).to(torch.bfloat16).float()
    if kind == "zeros":
        values[torch.rand(rows, columns, generator=generator) < 0.4] = 0
        values[:, :: max(2, columns // 4)] = 0
        values[0] = 0
    return values


SHAPES = [(70, 128), (1, 128), (33, 64), (40, 33), (32, 50), (5, 2), (9, 200), (4100, 20)]
CASES = [(kind, *shape) for kind in ("signed", "squares", "bfloat16", "zeros") for shape in SHAPES]


def first_smallest(errors: torch.Tensor, metric: torch.Tensor) -> int:
    best, chosen = float("inf"), 0
    for i, error in enumerate((errors / metric.numel()).to(torch.float32).tolist()):
        if error < best:
            best, chosen = error, i
    return chosen


def ranked(metric: torch.Tensor) -> torch.Tensor:
    return metric[:, torch.topk(metric.abs().sum(0), metric.shape[1]).indices]


def thresholds_of(metric: torch.Tensor) -> torch.Tensor:
    return partition.quantiles(metric.abs())


@pytest.mark.parametrize(("kind", "rows", "columns"), CASES)
def test_salient_columns_are_those_of_the_plain_search(version, kind, rows, columns):
    metric = metric_of(kind, rows, columns)
    candidates = min(50, columns) - 1
    expected = plain.salient_errors(ranked(metric), candidates)
    found = partition.find_salient_columns(metric, 50)
    order = torch.topk(metric.abs().sum(0), columns).indices
    assert set(found.nonzero().flatten().tolist()) == set(order[: first_smallest(expected, metric) + 1].tolist())


@pytest.mark.parametrize(("kind", "rows", "columns"), CASES)
@pytest.mark.parametrize("order", [1, 2])
def test_split_is_that_of_the_plain_search(version, kind, rows, columns, order):
    metric, rest = metric_of(kind, rows, columns), metric_of(kind, rows, 7, seed=1)
    block = torch.cat([metric, rest], 1)
    thresholds = thresholds_of(metric)
    expected = plain.split_errors(metric, thresholds, order) + plain.square_sum(rest)
    large = partition.split(metric, thresholds, order, rest, block)
    assert torch.equal(large, metric.abs() >= thresholds[first_smallest(expected, block)])


@pytest.mark.parametrize(("kind", "rows", "columns"), CASES)
def test_split_by_output_is_that_of_the_plain_search(version, kind, rows, columns):
    block = metric_of(kind, rows, columns + 3)
    ordinary = torch.arange(columns + 3) % (columns // 2 + 2) > 0
    metric, rest = block[:, ordinary], block[:, ~ordinary] * 0.1
    inputs = torch.randn(2 * columns + 9, columns + 3, generator=torch.Generator().manual_seed(2))
    moment, thresholds = inputs.T @ inputs, thresholds_of(metric)
    expected = plain.output_errors(metric, thresholds, ordinary, rest, moment)
    large = partition.split_by_output(metric, thresholds, ordinary, rest, moment, block)
    assert torch.equal(large, metric.abs() >= thresholds[first_smallest(expected, block)])


@functools.cache
def oracle_choices(case: str, metric_name: str) -> list[tuple]:
    """Per block of an oracle matrix: T, S and what the plain loops choose."""
    file = np.load(DATA / "oracle" / f"{case}.npz")
    weight, hessian = torch.from_numpy(file["W"]), torch.from_numpy(file["H_raw"])
    diagonal = factorize(hessian, len(hessian), 0.01).upper.diagonal()
    blocks = []
    for start in range(0, weight.shape[1], 128):
        span = slice(start, min(start + 128, weight.shape[1]))
        metric, moment = saliency(weight[:, span], diagonal[span], metric_name), hessian[span, span] / 2
        candidates = min(50, metric.shape[1]) - 1
        count = 1 + first_smallest(plain.salient_errors(ranked(metric), candidates), metric)
        salient = torch.zeros(metric.shape[1], dtype=torch.bool)
        salient[torch.topk(metric.abs().sum(0), metric.shape[1]).indices[:count]] = True
        chosen, rest, values = metric[:, salient], metric[:, salient] * 0.2, metric[:, ~salient]
        thresholds = partition.quantiles(metric.abs() * ~salient), partition.quantiles(chosen[chosen != 0].abs())
        errors = (
            plain.split_errors(values, thresholds[0], 1) + plain.square_sum(rest),
            plain.split_errors(chosen, thresholds[1], 2) + plain.square_sum(values),
            plain.output_errors(values, thresholds[0], ~salient, rest, moment),
        )
        blocks.append((metric, moment, salient, thresholds, [first_smallest(error, metric) for error in errors]))
    return blocks


@pytest.mark.parametrize("case", ["L5_q_proj_576x576", "gauss_256x384", "edge_zeros_dead_64x192"])
@pytest.mark.parametrize("metric_name", ["hessian", "magnitude"])
def test_choices_on_the_oracle_matrices(version, case, metric_name):
    for metric, moment, salient, (of_values, of_chosen), best in oracle_choices(case, metric_name):
        assert torch.equal(partition.find_salient_columns(metric, 50), salient)
        chosen, rest, values = metric[:, salient], metric[:, salient] * 0.2, metric[:, ~salient]
        large = partition.split(values, of_values, 1, rest, metric)
        assert torch.equal(large, values.abs() >= of_values[best[0]])
        large = partition.split(chosen, of_chosen, 2, values, metric)
        assert torch.equal(large, chosen.abs() >= of_chosen[best[1]])
        large = partition.split_by_output(values, of_values, ~salient, rest, moment, metric)
        assert torch.equal(large, values.abs() >= of_values[best[2]])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(2, 140), st.integers(0, 10**6), st.sampled_from(["signed", "squares"]))
def test_errors_are_those_of_double_precision(rows, columns, seed, kind):
    # Not with zeros: there values lie exactly on a level, and only rounding decides whether their sign is 0.
    metric = metric_of(kind, rows, columns, seed)
    candidates, thresholds = min(50, columns) - 1, thresholds_of(metric)
    exact = metric.double()
    scale = plain.square_sum(exact)
    for order in (1, 2):
        expected = plain.split_errors(exact, thresholds.double(), order)
        torch.testing.assert_close(
            search.split_errors(metric, thresholds, order), expected, rtol=1e-9, atol=1e-12 * scale
        )
    expected = plain.salient_errors(ranked(exact), candidates)
    found = search.salient_errors(ranked(metric), candidates)
    tolerance = 1e-12 if HAS_LIBRARY else 1e-6  # torch keeps residuals in float32
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(scale))


def test_quantiles_interpolate_linearly(version):
    values = metric_of("zeros", 30, 41).abs()
    expected = torch.quantile(values.double().flatten(), torch.linspace(0.1, 0.9, 81, dtype=torch.float64))
    torch.testing.assert_close(partition.quantiles(values), expected.float(), rtol=2e-7, atol=0)


def test_of_equal_errors_the_first_wins():
    errors = torch.tensor([3.0, 2.0 + 1e-9, 2.0, 5.0], dtype=torch.float64)
    assert partition.first_smallest(errors, torch.empty(1, 1)) == 1


def test_a_single_column_is_never_salient(version):
    assert not partition.find_salient_columns(metric_of("signed", 5, 1), 50).any()


@needs_library
def test_results_depend_on_neither_threads_nor_instruction_set(monkeypatch):
    metric = metric_of("squares", 1000, 128)
    ordinary = torch.arange(128) > 5
    thresholds, moment = thresholds_of(metric), torch.eye(128) + 0.1

    def results():
        values = metric[:, ordinary]
        return [
            compiled.salient_errors(ranked(metric), 49),
            compiled.split_errors(metric, thresholds, 1),
            compiled.split_errors(metric, thresholds, 2),
            compiled.output_errors(values, thresholds, ordinary, metric[:, ~ordinary], moment),
        ]

    expected, threads = results(), torch.get_num_threads()
    for isa in range(native.isa() + 1):
        monkeypatch.setattr(native, "isa", lambda isa=isa: isa)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            try:
                found = results()
            finally:
                torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
