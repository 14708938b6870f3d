"""The C twin of :func:`arb_hf.binarize.full.rounding.round_columns` (``csrc/rounding.c``), for float32 tensors on the CPU."""

from __future__ import annotations

from torch import Tensor

from ... import native
from ...native import call
from .rounding import Sweep


def round_columns(sweep: Sweep, columns: slice) -> Tensor:
    """See :func:`arb_hf.binarize.full.rounding.round_columns`."""
    targets, rows = sweep.targets, sweep.rows
    steps = targets.new_empty(columns.stop - columns.start, targets.shape[1])
    given = (targets, sweep.present, sweep.coupling, rows, sweep.weights, sweep.known, sweep.counts)
    sizes = (*targets.shape, len(rows), columns.start, columns.stop)
    call("arb_round_columns", *given, *sizes, native.isa(), sweep.codes, sweep.dense, steps)
    return steps
