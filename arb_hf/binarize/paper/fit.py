"""`Group`: the weights of one group inside one block; `Fit`: what a method makes of it; and steps that methods share.

A group is a set of entries of a matrix ``values [n, k]`` marked by ``member`` (float ``[n, k]``, 0 or 1); every row has its
own scales over its own members. Rows without members get zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """One group of weights of a block, for a method's ``fit``.

    Attributes:
        block, block_member: the whole block's weights and the group's members among them, ``[n, c]``.
        columns: the columns that can hold the group, bool ``[c]``: the ordinary or the salient ones.
        order: planes: 1 for ordinary columns, 2 for salient ones.
        iterations: rounds of alternating updates.
        block_second_moment: S of the block's inputs ``[c, c]``, in units like the weights.
    """

    block: Tensor
    block_member: Tensor
    columns: Tensor
    order: int
    iterations: int
    block_second_moment: Tensor

    @property
    def values(self) -> Tensor:
        """The weights of ``columns``, ``[n, k]``."""
        return self.block[:, self.columns]

    @property
    def member(self) -> Tensor:
        """The members among ``values``."""
        return self.block_member[:, self.columns]

    @property
    def second_moment(self) -> Tensor:
        """S over ``columns``, ``[k, k]``."""
        return self.block_second_moment[self.columns][:, self.columns]


@dataclass(frozen=True)
class Fit:
    """Signs and scales of one group: ``sum_o rows[o] * columns[o] * signs[o] + mean`` on its members.

    Attributes:
        signs: one or two float tensors ``[n, k]`` with entries -1, 0, +1 (first and second order).
        rows: per order, row scales ``[n]``.
        mean: row means ``[n]``, or None.
        columns: per order, column scales ``[k]``, or None.
    """

    signs: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]
    mean: Tensor | None = None
    columns: tuple[Tensor, ...] | None = None

    def values(self) -> Tensor:
        """Reconstruction ``[n, k]``; meaningful on the members only."""
        total = torch.zeros_like(self.signs[0])
        for order, (signs, row) in enumerate(zip(self.signs, self.rows, strict=True)):
            term = signs * row[:, None]
            total += term if self.columns is None else term * self.columns[order]
        return total if self.mean is None else total + self.mean[:, None]

    def at_columns(self, columns: Tensor) -> Fit:
        """The same fit, restricted to some columns (bool ``[k]``)."""
        scales = None if self.columns is None else tuple(scale[columns] for scale in self.columns)
        return Fit(tuple(sign[:, columns] for sign in self.signs), self.rows, self.mean, scales)

    def scales(self) -> Fit:
        """The fit without its signs, which weigh the most."""
        return replace(self, signs=())


def row_mean(values: Tensor, member: Tensor, count: Tensor) -> Tensor:
    """Mean of each row over its members, 0 for a row without any. ``member`` float ``[n, k]``, ``count [n]``."""
    return (values * member).sum(1) / count.clamp(min=1)


def binarize_residual(values: Tensor, member: Tensor, order: int) -> Fit:
    """BiLLM's residual binarization of one group: ``order`` rounds of mean, mean deviation, sign."""
    count = member.sum(1)
    residual, mean = values, torch.zeros_like(count)
    signs, rows = [], []
    for _ in range(order):
        centre = row_mean(residual, member, count)
        centred = residual - centre[:, None]
        scale = row_mean(centred.abs(), member, count)
        sign = torch.sign(centred)
        residual = residual - (scale[:, None] * sign + centre[:, None])
        mean = mean + centre
        signs.append(sign)
        rows.append(scale)
    return Fit(tuple(signs), tuple(rows), mean)


def nearest_pair(target: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Signs (B1, B2) with ``first * B1 + second * B2`` nearest to ``target``; of equals the first in --, -+, +-, ++."""
    best, choice = (target + first + second).abs(), torch.zeros_like(target, dtype=torch.int8)
    for index, level in enumerate((second - first, first - second, first + second), start=1):
        distance = (target - level).abs()
        better = distance < best
        best = torch.where(better, distance, best)
        choice.masked_fill_(better, index)
    one = torch.ones((), dtype=target.dtype, device=target.device)
    return torch.where(choice >= 2, one, -one), torch.where(choice % 2 == 1, one, -one)
