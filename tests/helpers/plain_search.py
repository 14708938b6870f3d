"""The searches as plain loops over candidates: the oracle of ``arb_hf.binarize.paper.search``."""

import torch
from torch import Tensor

from arb_hf.binarize.paper.fit import binarize_residual


def square_sum(values: Tensor) -> Tensor:
    return values.square().sum(dtype=torch.float64)


def residual(metric: Tensor, small: Tensor, large: Tensor, order: int) -> Tensor:
    kept = binarize_residual(metric, small, order).values() * small
    return metric - kept - binarize_residual(metric, large, order).values() * large


def salient_errors(ranked: Tensor, candidates: int) -> Tensor:
    ones, errors = torch.ones_like(ranked), []
    for i in range(1, candidates + 1):
        parts = (ranked[:, :i], ranked[:, i:])
        kept = [binarize_residual(part, ones[:, : part.shape[1]], 2).values() for part in parts]
        errors.append(sum(square_sum(part - keep) for part, keep in zip(parts, kept, strict=True)))
    return torch.stack(errors)


def split_errors(metric: Tensor, thresholds: Tensor, order: int) -> Tensor:
    errors = []
    for threshold in thresholds:
        large = (metric.abs() >= threshold).to(metric.dtype)
        errors.append(square_sum(residual(metric, 1 - large, large, order)))
    return torch.stack(errors)


def output_errors(metric: Tensor, thresholds: Tensor, ordinary: Tensor, rest: Tensor, second_moment: Tensor) -> Tensor:
    left, errors = metric.new_empty(len(metric), ordinary.numel()), []
    left[:, ~ordinary] = rest
    for threshold in thresholds:
        large = (metric.abs() >= threshold).to(metric.dtype)
        left[:, ordinary] = residual(metric, 1 - large, large, 1)
        errors.append(((left @ second_moment) * left).sum(dtype=torch.float64))
    return torch.stack(errors)
