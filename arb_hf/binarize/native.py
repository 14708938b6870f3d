"""The C searches, updates and rounding (``csrc/search.c``, ``updates.c``, ``rounding.c``).

For float32 CPU tensors, where the library is.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import native
from .fit import Fit
from .sweep import Sweep


def usable(values: Tensor) -> bool:
    """Whether the C library is there and can work on this tensor."""
    return values.device.type == "cpu" and values.dtype == torch.float32 and native.library() is not None


def salient_errors(ranked: Tensor, candidates: int) -> Tensor:
    """See :func:`arb_hf.binarize.search.salient_errors`."""
    errors = torch.empty(candidates, dtype=torch.float64)
    ranked = ranked.contiguous()
    _call("arb_salient_errors", ranked, *ranked.shape, candidates, native.isa(), errors)
    return errors


def split_errors(metric: Tensor, thresholds: Tensor, order: int) -> Tensor:
    """See :func:`arb_hf.binarize.search.split_errors`."""
    errors = torch.empty(thresholds.numel(), dtype=torch.float64)
    metric, thresholds = metric.contiguous(), thresholds.contiguous()
    _call("arb_split_errors", metric, *metric.shape, thresholds, thresholds.numel(), order, native.isa(), errors)
    return errors


def output_errors(metric: Tensor, thresholds: Tensor, ordinary: Tensor, rest: Tensor, second_moment: Tensor) -> Tensor:
    """See :func:`arb_hf.binarize.search.output_errors`."""
    block = metric.new_empty(len(metric), ordinary.numel())
    block[:, ordinary], block[:, ~ordinary] = metric, rest
    columns, moment = ordinary.nonzero().flatten(), second_moment.double()
    moment = (moment + moment.T) / 2
    metric, thresholds = metric.contiguous(), thresholds.contiguous()
    errors = torch.empty(thresholds.numel(), dtype=torch.float64)
    sizes = (*block.shape, columns.numel())
    candidates = thresholds.numel()
    _call("arb_output_errors", block, metric, columns, *sizes, thresholds, candidates, moment, native.isa(), errors)
    return errors


def sort_magnitudes(values: Tensor) -> Tensor:
    """Non-negative values ``[k]`` in ascending order."""
    ordered = values.clone()
    _call("arb_sort_magnitudes", ordered, ordered.numel(), torch.empty_like(ordered))
    return ordered


def fit_means(values: Tensor, member: Tensor, order: int, iterations: int) -> Fit:
    """See :func:`arb_hf.binarize.arb.fit`."""
    n, k = values.shape
    values, member = values.contiguous(), member.contiguous()
    signs, rows, mean = values.new_empty(order, n, k), values.new_empty(order, n), values.new_empty(n)
    _call("arb_fit_arb", values, member, n, k, order, iterations, native.isa(), signs, rows, mean)
    return Fit(signs.unbind(), rows.unbind(), mean)


def fit_scales(values: Tensor, member: Tensor, iterations: int) -> Fit:
    """See :func:`arb_hf.binarize.rc.fit`; second order."""
    n, k = values.shape
    values, member = values.contiguous(), member.contiguous()
    signs, rows, columns = values.new_empty(2, n, k), values.new_empty(2, n), values.new_empty(2, k)
    _call("arb_fit_arb_rc", values, member, n, k, iterations, native.isa(), signs, rows, columns)
    return Fit(signs.unbind(), rows.unbind(), columns=columns.unbind())


def round_columns(sweep: Sweep, columns: slice) -> Tensor:
    """See :func:`arb_hf.binarize.sweep.round_columns`."""
    targets, rows = sweep.targets, sweep.rows
    steps = targets.new_empty(columns.stop - columns.start, targets.shape[1])
    given = (targets, sweep.present, sweep.coupling, rows, sweep.weights, sweep.known, sweep.counts)
    sizes = (*targets.shape, len(rows), columns.start, columns.stop)
    _call("arb_round_columns", *given, *sizes, native.isa(), sweep.codes, sweep.dense, steps)
    return steps


def _call(name: str, *arguments: Tensor | int | None) -> None:
    """Contiguous tensors go as pointers, None as null, ints as int64; a result other than 0 is a lack of memory."""
    function = getattr(native.require(), name)
    function.restype = ctypes.c_int
    assert all(a.is_contiguous() for a in arguments if isinstance(a, Tensor)), name
    raw = [_raw(argument) for argument in arguments]
    if function(*raw) != 0:
        raise MemoryError(f"{name} found no memory for its work space")


def _raw(argument: Tensor | int | None) -> ctypes.c_void_p | ctypes.c_int64:
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())
