"""ARB: alternating refined binarization (ARB-LLM section 3.2, equations 4-8).

A weight is ``W_ij ~ a_i B_ij + m_i`` with signs B, a scale a and a mean m per row; sums run over the group's members. In turn

    m_i <- m_i + mean_j (W_ij - a_i B_ij - m_i)
    a_i <- sum_j B_ij (W_ij - m_i) / sum_j B_ij^2
    B_ij <- sign(W_ij - m_i)

Second order, ``a_i B_ij + a'_i B'_ij + m_i``: m, then a for ``W - m - a' B'`` and a' for ``W - m - a B``, then
``(B, B')`` nearest to ``W - m`` among the four signed sums. The C twin is ``arb_fit_means`` in ``csrc/updates.c``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from . import compiled
from .fit import Fit, Group, binarize_residual, nearest_pair, row_mean

EPSILON = 1e-8


def fit(group: Group) -> Fit:
    """Means, scales and signs of one group."""
    return alternate(group.values, group.member, group.order, group.iterations)


def alternate(values: Tensor, member: Tensor, order: int, iterations: int) -> Fit:
    """Alternate mean, scales and signs of the members (float ``[n, k]``) of ``values [n, k]``."""
    if native.usable(values):
        return compiled.fit_arb(values, member, order, iterations)
    return _first_order(values, member, iterations) if order == 1 else _second_order(values, member, iterations)


def _first_order(values: Tensor, member: Tensor, iterations: int) -> Fit:
    count = member.sum(1)
    start = binarize_residual(values, member, 1)
    (sign,), (scale,), mean = start.signs, start.rows, start.mean
    assert mean is not None
    for _ in range(iterations):
        error = values - (scale[:, None] * sign + mean[:, None])
        mean = mean + row_mean(error, member, count)
        sign = sign * member
        scale = (sign * (values - mean[:, None])).sum(1) / (sign.square().sum(1) + EPSILON)
        sign = torch.sign(values - mean[:, None])
    return Fit((sign,), (scale,), mean)


def _second_order(values: Tensor, member: Tensor, iterations: int) -> Fit:
    count = member.sum(1)
    start = binarize_residual(values, member, 2)
    (first, second), (scale1, scale2), mean = start.signs, start.rows, start.mean
    assert mean is not None
    for _ in range(iterations):
        error = values - (scale1[:, None] * first + scale2[:, None] * second + mean[:, None])
        mean = mean + row_mean(error, member, count)
        centred = values - mean[:, None]
        first, second = first * member, second * member
        scale1 = _projection(first, centred - scale2[:, None] * second)
        scale2 = _projection(second, centred - scale1[:, None] * first)
        first, second = nearest_pair(centred, scale1[:, None], scale2[:, None])
    return Fit((first, second), (scale1, scale2), mean)


def _projection(sign: Tensor, target: Tensor) -> Tensor:
    return (sign * target).sum(1) / (sign.square().sum(1) + EPSILON)
