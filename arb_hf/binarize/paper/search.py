"""Errors of all candidate partitions of a block: how many columns are salient, which threshold splits the groups.

A candidate is judged by plain residual binarization (BiLLM) of the metric ``T [n, c]``: values of a group
become ``mean +- mean deviation``, in one or two rounds. With the mean ``mu`` and the deviation ``D = sum |w - mu|`` of
n values the error of a round is ``sum w^2 - n mu^2 - D^2 / n``, less ``(D / n)^2`` for each value equal to its mean,
whose sign is 0. In sorted rows D follows from prefix sums. All functions return float64 errors, one a candidate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import native
from . import compiled

CPU_ELEMENTS, GPU_ELEMENTS = (
    1 << 18,
    1 << 24,
)  # elements of one intermediate tensor: what suits a core's cache, or a GPU


def salient_errors(ranked: Tensor, candidates: int) -> Tensor:
    """Error of second-order binarization of the first i columns and of the others, i = 1..candidates (< c).

    Args:
        ranked: ``[n, c]``, columns in their order of salience.
        candidates: how many counts to try.
    """
    if native.usable(ranked):
        return compiled.salient_errors(ranked, candidates)
    c = ranked.shape[1]
    counts = torch.arange(1, candidates + 1, dtype=torch.int64, device=ranked.device)
    first = torch.arange(c, dtype=torch.int64, device=ranked.device) < counts[:, None]
    parts = torch.stack([first, ~first], 1).to(ranked.dtype)  # [candidates, 2, c]: the columns of both parts
    total = ranked.new_zeros(candidates, dtype=torch.float64)
    room = [ranked.new_empty(0) for _ in range(3)]
    for rows in _row_chunks(ranked, candidates * c):
        if room[0].shape[1:2] != rows.shape[:1]:
            room = [ranked.new_empty(candidates, *rows.shape) for _ in range(3)]
        total += _part_errors(rows, parts, *room)
    return total


def _part_errors(rows: Tensor, parts: Tensor, residual: Tensor, work: Tensor, level: Tensor) -> Tensor:
    """Both rounds for the two parts of every candidate: residuals in float32, sums in float64.

    ``residual``, ``work`` and ``level`` are room for ``[candidates, r, c]``.
    """
    members, count = parts.transpose(1, 2).contiguous(), parts.double().sum(2)[:, None]
    # First round: the mean of both parts, of every candidate, from one prefix sum.
    prefix = rows.double().cumsum(1)
    inside = prefix[:, : len(parts)].t()
    mean = torch.stack([inside, prefix[:, -1] - inside], 2) / count
    torch.baddbmm(rows.expand_as(residual), mean.to(rows.dtype), parts, alpha=-1, out=residual)
    # Its scale and signs; the mean of what it leaves; then the residual of the second round.
    scale = torch.abs(residual, out=work).bmm(members).double() / count
    signs = torch.sign(residual, out=work)
    second_mean = -scale * signs.bmm(members) / count
    residual.addcmul_(signs, torch.bmm(scale.to(rows.dtype), parts, out=level), value=-1)
    residual.baddbmm_(second_mean.to(rows.dtype), parts, alpha=-1)
    # The second round's error needs no signs: energy less what its scale takes.
    energy = torch.mul(residual, residual, out=work).sum(2)
    deviation = torch.abs(residual, out=work).bmm(members).double()
    # The sign of 0 is 0. In a part of one or two columns every residual is 0, but there the scale is 0 too.
    has_zeros = len(parts) > 2 and work[2:].amin() == 0
    nonzero = residual.sign_().abs_().bmm(members) if has_zeros else count
    scale = deviation / count
    return (energy.double() + (scale * (scale * nonzero - 2 * deviation)).sum(2)).sum(1)


def split_errors(metric: Tensor, thresholds: Tensor, order: int) -> Tensor:
    """Error of binarizing ``|T| < threshold`` and ``|T| >= threshold`` apart, in ``order`` rounds, per threshold.

    Args:
        metric: T of the columns that the groups share, ``[n, k]``.
        thresholds: float32 ``[t]``.
        order: 1 or 2.
    """
    if native.usable(metric):
        return compiled.split_errors(metric, thresholds, order)
    gain = metric.new_zeros(thresholds.numel(), dtype=torch.float64)
    for rows in _row_chunks(metric, thresholds.numel() * 2):
        for group in _groups(rows, thresholds):
            gain += _gain(group, order).sum(0)
    return metric.double().square().sum() - gain


def output_errors(metric: Tensor, thresholds: Tensor, ordinary: Tensor, rest: Tensor, second_moment: Tensor) -> Tensor:
    """Output error under S of first-order binarization of both groups, per threshold (ARB-X).

    Args:
        metric: T of the ordinary columns, ``[n, k]``.
        thresholds: float32 ``[t]``.
        ordinary: those columns, bool ``[c]``.
        rest: what the salient columns leave, ``[n, c - k]``.
        second_moment: S, ``[c, c]``.
    """
    if native.usable(metric):
        return compiled.output_errors(metric, thresholds, ordinary, rest, second_moment)
    within, across = second_moment[ordinary][:, ordinary], second_moment[~ordinary][:, ordinary]
    total = ((rest @ second_moment[~ordinary][:, ~ordinary]) * rest).sum(dtype=torch.float64)
    errors = total.expand(thresholds.numel()).clone()
    chunks = _row_chunks(metric, thresholds.numel() * metric.shape[1])
    for rows, left in zip(chunks, _row_chunks(rest, thresholds.numel() * metric.shape[1]), strict=True):
        residual = _group_residuals(rows, thresholds)
        product = residual.matmul(within).add_((2 * left @ across)[:, None])
        errors += residual.mul_(product).sum((0, 2), dtype=torch.float64)
    return errors


def _group_residuals(rows: Tensor, thresholds: Tensor) -> Tensor:
    """What first-order binarization of both groups leaves, ``[r, t, k]``."""
    large = (rows.abs()[:, None] >= thresholds[:, None]).to(rows.dtype)
    masks = (1 - large, large)
    rounds = [_first_round(group) for group in _groups(rows, thresholds)]
    residual = rows[:, None].expand_as(large).clone()
    level = torch.zeros_like(large)
    for mask, found in zip(masks, rounds, strict=True):
        residual.addcmul_(mask, found.mean.to(rows.dtype)[..., None], value=-1)
        level.addcmul_(mask, found.scale.to(rows.dtype)[..., None])
    return residual.addcmul_(residual.sign(), level, value=-1)


def _row_chunks(values: Tensor, elements_per_row: int) -> tuple[Tensor, ...]:
    elements = CPU_ELEMENTS if values.device.type == "cpu" else GPU_ELEMENTS
    return values.split(max(1, elements // elements_per_row))


@dataclass(frozen=True)
class _Group:
    """One group under every threshold: the positions [low, high) of the sorted rows, or for ``large`` all others.

    ``ordered``: float64 ``[r, k]``, ascending; ``sums``: its prefix sums; ``low``, ``high``: ``[r, t]``.
    """

    ordered: Tensor
    sums: Tensor
    low: Tensor
    high: Tensor
    large: bool

    def below(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Number and sum of the members at positions below ``position [r, t]``."""
        inside = position.clamp(self.low, self.high)
        count, total = inside - self.low, self.sums.gather(1, inside) - self.sums.gather(1, self.low)
        if self.large:
            count, total = position - count, self.sums.gather(1, position) - total
        return count, total

    def locate(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of the first entries not below, and above, ``values [r, t]``."""
        return torch.searchsorted(self.ordered, values), torch.searchsorted(self.ordered, values, right=True)

    def deviation(self, values: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """How many members between two positions equal ``values``, and the sum of ``|member - values|``."""
        start, stop = (position.clamp(first, last) for position in self.locate(values))
        ends = [self.below(position) for position in (first, start, stop, last)]
        (n0, s0), (n1, s1), (n2, s2), (n3, s3) = ends
        return n2 - n1, (n1 - n0) * values - (s1 - s0) + (s3 - s2) - (n3 - n2) * values


def _groups(rows: Tensor, thresholds: Tensor) -> Iterator[_Group]:
    ordered = rows.sort(1).values
    limits = thresholds.expand(len(rows), -1).contiguous()
    low = torch.searchsorted(ordered, -limits, right=True)
    high = torch.maximum(torch.searchsorted(ordered, limits), low)  # a threshold of 0 leaves no small group
    ordered = ordered.double()
    sums = torch.nn.functional.pad(ordered.cumsum(1), (1, 0))
    for large in (False, True):
        yield _Group(ordered, sums, low, high, large)


@dataclass(frozen=True)
class _Round:
    """Where the first round puts a group, ``[r, t]``: count, mean and mean deviation of its members, how many are
    above and equal to the mean, and the positions between which those equal ones lie."""

    count: Tensor
    mean: Tensor
    scale: Tensor
    above: Tensor
    equal: Tensor
    start: Tensor
    stop: Tensor


def _first_round(group: _Group) -> _Round:
    end = torch.full_like(group.low, group.ordered.shape[1])
    count, total = group.below(end)
    size = count.clamp(min=1)
    mean = total / size
    start, stop = group.locate(mean)
    (below, low_sum), (upto, high_sum) = group.below(start), group.below(stop)
    above = count - upto
    scale = (total - high_sum - above * mean + below * mean - low_sum) / size
    return _Round(count, mean, scale, above, upto - below, start, stop)


def _gain(group: _Group, order: int) -> Tensor:
    """By how much ``order`` rounds lower the energy of a group, ``[r, t]``."""
    first = _first_round(group)
    gain = first.count * (first.mean.square() + first.scale.square()) + first.equal * first.scale.square()
    if order == 1:
        return gain
    size = first.count.clamp(min=1)
    shift = -first.scale * (2 * first.above + first.equal - first.count) / size  # the mean of what the first leaves
    centre, zero = first.mean + shift, torch.zeros_like(first.start)
    at_low, left = group.deviation(centre - first.scale, zero, first.start)
    at_high, right = group.deviation(centre + first.scale, first.stop, torch.full_like(zero, group.ordered.shape[1]))
    scale = (left + right + first.equal * shift.abs()) / size
    zeros = at_low + at_high + torch.where(shift == 0, first.equal, 0)
    return gain + first.count * (shift.square() + scale.square()) + zeros * scale.square()
