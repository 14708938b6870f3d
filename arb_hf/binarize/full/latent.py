"""A binary weight in training: its scales, or its codes too, which latent weights choose; all is open to gradients.

The value of a weight is the level nearest to its latent weight. Gradients reach row and column scales through the
levels, and the latent weights straight through the rounding. Nothing is added to the format: what is left at the end is
codes and scales.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...format.weight import BinaryWeight
from ..hessian import HessianFactor
from .coded import CodedBlock
from .driver import assemble, curvature, spans, take_apart
from .steps import nearest_codes, round_scales


class ScaledWeight:
    """One matrix whose scales are trained; its codes stay.

    All parameters are steps relative to the size of what they move, 0 at the start, so that one learning rate suits
    matrices of every size.

    Args:
        weight: where training starts.
        scales: steps to go on from, in place of new ones.

    Attributes:
        scales: relative steps of row parameters and column scales, a pair of tensors per block.
    """

    def __init__(self, weight: BinaryWeight, scales: list[Tensor] | None = None) -> None:
        self.form = weight.form
        self._blocks = take_apart(weight)
        if scales is None:
            starts = [scale for block in self._blocks for scale in self._scales(block)]
            scales = [torch.zeros_like(start, requires_grad=True) for start in starts]
        self.scales = scales

    def _scales(self, block: CodedBlock) -> list[Tensor]:
        return [block.rows, block.columns] if self.form.has_column_scales else [block.rows]

    def dense(self) -> Tensor:
        """``[n, m]``, with gradients."""
        return torch.cat([block.values() for block in self._scaled()]).T

    @torch.no_grad()
    def binary_weight(self) -> BinaryWeight:
        """The weight as it would be stored: scales rounded."""
        return assemble([round_scales(block) for block in self._scaled()], self.form)

    def _scaled(self) -> list[CodedBlock]:
        per_block = len(self.scales) // len(self._blocks)
        scaled = []
        for number, block in enumerate(self._blocks):
            steps = self.scales[number * per_block : (number + 1) * per_block]
            block = replace(block, rows=block.rows + self._row_unit(block) * steps[0])
            if self.form.has_column_scales:
                block = replace(block, columns=block.columns * (1 + steps[1]))
            scaled.append(block)
        return scaled

    def _row_unit(self, block: CodedBlock) -> Tensor:
        unit = block.rows.abs()
        if self.form.mean_slots:  # means may be near 0; what they can move by is a part of the scales beside them
            unit[self.form.scale_slots :] = unit[: self.form.scale_slots].mean(0)
        return unit


class LatentWeight(ScaledWeight):
    """One matrix whose scales and codes are trained.

    Args:
        weight: where training starts.
        start: ``[n, m]``, the latent weights, of which every weight's level should be the nearest. Coordinate descent
            leaves such: what each weight would best be while the others stay.

    Attributes:
        shifts: relative steps of the latent weights ``[m, n]``.
    """

    def __init__(self, weight: BinaryWeight, start: Tensor) -> None:
        super().__init__(weight)
        self._spans = spans(self.form.in_features, self.form.block_size)
        self._start = start.T.to(torch.float32).contiguous()
        self._unit = weight.dequantize().square().mean(1).sqrt()
        self.shifts = torch.zeros_like(self._start, requires_grad=True)

    def dense(self) -> Tensor:
        """``[n, m]``, with gradients."""
        latent = self._latent()
        values = torch.cat([block.values() for block in self._nearest(self._scaled(), latent)])
        return (values + (latent - latent.detach())).T

    @torch.no_grad()
    def binary_weight(self) -> BinaryWeight:
        """The weight as it would be stored: scales rounded, then codes."""
        rounded = [round_scales(block) for block in self._scaled()]
        return assemble(self._nearest(rounded, self._latent()), self.form)

    def _latent(self) -> Tensor:
        return torch.addcmul(self._start, self._unit, self.shifts)

    @torch.no_grad()
    def _codes(self, block: CodedBlock, latent: Tensor) -> Tensor:
        return nearest_codes(block, latent).codes

    def _nearest(self, blocks: list[CodedBlock], latent: Tensor) -> list[CodedBlock]:
        return [
            replace(block, codes=self._codes(block, latent[span]))
            for block, span in zip(blocks, self._spans, strict=True)
        ]


def best_alone(dense: Tensor, wanted: Tensor, hessian: Tensor | None, factor: HessianFactor) -> Tensor:
    """What each weight would best be while all others stay: ``Q + (W - Q) H / diag(H)``, ``[n, m]``.

    Args:
        dense: Q ``[n, m]``.
        wanted: W ``[n, m]``.
    """
    full = curvature(hessian, factor)
    return dense + (wanted - dense) @ full / full.diagonal()
