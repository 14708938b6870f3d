"""Which columns of a block are salient, and which weights fall in which group (ALGORITHM 3).

Everything here looks only at the metric ``T [n, k]`` of a block: signed weights (magnitude metric) or OBS saliencies
(hessian metric). Candidates are judged by plain residual binarization of T, as the published search does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .fit import binarize_residual

THRESHOLDS = 81  # quantiles 0.10, 0.11, ..., 0.90
SmallLargeError = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Partition:
    """``salient``: bool ``[k]``. ``large``: bool ``[n, k]``, the large-magnitude group, or None with one group."""

    salient: Tensor
    large: Tensor | None


def saliency(values: Tensor, diagonal: Tensor, metric: str) -> Tensor:
    """T: the weights themselves, or ``w^2 / [(H_j:,j:)^-1]_jj``, the OBS saliency (ALGORITHM 3.1)."""
    return values if metric == "magnitude" else values.square() / diagonal.square()


def find_salient_columns(metric: Tensor, limit: int) -> Tensor:
    """The 1 to ``limit - 1`` columns whose second sign lowers the error of T most (ALGORITHM 3.3): bool ``[k]``."""
    ranking = torch.topk(metric.abs().sum(0), metric.shape[1]).indices
    ranked = metric[:, ranking]
    ones = torch.ones_like(ranked)
    best, count = torch.inf, 0
    for i in range(1, min(limit, ranked.shape[1])):
        parts = (ranked[:, :i], ranked[:, i:])
        kept = [binarize_residual(part, ones[:, : part.shape[1]], 2).values() for part in parts]
        error = single_mean(sum(_square_sum(part - keep) for part, keep in zip(parts, kept, strict=True)), metric)
        if error < best:
            best, count = error, i
    salient = torch.zeros(metric.shape[1], dtype=torch.bool, device=metric.device)
    salient[ranking[:count]] = True
    return salient


def single_mean(total: Tensor, metric: Tensor) -> float:
    """A block's mean error in float32: the published search compares float32 means, and resolves what they tie."""
    return (total / metric.numel()).to(torch.float32).item()


def _square_sum(values: Tensor) -> Tensor:
    return values.square().sum(dtype=torch.float64)


def quantiles(magnitudes: Tensor) -> Tensor:
    """The candidate thresholds: 81 quantiles of a value set, linearly interpolated (ALGORITHM 3.4)."""
    ordered = magnitudes.flatten().sort().values
    position = torch.linspace(0.10, 0.90, THRESHOLDS, dtype=torch.float64) * (ordered.numel() - 1)
    below = position.floor().to(torch.int64)
    above = (below + 1).clamp(max=ordered.numel() - 1)
    fraction = (position - below).to(ordered.device)
    low, high = ordered[below.to(ordered.device)].double(), ordered[above.to(ordered.device)].double()
    return (low + (high - low) * fraction).to(magnitudes.dtype)


def split(metric: Tensor, thresholds: Tensor, error_of: SmallLargeError, block: Tensor) -> Tensor:
    """The large-magnitude group of ``metric`` under the first threshold of smallest error: bool ``[n, k]``.

    ``error_of(small, large)`` is the float64 error sum over the whole ``block [n, c]`` that ``metric`` is part of.
    """
    magnitude = metric.abs()
    best, chosen = torch.inf, thresholds[0]
    for threshold in thresholds:
        large = (magnitude >= threshold).to(metric.dtype)
        error = single_mean(error_of(1 - large, large), block)
        if error < best:
            best, chosen = error, threshold
    return magnitude >= chosen


def squared_error(metric: Tensor, order: int, rest: Tensor) -> SmallLargeError:
    """Squared error of binarizing both groups of T separately with ``order`` signs, plus that of the ``rest``."""
    constant = _square_sum(rest)

    def error_of(small: Tensor, large: Tensor) -> Tensor:
        return _square_sum(_residual(metric, small, large, order)) + constant

    return error_of


def output_error(metric: Tensor, ordinary: Tensor, rest: Tensor, second_moment: Tensor) -> SmallLargeError:
    """Output error of T under S (arb-x).

    ``metric`` holds the ordinary columns (bool ``[c]``), ``rest [n, salient]`` what the salient ones leave.
    """
    residual = torch.empty(metric.shape[0], ordinary.numel(), device=metric.device)
    residual[:, ~ordinary] = rest

    def error_of(small: Tensor, large: Tensor) -> Tensor:
        residual[:, ordinary] = _residual(metric, small, large, 1)
        return ((residual @ second_moment) * residual).sum(dtype=torch.float64)

    return error_of


def _residual(metric: Tensor, small: Tensor, large: Tensor, order: int) -> Tensor:
    kept = binarize_residual(metric, small, order).values() * small
    return metric - kept - binarize_residual(metric, large, order).values() * large
