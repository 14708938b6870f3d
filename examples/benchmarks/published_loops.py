"""The published algorithm, written as plainly as it is described: the peer that ``binarize.py`` measures against.

Groups are NaN masks over the whole block, every candidate is binarized from scratch, and every sum of ARB-X goes through an
``[n, c, c]`` tensor, as in the paper's code. Only the Cholesky factor comes from ``arb_hf``.
"""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 15
QUANTILES = [p / 100 for p in range(10, 91)]


def masked_mean(values: Tensor, dim: int = 1) -> Tensor:
    """Mean over the entries that are not NaN; 0 where there are none."""
    mean = values.nanmean(dim)
    return torch.where(mean.isnan(), 0.0, mean)


def residual_binarization(values: Tensor, mask: Tensor, order: int) -> Tensor:
    """``order`` rounds of mean +- mean deviation on the mask, 0 elsewhere."""
    total = torch.zeros_like(values)
    for _ in range(order):
        left = torch.where(mask, values - total, torch.nan)
        mean = masked_mean(left)
        left = left - mean[:, None]
        scale = masked_mean(left.abs())
        level = torch.sign(left) * scale[:, None] + mean[:, None]
        total = total + torch.where(mask, level, 0.0)
    return total


def salient_search(metric: Tensor, limit: int = 50) -> Tensor:
    """Salient columns ``[c]``, bool: one candidate count after the other."""
    ranking = metric.abs().sum(0).argsort(descending=True, stable=True)
    best, chosen = torch.inf, None
    for count in range(1, min(limit, metric.shape[1])):
        mask = torch.zeros_like(metric, dtype=torch.bool)
        mask[:, ranking[:count]] = True
        kept = residual_binarization(metric, mask, 2) + residual_binarization(metric, ~mask, 2)
        error = (metric - kept).square().mean().item()
        if error < best:
            best, chosen = error, mask[0]
    return chosen


def split_search(metric: Tensor, mask: Tensor, order: int, rest: Tensor, second_moment: Tensor | None = None) -> Tensor:
    """Large-magnitude group on the mask, bool ``[n, c]``: one threshold after the other.

    ``rest``: the reconstruction of what is outside the mask. With ``second_moment`` the error is the output error.
    """
    pool = (metric * mask).abs().flatten().double()
    if order == 2:
        pool = pool[pool != 0]
    ordered = pool.sort().values
    best, chosen = torch.inf, None
    for quantile in QUANTILES:
        position = quantile * (ordered.numel() - 1)
        low, high = ordered[int(position)], ordered[min(int(position) + 1, ordered.numel() - 1)]
        threshold = (low + (high - low) * (position - int(position))).float()
        large = mask & (metric.abs() >= threshold)
        small = mask & (metric.abs() < threshold)
        kept = residual_binarization(metric, small, order) + residual_binarization(metric, large, order)
        left = metric - kept - rest
        if second_moment is None:
            error = left.square().mean().item()
        else:
            error = (second_moment * (left.t() @ left)).sum().item()
        if error < best:
            best, chosen = error, large
    return chosen


