"""ARB-X: ARB, then means and scales refitted to the layer's output (ARB-LLM section 3.3).

First ARB; then the signs stay, and mean and scales descend in turn on the output error of the group alone. With
``S = sum_s X_s^T X_s / N`` the paper's sums over calibration tokens are quadratic forms, so only matrix products
``[n, k] @ [k, k]`` are needed. For a row w with members 1 (the vector of ones on the group) and signs b, b'

    m <- (1^T S w - a 1^T S b - a' 1^T S b') / 1^T S 1
    a <- (b^T S w - m b^T S 1 - a' b^T S b') / b^T S b        and a' the same way
"""

from __future__ import annotations

from torch import Tensor

from . import arb
from .fit import Fit, Group

EPSILON = 1e-10


def fit(group: Group) -> Fit:
    """Means, scales and signs of one group."""
    values, member, second_moment, order = group.values, group.member, group.second_moment, group.order
    start = arb.alternate(values, member, order, group.iterations)
    signs = tuple(sign * member for sign in start.signs)
    weights = values * member

    def form(left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum(1)

    spread = member @ second_moment
    spreads = [sign @ second_moment for sign in signs]
    p, u = form(spread, member), form(spread, weights)
    t = [form(spread, sign) for sign in signs]
    q = [form(s, sign) for s, sign in zip(spreads, signs, strict=True)]
    z = [form(s, weights) for s in spreads]
    cross = form(spreads[0], signs[1]) if order == 2 else None
    rows, mean = list(start.rows), start.mean
    for _ in range(group.iterations):
        mean = (u - sum(row * each for row, each in zip(rows, t, strict=True))) / (p + EPSILON)
        for i in range(order):
            other = 0.0 if cross is None else rows[1 - i] * cross
            rows[i] = (z[i] - mean * t[i] - other) / (q[i] + EPSILON)
    return Fit(start.signs, tuple(rows), mean)
