"""The forms that one matrix may have, with their bits and the error to expect of each: what ``ArbConfig(bits=...)`` picks from.

No candidate is binarized. Rounding with feedback leaves of column j the error ``a * |w_j|^2 / U_jj^2`` in the output,
with U as in ``HessianFactor`` (the OBS saliency, summed over rows) and ``a`` the squared error of a normal variable at its best
levels. A form is one ``a`` for its ordinary and one for its salient columns, and the most salient columns come first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...format import WORD
from ..hessian import HessianFactor, saliency
from ..options import BinarizeOptions

# Squared error of a standard normal variable at its 2, 4 and 8 best levels (Max, 1960).
ONE_SIGN, TWO_BITS, THREE_BITS = 0.3634, 0.1175, 0.03454
STEPS = 64  # counts of salient columns that are looked at at most, from none to all


@dataclass(frozen=True)
class Candidate:
    """A form that a matrix may have: the options that give it, its stored bits, its relative output error as expected."""

    options: BinarizeOptions
    bits: int
    error: float


def possible(options: BinarizeOptions, m: int) -> Iterator[BinarizeOptions]:
    """The options of every form that a matrix of ``m`` columns is offered: one group or two, salient columns from none to all.

    Two groups without the column-group bitmap are not among them: one group with as many salient columns takes the
    same bits or fewer, and reaches the same levels.
    """
    step = WORD * -(-m // (WORD * STEPS))  # planes of salient columns are stored in whole words
    for both in (False, True):
        for count in [*range(0, m, step), m]:
            yield replace(options, group_bitmap=both, column_group_bitmap=both, salient_columns=count)


def column_errors(weight: Tensor, factor: HessianFactor) -> Tensor:
    """What each column of ``weight [n, m]`` leaves in the output, ``[m]``, in units of a level's squared error."""
    return saliency(weight, factor.upper.diagonal(), "hessian").sum(0).masked_fill(factor.dead, 0)


def candidates(weight: Tensor, energy: float, factor: HessianFactor, options: BinarizeOptions) -> list[Candidate]:
    """The forms of a matrix that are worth their bits: more of them, less error, in this order.

    Args:
        weight: ``[n, m]``, float32.
        energy: of its output, ``tr(W H W^T)``, with the H of ``factor``.
        options: block size, scales and method of all of them.
    """
    n, m = weight.shape
    metric = column_errors(weight, factor)
    ranks = saliency(weight, factor.upper.diagonal(), options.salient_metric).abs().sum(0).argsort(descending=True)
    shares = (metric[ranks].cumsum(0, dtype=torch.float64) / metric.sum(dtype=torch.float64).clamp(min=1e-300)).tolist()
    scale = metric.sum(dtype=torch.float64).item() / max(energy, 1e-300)
    found = []
    for each in possible(options, m):
        count = each.salient_columns or 0
        salient = shares[count - 1] if count else 0.0
        found.append(Candidate(each, each.form(n, m, count).bits(), scale * expected(each, salient)))
    return worthwhile(found)


def expected(options: BinarizeOptions, salient: float) -> float:
    """The error to expect of a form in units of its columns' errors, of which the salient columns have a share."""
    ordinary, second = (TWO_BITS, THREE_BITS) if options.group_bitmap else (ONE_SIGN, TWO_BITS)
    return ordinary + (second - ordinary) * salient


def worthwhile(found: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other candidate beats in both bits and error, by bits."""
    kept: list[Candidate] = []
    for each in sorted(found, key=lambda each: (each.bits, each.error)):
        if not kept or each.error < kept[-1].error:
            kept.append(each)
    return kept