def start(values: Tensor, mask: Tensor, order: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Signs (0 off the mask), scales ``[n, 1]`` and mean ``[n, 1]`` of residual binarization."""
    left = torch.where(mask, values, torch.nan)
    signs, scales, mean = [], [], torch.zeros(len(values), 1)
    for _ in range(order):
        centre = masked_mean(left)[:, None]
        left = left - centre
        scale = masked_mean(left.abs())[:, None]
        sign = torch.where(mask, torch.sign(left), 0.0)
        left = left - scale * sign
        signs.append(sign), scales.append(scale)
        mean = mean + centre
    return signs, scales, mean


def nearest(target: Tensor, levels: list[Tensor]) -> Tensor:
    """Index of the level nearest to each entry."""
    return torch.stack([(target - level).abs() for level in levels]).argmin(0)


def signs_of(choice: Tensor, mask: Tensor) -> list[Tensor]:
    first, second = torch.where(choice >= 2, 1.0, -1.0), torch.where(choice % 2 == 1, 1.0, -1.0)
    return [torch.where(mask, sign, 0.0) for sign in (first, second)]


def arb(values: Tensor, mask: Tensor, order: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Signs, scales and mean of ARB."""
    signs, scales, mean = start(values, mask, order)
    masked = torch.where(mask, values, torch.nan)
    for _ in range(ITERATIONS):
        level = sum(scale * sign for scale, sign in zip(scales, signs, strict=True)) + mean
        mean = mean + masked_mean(masked - level)[:, None]
        for i in range(order):
            other = scales[1 - i] * signs[1 - i] if order == 2 else 0.0
            top = (signs[i] * (masked - mean - other)).nansum(1, keepdim=True)
            scales[i] = top / (signs[i].square().sum(1, keepdim=True) + 1e-8)
        if order == 1:
            signs = [torch.where(mask, torch.sign(masked - mean), 0.0)]
        else:
            a, b = scales
            signs = signs_of(nearest(values - mean, [-a - b, b - a, a - b, a + b]), mask)
    return signs, scales, mean


def level_of(signs: list[Tensor], scales: list[Tensor], mean: Tensor, mask: Tensor) -> Tensor:
    total = sum(scale * sign for scale, sign in zip(scales, signs, strict=True)) + mean
    return torch.where(mask, total, 0.0)


def form(left: Tensor, second_moment: Tensor, right: Tensor) -> Tensor:
    """``left S right`` per row through an ``[n, c, c]`` tensor: ``[n, 1]``."""
    return (left[:, :, None] * second_moment * right[:, None, :]).sum((1, 2))[:, None]


def arb_x(values: Tensor, mask: Tensor, order: int, second_moment: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Signs of ARB, scales and mean refitted to the output."""
    signs, scales, mean = arb(values, mask, order)
    member, weights = mask.float(), torch.where(mask, values, 0.0)
    for _ in range(ITERATIONS):
        left = weights - sum(scale * sign for scale, sign in zip(scales, signs, strict=True))
        mean = form(member, second_moment, left) / (form(member, second_moment, member) + 1e-10)
        for i in range(order):
            left = weights - mean * member - (scales[1 - i] * signs[1 - i] if order == 2 else 0.0)
            scales[i] = form(signs[i], second_moment, left) / (form(signs[i], second_moment, signs[i]) + 1e-10)
    return signs, scales, mean


def arb_rc(values: Tensor, mask: Tensor, order: int) -> Tensor:
    """Reconstruction by row and column scales."""
    left = torch.where(mask, values, torch.nan)
    signs, rows, columns = [], [], []
    for _ in range(order):
        row = masked_mean(left.abs())[:, None]
        column = masked_mean(left.abs() / row, 0)
        sign = torch.where(mask, torch.sign(left), 0.0)
        left = left - row * column * sign
        signs.append(sign), rows.append(row), columns.append(column)
    weights = torch.where(mask, values, 0.0)
    for _ in range(ITERATIONS):
        for i in range(order):
            other = rows[1 - i] * columns[1 - i] * signs[1 - i] if order == 2 else 0.0
            scaled, target = columns[i] * signs[i], weights - other
            rows[i] = (scaled * target).sum(1, keepdim=True) / (scaled.square().sum(1, keepdim=True) + 1e-8)
            scaled = rows[i] * signs[i]
            columns[i] = (scaled * target).sum(0) / (scaled.square().sum(0) + 1e-8)
        if order == 2:
            a, b = (row * column for row, column in zip(rows, columns, strict=True))
            signs = signs_of(nearest(weights, [-a - b, b - a, a - b, a + b]), mask)
    return sum(row * column * sign for row, column, sign in zip(rows, columns, signs, strict=True))


def binarize_group(values: Tensor, mask: Tensor, order: int, method: str, second_moment: Tensor) -> Tensor:
    """Reconstruction of one group of a block, 0 elsewhere."""
    if method == "billm":
        return residual_binarization(values, mask, order)
    if method == "arb-rc":
        return arb_rc(values, mask, order)
    fitted = arb(values, mask, order) if method == "arb" else arb_x(values, mask, order, second_moment)
    return level_of(*fitted, mask)


def binarize(
    weight: Tensor, hessian: Tensor, upper: Tensor, method: str, column_groups: bool, width: int = 128
) -> Tensor:
    """The dense binarized matrix under the hessian metric; ``upper``: factor of the damped inverse Hessian."""
    weight, done = weight.clone(), torch.zeros_like(weight)
    for first in range(0, weight.shape[1], width):
        span = slice(first, min(first + width, weight.shape[1]))
        values, diagonal, moment = weight[:, span].clone(), upper.diagonal()[span], hessian[span, span] / 2
        metric = (values / diagonal).square()
        salient = salient_search(metric).expand_as(values)
        if method == "arb-x":
            rest, output = level_of(*arb(metric, salient, 2), salient), moment
        else:
            rest, output = residual_binarization(metric, salient, 2), None
        large = split_search(metric, ~salient, 1, rest, output)
        groups = [(~salient & large, 1), (~salient & ~large, 1)]
        if column_groups:
            large = split_search(metric, salient, 2, metric * ~salient)
            groups += [(salient & large, 2), (salient & ~large, 2)]
        else:
            groups += [(salient, 2)]
        done[:, span] = sum(binarize_group(values, mask, order, method, moment) for mask, order in groups)
        weight[:, span.stop :] -= ((values - done[:, span]) / diagonal) @ upper[span, span.stop :]
    return done
