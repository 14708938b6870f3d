"""Which columns of a block are salient, and which weights fall in which group (BiLLM, arXiv 2402.04291, sections 3.1-3.2).

Everything here looks only at the metric ``T [n, k]`` of a block: signed weights (magnitude metric) or OBS saliencies
(hessian metric). Candidates are judged by plain residual binarization of T, as the published search does: of the
float32 means of their errors over the block the first smallest wins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import native
from . import compiled, search

THRESHOLDS = 81  # quantiles 0.10, 0.11, ..., 0.90


@dataclass(frozen=True)
class Partition:
    """``salient``: bool ``[k]``. ``large``: bool ``[n, k]``, the large-magnitude group, or None with one group."""

    salient: Tensor
    large: Tensor | None


def find_salient_columns(metric: Tensor, limit: int) -> Tensor:
    """The 1 to ``limit - 1`` columns whose second sign lowers the error of T most: bool ``[k]``.

    A block of a single column has none.
    """
    ranking = torch.topk(metric.abs().sum(0), metric.shape[1]).indices
    salient = torch.zeros(metric.shape[1], dtype=torch.bool, device=metric.device)
    candidates = min(limit, metric.shape[1]) - 1
    if candidates > 0:
        errors = search.salient_errors(metric[:, ranking], candidates)
        salient[ranking[: first_smallest(errors, metric) + 1]] = True
    return salient


def salient_bounds(m: int, block_size: int, limit: int) -> tuple[int, int]:
    """The fewest and the most columns that :func:`find_salient_columns` marks in all blocks of a matrix of ``m``."""
    widths = [min(block_size, m - start) for start in range(0, m, block_size)]
    most = [max(min(limit, width) - 1, 0) for width in widths]
    return sum(min(1, each) for each in most), sum(most)


def first_smallest(errors: Tensor, metric: Tensor) -> int:
    """The first candidate of smallest mean error, as float32: the published search compares those, ties and all."""
    return int((errors / metric.numel()).to(torch.float32).argmin())


def quantiles(magnitudes: Tensor) -> Tensor:
    """The candidate thresholds: 81 quantiles of a value set, linearly interpolated."""
    values = magnitudes.flatten()
    ordered = compiled.sort_magnitudes(values) if native.usable(values) else values.sort().values
    position = torch.linspace(0.10, 0.90, THRESHOLDS, dtype=torch.float64, device="cpu") * (ordered.numel() - 1)
    below = position.floor().to(torch.int64)
    above = (below + 1).clamp(max=ordered.numel() - 1)
    fraction = (position - below).to(ordered.device)
    low, high = ordered[below.to(ordered.device)].double(), ordered[above.to(ordered.device)].double()
    return (low + (high - low) * fraction).to(magnitudes.dtype)


def split(metric: Tensor, thresholds: Tensor, order: int, rest: Tensor, block: Tensor) -> Tensor:
    """The large-magnitude group of ``metric [n, k]`` that leaves the smallest squared error of T: bool ``[n, k]``.

    Args:
        metric: T of some columns of the block.
        thresholds: the candidates.
        order: rounds of binarization of both groups.
        rest: what the block's other columns leave of T, the same for every threshold.
        block: T of the whole block.
    """
    errors = search.split_errors(metric, thresholds, order) + rest.double().square().sum()
    return metric.abs() >= thresholds[first_smallest(errors, block)]


def split_by_output(
    metric: Tensor, thresholds: Tensor, ordinary: Tensor, rest: Tensor, second_moment: Tensor, block: Tensor
) -> Tensor:
    """Like :func:`split` for the ordinary columns (bool ``[c]``), by T's output error under S ``[c, c]`` (arb-x)."""
    errors = search.output_errors(metric, thresholds, ordinary, rest, second_moment)
    return metric.abs() >= thresholds[first_smallest(errors, block)]
