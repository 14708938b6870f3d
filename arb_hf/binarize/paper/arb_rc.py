"""ARB-RC: row and column scales, no mean (ARB-LLM section 3.4).

A weight is ``W_ij ~ r_i s_j B_ij`` with signs B; sums run over the group's members. In turn

    r_i <- sum_j s_j B_ij W_ij / sum_j (s_j B_ij)^2
    s_j <- sum_i r_i B_ij W_ij / sum_i (r_i B_ij)^2

and B stays ``sign(W)``. Second order, ``r_i s_j B_ij + r'_i s'_j B'_ij``: the same for ``W - r' s'^T B'`` and for
``W - r s^T B`` in turn, then ``(B, B')`` nearest to W among the four signed sums. The C twin of the second order is
``arb_fit_scales`` in ``csrc/updates.c``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from . import compiled
from .fit import Fit, Group, nearest_pair

EPSILON = 1e-8


def fit(group: Group) -> Fit:
    """Row scales, column scales and signs of one group."""
    return alternate(group.values, group.member, group.order, group.iterations)


def alternate(values: Tensor, member: Tensor, order: int, iterations: int) -> Fit:
    """Alternate row and column scales of the members (float ``[n, k]``) of ``values [n, k]``."""
    if order == 2 and native.usable(values):
        return compiled.fit_arb_rc(values, member, iterations)
    return _first_order(values, member, iterations) if order == 1 else _second_order(values, member, iterations)


def _start(residual: Tensor, member: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row scales: mean magnitudes; column scales: mean of magnitudes over the row scale; signs."""
    magnitude = residual.abs() * member
    rows = magnitude.sum(1) / member.sum(1).clamp(min=1)
    positive = rows > 0
    inverse = torch.where(positive, 1.0 / torch.where(positive, rows, 1.0), 0.0)
    present = member * positive[:, None]
    columns = (inverse @ magnitude) / present.sum(0).clamp(min=1)
    return rows, columns, torch.sign(residual) * member


def _fit_rows(projected: Tensor, columns: Tensor, present: Tensor) -> Tensor:
    return projected @ columns / (present @ columns.square() + EPSILON)


def _fit_columns(projected: Tensor, rows: Tensor, present: Tensor) -> Tensor:
    return rows @ projected / (rows.square() @ present + EPSILON)


def _first_order(values: Tensor, member: Tensor, iterations: int) -> Fit:
    rows, columns, sign = _start(values, member)
    projected, present = sign * values, sign.square()
    for _ in range(iterations):
        rows = _fit_rows(projected, columns, present)
        columns = _fit_columns(projected, rows, present)
    return Fit((sign,), (rows,), columns=(columns,))


def _second_order(values: Tensor, member: Tensor, iterations: int) -> Fit:
    values = values * member
    rows, columns, signs = [], [], []
    residual = values
    for _ in range(2):
        row, column, sign = _start(residual, member)
        residual = residual - torch.outer(row, column) * sign
        rows.append(row)
        columns.append(column)
        signs.append(sign)
    for _ in range(iterations):
        for i in range(2):
            other = torch.outer(rows[1 - i], columns[1 - i]) * signs[1 - i]
            projected, present = signs[i] * (values - other), signs[i].square()
            rows[i] = _fit_rows(projected, columns[i], present)
            columns[i] = _fit_columns(projected, rows[i], present)
        levels = [torch.outer(row, column) for row, column in zip(rows, columns, strict=True)]
        signs = [sign * member for sign in nearest_pair(values, *levels)]
    return Fit(tuple(signs), tuple(rows), columns=tuple(columns))
