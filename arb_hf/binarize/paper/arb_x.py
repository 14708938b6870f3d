"""ARB-X: ARB, then means and scales refitted to the layer's output (ARB-LLM section 3.3).

The paper sums over calibration tokens; with ``S = sum_s X_s^T X_s / N`` every sum is a quadratic form of S, so only
matrix products ``[n, k] @ [k, k]`` are needed.
"""

from __future__ import annotations

from torch import Tensor

from . import arb
from .fit import Fit

EPSILON = 1e-10


def fit(values: Tensor, member: Tensor, order: int, iterations: int, second_moment: Tensor) -> Fit:
    """Stage 1: ARB; stage 2: the signs stay, mean and scales descend on the output error of this group alone.

    ``second_moment`` is S ``[k, k]`` over the columns of ``values``; ``member`` is float ``[n, k]``.
    """
    start = arb.fit(values, member, order, iterations)
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
    for _ in range(iterations):
        mean = (u - sum(row * each for row, each in zip(rows, t, strict=True))) / (p + EPSILON)
        for i in range(order):
            other = 0.0 if cross is None else rows[1 - i] * cross
            rows[i] = (z[i] - mean * t[i] - other) / (q[i] + EPSILON)
    return Fit(start.signs, tuple(rows), mean)
