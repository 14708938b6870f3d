"""The C twins of the searches and updates (``csrc/search.c``, ``csrc/updates.c``), for float32 tensors on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from ...native import call
from .fit import Fit


def salient_errors(ranked: Tensor, candidates: int) -> Tensor:
    """See :func:`arb_hf.binarize.paper.search.salient_errors`."""
    errors = torch.empty(candidates, dtype=torch.float64, device="cpu")
    ranked = ranked.contiguous()
    call("arb_salient_errors", ranked, *ranked.shape, candidates, native.isa(), errors)
    return errors


def split_errors(metric: Tensor, thresholds: Tensor, order: int) -> Tensor:
    """See :func:`arb_hf.binarize.paper.search.split_errors`."""
    errors = torch.empty(thresholds.numel(), dtype=torch.float64, device="cpu")
    metric, thresholds = metric.contiguous(), thresholds.contiguous()
    call("arb_split_errors", metric, *metric.shape, thresholds, thresholds.numel(), order, native.isa(), errors)
    return errors


def output_errors(metric: Tensor, thresholds: Tensor, ordinary: Tensor, rest: Tensor, second_moment: Tensor) -> Tensor:
    """See :func:`arb_hf.binarize.paper.search.output_errors`."""
    block = metric.new_empty(len(metric), ordinary.numel())
    block[:, ordinary], block[:, ~ordinary] = metric, rest
    columns, moment = ordinary.nonzero().flatten(), second_moment.double()
    moment = (moment + moment.T) / 2
    metric, thresholds = metric.contiguous(), thresholds.contiguous()
    errors = torch.empty(thresholds.numel(), dtype=torch.float64, device="cpu")
    sizes = (*block.shape, columns.numel())
    candidates = thresholds.numel()
    call("arb_output_errors", block, metric, columns, *sizes, thresholds, candidates, moment, native.isa(), errors)
    return errors


def sort_magnitudes(values: Tensor) -> Tensor:
    """Non-negative values ``[k]`` in ascending order."""
    ordered = values.clone()
    call("arb_sort_magnitudes", ordered, ordered.numel(), torch.empty_like(ordered))
    return ordered


def fit_arb(values: Tensor, member: Tensor, order: int, iterations: int) -> Fit:
    """See :func:`arb_hf.binarize.paper.arb.fit`."""
    n, k = values.shape
    values, member = values.contiguous(), member.contiguous()
    signs, rows, mean = values.new_empty(order, n, k), values.new_empty(order, n), values.new_empty(n)
    call("arb_fit_arb", values, member, n, k, order, iterations, native.isa(), signs, rows, mean)
    return Fit(signs.unbind(), rows.unbind(), mean)


def fit_arb_rc(values: Tensor, member: Tensor, iterations: int) -> Fit:
    """See :func:`arb_hf.binarize.paper.arb_rc.fit`; second order."""
    n, k = values.shape
    values, member = values.contiguous(), member.contiguous()
    signs, rows, columns = values.new_empty(2, n, k), values.new_empty(2, n), values.new_empty(2, k)
    call("arb_fit_arb_rc", values, member, n, k, iterations, native.isa(), signs, rows, columns)
    return Fit(signs.unbind(), rows.unbind(), columns=columns.unbind())
