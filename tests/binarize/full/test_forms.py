"""Candidates of a matrix and the choice among them: bits exact, errors near what binarizing gives, the budget kept and spent."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arb_hf.binarize.full.driver import binarize_full
from arb_hf.binarize.full.forms import Candidate, candidates, possible, worthwhile
from arb_hf.binarize.hessian import factorize, output_error
from arb_hf.binarize.options import BinarizeOptions
from arb_hf.calibrate.choices import Choosable, choose, hull

OPTIONS = BinarizeOptions(refinement="full", scale_dtype="int8", block_size=64)


@pytest.fixture(scope="module")
def matrix():
    """A weight, and a Hessian whose columns differ by two orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 192, generator=generator) * torch.logspace(-1, 1, 192)
    return torch.randn(160, 192, generator=generator), x.T @ x / 300


def energy(weight, hessian):
    return ((weight @ hessian) * weight).sum().item()


@pytest.mark.parametrize("method", ["arb-rc", "arb-x"])
def test_a_candidate_has_the_bits_and_about_the_error_that_binarizing_gives(matrix, method):
    weight, hessian = matrix
    factor = factorize(hessian, 192, 0.01)
    found = candidates(weight, energy(weight, hessian), factor, replace(OPTIONS, method=method))
    assert [each.bits for each in found] == sorted(each.bits for each in found)
    for each in found[:: len(found) // 6]:
        binary = binarize_full(weight, hessian, factor, each.options)
        assert binary.form.bits() == each.bits
        measured = output_error(weight - binary.rounded().dequantize(), weight, hessian)
        assert measured == pytest.approx(each.error, rel=0.6)


def test_candidates_cover_the_range_from_the_smallest_form_to_the_largest(matrix):
    weight, hessian = matrix
    found = candidates(weight, energy(weight, hessian), factorize(hessian, 192, 0.01), OPTIONS)
    sizes = [one.form(160, 192, one.salient_columns).bits() for one in possible(OPTIONS, 192)]
    assert (found[0].bits, found[-1].bits) == (min(sizes), max(sizes))
    word = 160 * 32  # salient columns come by the word, with scales; the second group brings three row scales per block
    for earlier, later in itertools.pairwise(found):
        scales = 3 * 3 * 160 * 8 if later.options.group_bitmap and not earlier.options.group_bitmap else 0
        assert later.bits - earlier.bits < 1.3 * word + scales


def test_dead_columns_are_not_salient_before_live_ones(matrix):
    weight, hessian = matrix
    hessian = hessian.clone()
    hessian[:96], hessian[:, :96] = 0, 0
    found = candidates(weight, energy(weight, hessian), factorize(hessian, 192, 0.01), OPTIONS)
    half = next(each for each in found if each.options.salient_columns == 96 and not each.options.group_bitmap)
    assert all(each.bits <= half.bits for each in found if not each.options.group_bitmap)


def candidate(bits: int, error: float) -> Candidate:
    return Candidate(OPTIONS, bits, error)


curves = st.lists(
    st.tuples(st.integers(1, 60), st.floats(1e-3, 1.0)), min_size=1, max_size=8, unique_by=lambda each: each[0]
).map(lambda points: worthwhile([candidate(*each) for each in points]))
problems = st.lists(st.tuples(curves, st.floats(1e-3, 10.0)), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(problems, st.integers(0, 200))
def test_the_choice_keeps_the_budget_and_is_near_the_best_there_is(problem, budget):
    matrices = {str(number): Choosable(curve, importance) for number, (curve, importance) in enumerate(problem)}
    chosen = choose(matrices, budget)
    least = sum(each.candidates[0].bits for each in matrices.values())
    assert sum(each.bits for each in chosen.values()) <= max(budget, least)

    def loss(choice):
        return sum(each.error * matrices[name].importance for name, each in choice.items())

    every = itertools.product(*(each.candidates for each in matrices.values()))
    allowed = [each for each in every if sum(one.bits for one in each) <= max(budget, least)]
    best = min(loss(dict(zip(matrices, each, strict=True))) for each in allowed)
    # The hull's bound: what is lost to the best is at most one step of one matrix.
    step = max(
        (a.error - b.error) * each.importance
        for each in matrices.values()
        for a, b in [*itertools.pairwise(hull(each.candidates)), (each.candidates[0],) * 2]
    )
    assert loss(chosen) <= best + step + 1e-9


def test_what_the_hull_leaves_is_spent_between_its_corners():
    matrices = {"a": Choosable([candidate(10, 1.0), candidate(14, 0.9), candidate(20, 0.1)], 1.0)}
    assert choose(matrices, 19)["a"].bits == 14
    assert choose(matrices, 20)["a"].bits == 20
