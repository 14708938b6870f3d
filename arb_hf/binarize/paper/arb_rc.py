"""ARB-RC: row and column scales, no mean (ARB-LLM section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from . import compiled
from .fit import Fit, nearest_pair

EPSILON = 1e-8


def fit(values: Tensor, member: Tensor, order: int, iterations: int) -> Fit:
    """Alternate row and column scales of one group. ``member`` is float ``[n, k]``."""
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
