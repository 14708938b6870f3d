"""What a weight must be before it is binarized: finite, and of an ordinary size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ArbCalibrationError


def require_finite_weight(weight: Tensor) -> None:
    """Raise :class:`ArbCalibrationError` if a weight holds NaN or infinite entries."""
    if not torch.isfinite(weight.sum(dtype=torch.float64)):  # one pass; float64 holds any sum of finite weights
        bad = int((~torch.isfinite(weight)).sum())
        raise ArbCalibrationError(f"the weight is not finite: {bad} of {weight.numel()} entries are NaN or infinite")


def in_units(weight: Tensor) -> tuple[Tensor, float]:
    """A matrix as ``(weight / unit, unit)`` with the power of two ``unit`` that brings its largest magnitude to 1..2.

    Exact, so that nothing but the published algorithm's absolute epsilons sees it: these were chosen for weights of an
    ordinary size, and squares of others leave the range of float32.
    """
    exponent = math.frexp(weight.abs().max().item())[1] - 1
    unit = math.ldexp(1.0, max(exponent, -126))  # 1 / unit must be a float32 too
    return weight / unit, unit
