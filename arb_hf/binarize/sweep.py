"""Rounding a block's columns to their levels, one after the other, each step moving the targets of later columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .coded import CodedBlock

# Columns whose steps reach later columns together, and the most levels a column has; csrc/rounding.c knows the same.
PANEL, MOST_LEVELS = 32, 8


@dataclass(frozen=True)
class Sweep:
    """What rounding the columns of a block, one after the other, works on; all tensors contiguous.

    A step d of column j moves target l by ``coupling[j, l] * d``. A step is the new value less the present one, or less
    the target where there is none.

    Attributes:
        targets, present: ``[k, n]``. coupling: ``[k, k]``, or None: no column moves another's target.
        rows: row parameters ``[slots, n]``.
        weights: what each of them counts in a column's levels, ``[k, MOST_LEVELS, slots]``.
        known, counts: the levels' codes ``[k, MOST_LEVELS]``, and how many levels a column has ``[k]``.
        codes, dense: ``[k, n]``, the result, filled column by column.
    """

    targets: Tensor
    present: Tensor | None
    coupling: Tensor | None
    rows: Tensor
    weights: Tensor
    known: Tensor
    counts: Tensor
    codes: Tensor
    dense: Tensor

    @classmethod
    def of(cls, block: CodedBlock, targets: Tensor, coupling: Tensor | None, present: Tensor | None) -> Sweep:
        k = len(block.salient)
        weights = block.rows.new_zeros(k, MOST_LEVELS, len(block.rows))
        known = block.codes.new_zeros(k, MOST_LEVELS)
        counts = torch.empty(k, dtype=torch.int64, device=known.device)
        for salient, where in ((False, ~block.salient), (True, block.salient)):
            codes, table = block.coefficients(salient)
            weights[where, : len(codes)] = table * block.columns.T[where, None]
            known[where, : len(codes)] = codes
            counts[where] = len(codes)
        coupling = None if coupling is None else coupling.contiguous()
        results = torch.empty_like(block.codes), torch.empty_like(targets)
        return cls(targets, present, coupling, block.rows.contiguous(), weights, known, counts, *results)


def round_columns(sweep: Sweep, columns: slice) -> Tensor:
    """One panel of a sweep: fills codes and values there, hands on steps inside it, and returns them."""
    targets, present, coupling = sweep.targets, sweep.present, sweep.coupling
    steps = torch.empty_like(targets[columns])
    for step, j, count in zip(steps, range(columns.start, columns.stop), sweep.counts[columns].tolist(), strict=True):
        values = sweep.weights[j, :count] @ sweep.rows
        choice = (values - targets[j]).abs_().min(0).indices
        sweep.codes[j] = sweep.known[j, choice]
        sweep.dense[j] = values.gather(0, choice[None])[0]
        torch.sub(sweep.dense[j], targets[j] if present is None else present[j], out=step)
        if coupling is not None and j + 1 < columns.stop:
            targets[j + 1 : columns.stop].addr_(coupling[j, j + 1 : columns.stop], step)
    return steps
